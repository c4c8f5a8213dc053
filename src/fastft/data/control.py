"""Strings in users' texts that the tokenizer takes for its special tokens, where no chat template has put them.

What a mistake is and what is meant depends on where it stands. In a message nobody writes special tokens but the chat
template: one in the content is a mistake, but for an assistant's own markers (of a tool call, say), which are no part
of the frame around turns. In a text that is not rendered the user writes the format: the BOS token at its very start
and a special token at its very end are meant.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from fastft.data.notes import Note, Notes
from fastft.data.template import own_templates, render_all, render_errors

_TURNS = [{"role": role, "content": "text"} for role in ("system", "user", "assistant")]


def tell_control(rows: Any, columns: Sequence[str], tokenizer: Any, name: str, files: Sequence[Path] = ()) -> None:
    """Say in one line in how many rows of a data set the conversations in `columns` hold special tokens.

    Columns that hold no conversations are left alone, and so is a stream, which is not read. Rows that came out of
    `files`, in their order, are named by file and line.
    """
    control, notes = find_control(tokenizer), Notes()
    columns = [column for column in columns if column in (getattr(rows, "column_names", None) or ())]
    if control.pattern is None or not columns or not hasattr(rows, "__len__"):
        return
    number = 0
    for batch in rows.select_columns(columns).iter(1000):
        for parts in zip(*(batch[column] for column in columns), strict=True):
            spoken = [message for part in parts if isinstance(part, list) for message in part]
            found = control.in_messages(spoken)
            notes.add(number, {"control": Note(found)} if found else {})
            number += 1
    for line in notes.lines(number, files):
        print(f"fastft: {name}: {line}")


@frozen
class Control:
    """Finds special tokens in texts; `frame` are those that stand around turns, `bos` the one that starts a text."""

    pattern: re.Pattern[str] | None = None
    frame: frozenset[str] = frozenset()
    bos: str = ""

    def in_messages(self, messages: Iterable[Mapping[str, Any]]) -> str | None:
        """Return the first special token in what the messages say, or None."""
        if self.pattern is None:
            return None
        for message in messages:
            content, allowed = message.get("content"), message["role"] == "assistant"
            for text in (content,) if len(message) == 2 and type(content) is str else _texts(message):
                for match in self.pattern.finditer(text):
                    if not allowed or match[0] in self.frame:
                        return match[0]
        return None

    def in_text(self, text: str, *, starts: bool, ends: bool) -> str | None:
        """Return the first special token in a text, or None.

        A BOS token at its start, if it `starts` a row, and any one at its end, if it `ends` the row, are meant.
        """
        if self.pattern is None:
            return None
        for match in self.pattern.finditer(text):
            opening = starts and match.start() == 0 and match[0] == self.bos
            if not opening and not (ends and match.end() == len(text)):
                return match[0]
        return None


def find_control(tokenizer: Any, stops: Iterable[int] = ()) -> Control:
    """Return what finds the special tokens that a tokenizer takes out of texts; `stops` are the ids of its stop tokens.

    Every token is tried: a tokenizer may be set to split them, or know them by their ids alone.
    """
    added = (getattr(tokenizer, "added_tokens_decoder", None) or {}).values()
    named = {*getattr(tokenizer, "all_special_tokens", ()), *(token.content for token in added if token.special)}
    names = sorted(str(name) for name in named if name)
    ids = tokenizer.convert_tokens_to_ids(names)
    made = tokenizer(names, add_special_tokens=False)["input_ids"] if names else []
    taken = [name for name, token, own in zip(names, ids, made, strict=True) if token in own]
    if not taken:
        return Control()
    pattern = re.compile(_any_of(taken))
    ends = tokenizer.convert_ids_to_tokens(sorted(stops)) if stops else []
    usual = [getattr(tokenizer, name, None) for name in ("bos_token", "eos_token", "pad_token")]
    frame = {*ends, *usual, *pattern.findall(_framed(tokenizer))} - {None}
    return Control(pattern, frozenset(frame), getattr(tokenizer, "bos_token", None) or "")


def _framed(tokenizer: Any) -> str:
    """Return a conversation as the tokenizer's template writes it; empty where it writes none."""
    template, _ = own_templates(tokenizer)
    for turns in (_TURNS, _TURNS[1:]) if template else ():  # some refuse a system message
        try:
            return render_all(template, [turns], tokenizer.special_tokens_map)[0].text
        except render_errors():
            continue
    return ""


def _any_of(words: Iterable[str]) -> str:
    """Return a pattern for any of the words, the longest first, that reads what they have in common but once.

    A vocabulary may have hundreds: an alternation would try all of them at every "<".
    """
    tree: dict[str, Any] = {}
    for word in words:
        place = tree
        for character in word:
            place = place.setdefault(character, {})
        place[""] = {}
    return _branches(tree)


def _branches(tree: Mapping[str, Any]) -> str:
    ways = [re.escape(character) + _branches(rest) for character, rest in tree.items() if character]
    if len(ways) == 1 and "" not in tree:
        return ways[0]
    return f"(?:{'|'.join(ways)}){'?' if '' in tree else ''}" if ways else ""


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts in a message, those of parts, reasoning and tool calls among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, Sequence):
        for part in value:
            yield from _texts(part)
