"""Batches of rows to token ids and labels: rendered together, tokenised in one call, masked by character spans."""

import pickle
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from attrs import define, field, frozen

from fastft.data import mask
from fastft.data.check import nothing_left, row_problem
from fastft.data.control import Control
from fastft.data.inputs import Input
from fastft.data.kinds import SYSTEM_COLUMNS
from fastft.data.left_out import is_plain, media_types, unsaid
from fastft.data.mask import IGNORE, Scaffold, Span
from fastft.data.notes import Note, packed
from fastft.data.order import odd_order
from fastft.data.rendering import Renderer, Templates
from fastft.data.template import render_errors
from fastft.data.unlearnt import refuse_weights, unlearnt
from fastft.errors import DataError, Problem, short


@frozen
class Encoder:
    """Turns rows into token ids and labels; a picklable value, so that other processes can do it."""

    given: Input
    tokenizer: Any
    train_on: str
    templates: Templates
    scaffold: Scaffold
    control: Control
    max_length: int | None = None
    truncate: bool = False

    def encode(self, rows: Sequence[Any], indices: Sequence[int]) -> list["Row"]:
        """Return one `Row` for each of `rows`, whose numbers in the whole set are `indices`."""
        made = [Row(f"row {index}") for index in indices]
        texts: list[Text] = []
        for row, content in zip(made, rows, strict=True):
            try:
                texts.extend(self._texts(row, content))
            except DataError as error:
                row.problems.extend(error.problems)
        self._render([text for text in texts if text.messages is not None])
        self._tokenise([text for text in texts if not text.row.problems])
        for text in texts:
            if not text.row.problems:
                try:
                    text.finish(self, text)
                except DataError as error:
                    text.row.problems.extend(error.problems)
        for row in made:
            if not row.problems:
                self._judge(row)
        return made

    def table(self, rows: Sequence[Any], indices: Sequence[int]) -> Any:
        """Return `encode`'s rows as the `pyarrow.Table` that `to_table` makes."""
        return to_table(self.encode(rows, indices))

    def _texts(self, row: "Row", content: Any) -> list["Text"]:
        """Return what is to be rendered and tokenised for a row, in order. Raises `DataError`."""
        whole_row, content = content, self.given.row(row.where, content)
        kind = self.given.recognised.kind
        row.turns = kind != "text"
        if kind == "text":
            return [self._plain_text(row, content["text"])]
        if kind != "prompt_completion":
            self._refuse_templates(row.where, content["messages"], self.train_on != "all")
            row.notes = self._notes(f"{row.where}, messages", content["messages"], 0)
            return [Text(row, _finish_messages, content["messages"], content)]
        prompt, completion = content["prompt"], content["completion"]
        if isinstance(prompt, str):
            self._refuse_unread(row.where, whole_row)
            row.notes = self._text_notes((prompt, True, False), (completion, False, True))
            return [
                Text(row, _finish_prompt, text=prompt, start=starts_anew(self.tokenizer, prompt)),
                Text(row, _finish_completion, text=completion),
            ]
        several = len(completion) > 1 and self.train_on != "all"
        whole = [*prompt, *completion]
        self._refuse_templates(row.where, whole, several)
        row.notes = self._notes(f"{row.where}, prompt + completion", whole, len(prompt))
        given = Text(row, _finish_nothing, prompt, content, name="prompt", opened=True)
        return [given, Text(row, _finish_turns, whole, content, name="prompt + completion", given=given)]

    def _refuse_unread(self, where: str, row: Mapping[str, Any]) -> None:
        """Raise `DataError` for columns that only messages have a place for, beside a prompt and completion in text."""
        read = self.given.recognised.fields.values()
        unread = [name for name in ("tools", *SYSTEM_COLUMNS) if name not in read and row.get(name)]
        remedy = "Give the prompt as messages, or remove the column if the prompt's text holds it already."
        expected = "nothing beside a prompt and completion that are texts"
        if unread:
            raise DataError(*(Problem(f"{where}, {name}", short(row[name]), expected, remedy) for name in unread))

    def _plain_text(self, row: "Row", text: Any) -> "Text":
        if self.train_on != "all":
            remedy = "A plain text has no turns: train on all of it with train_on='all'."
            expected = f"a row with turns for train_on={self.train_on!r}"
            raise DataError(Problem(f"{row.where}, text", short(text), expected, remedy))
        row.notes = self._text_notes((text, True, True))
        return Text(row, _finish_text, text=text, start=starts_anew(self.tokenizer, text))

    def _notes(self, where: str, messages: Sequence[Mapping[str, Any]], given: int) -> dict[str, Note]:
        """Return what is to be told of a conversation, by `notes`' kinds; `given` of its messages are a prompt's."""
        media, control = media_types(where, messages), self.control.in_messages(messages)
        notes = {kind: Note(found) for kind, found in odd_order(messages, self.train_on, given).items()}
        notes |= {"media": Note(media[0], len(media))} if media else {}
        return notes | ({"control": Note(control)} if control else {})

    def _text_notes(self, *texts: tuple[str, bool, bool]) -> dict[str, Note]:
        """Return what is to be told of texts, each with whether it starts and whether it ends its row."""
        found = [self.control.in_text(text, starts=starts, ends=ends) for text, starts, ends in texts]
        return next(({"control": Note(control)} for control in found if control), {})

    def _refuse_templates(self, where: str, messages: Sequence[Mapping[str, Any]], marked: bool) -> None:
        if self.templates.problem is not None:
            raise DataError(self.templates.problem)
        if not marked:
            return
        if not any(message["role"] == "assistant" for message in messages):
            roles = [message["role"] for message in messages]
            remedy = "Add the answer, or remove the row."
            raise DataError(Problem(f"{where}, messages", short(roles), "an assistant turn to learn", remedy))
        if self.templates.unmarked is not None:
            raise DataError(self.templates.unmarked)

    def _render(self, texts: Sequence["Text"]) -> None:
        """Render the messages of all texts, the plain ones without settings of their own in one go."""
        renderer = Renderer(self.tokenizer, self.templates)
        alike: dict[bool, list[Text]] = {False: [], True: []}
        alone: list[Text] = []
        for text in texts:
            if text.row.problems:
                continue
            settings = text.content.get("tools") or text.content.get("chat_template_kwargs")
            group = alone if settings or not is_plain(text.messages) else alike[text.opened]
            group.append(text)
        for opened, group in alike.items():
            try:
                found = renderer.rendered([text.messages for text in group], opened) if group else ()
            except (*render_errors(), DataError):
                alone.extend(group)
                continue
            for text, rendered in zip(group, found, strict=True):
                text.text, text.spans = rendered.text, rendered.spans
                if unsaid(text.messages, rendered.text):
                    alone.append(text)
        # Prompts come behind the whole conversations they begin: what is wrong with both is told once, of the whole.
        for text in sorted(alone, key=lambda text: text.opened):
            if text.row.problems:
                continue
            settings = [text.content.get(name) or None for name in ("tools", "chat_template_kwargs")]
            try:
                where = f"{text.row.where}, {text.name}"
                rendered = renderer.alone(where, text.messages, text.opened, *settings)
                text.text, text.spans = rendered.text, rendered.spans
            except DataError as error:
                text.row.problems.extend(error.problems)

    def _tokenise(self, texts: Sequence["Text"]) -> None:
        """Tokenise all texts: one call for those with the tokenizer's start tokens and one for those without."""
        for start in (False, True):
            group = [text for text in texts if text.start is start]
            if not group:
                continue
            contents = [text.text for text in group]
            backend = plain_backend(self.tokenizer)
            if backend is not None:
                encodings = backend.encode_batch(contents, add_special_tokens=start)
                for text, encoding in zip(group, encodings, strict=True):
                    text.ids, text.encoding = encoding.ids, encoding
                continue
            encoded = self.tokenizer(contents, add_special_tokens=start, return_attention_mask=False, verbose=False)
            encodings = encoded.encodings or [None] * len(group)
            for text, ids, encoding in zip(group, encoded["input_ids"], encodings, strict=True):
                text.ids, text.encoding = ids, encoding

    def offsets(self, text: "Text") -> Sequence[Span]:
        """Return the (start, end) characters of every token of a text."""
        if text.encoding is not None:
            return text.encoding.offsets
        cuts = [*chain(*text.spans), *([len(text.given.text)] if text.given else [])]
        return mask.prefix_offsets(text.text, text.ids, self._plain_ids, cuts)

    def turns(self, text: "Text", messages: Sequence[Any], spans: Sequence[Span], last: bool) -> list[Span]:
        """Return the token ranges of the spans that bear loss, each with its stop token; `DataError` without one.

        `spans` are those of the assistant turns in `messages`; `last`: only the last one's is asked for.

        Some formats write something else where an earlier turn ended than the model sampled there: a turn before the
        last may end at a special token, or at the scaffold's `earlier_end`, which is not learnt.
        """
        light, thought = unlearnt(f"{text.row.where}, {text.name}", messages, text.text, spans, self.templates.rules)
        first = len(spans) - 1 if last else 0
        silent = [text.text[slice(*spans[number])] for number in sorted(thought) if number >= first]
        text.row.notes |= {"unlearnt": Note(short(silent[0], 40), len(silent))} if silent else {}
        ranges, problems, offsets = [], [], self.offsets(text)
        for number, span in enumerate(spans):
            if number < first or number in light | thought:
                continue
            found = mask.turn_range(text.text, span, text.ids, offsets, self.scaffold)
            if found is None and number != len(spans) - 1:
                low, high = mask.token_range(offsets, *span)
                other = self.scaffold.earlier_end
                if high < len(text.ids) and text.ids[high] in self.scaffold.special:
                    found = low, high
                elif other and text.text.startswith(other, span[1]):
                    # A token of the answer's last character and the marker's first is none that the model samples.
                    found = low, high - (offsets[high - 1][1] > span[1])
            if found is None:
                remedy = "End the turn with the EOS token in the chat template, or the model never learns to stop."
                where = f"{text.row.where}, assistant turn {number}"
                tail = text.text[span[0] : span[1] + 20][-40:]
                problems.append(Problem(where, tail, "a stop token at its end", remedy))
            else:
                ranges.append(found)
        if problems:
            raise DataError(*problems)
        return ranges

    def with_eos(self, where: str, ids: list[int]) -> list[int]:
        """Return `ids` with the EOS token at the end. Raises `DataError` where the tokenizer has none."""
        eos = self.tokenizer.eos_token_id
        if eos is None:
            remedy = "Set tokenizer.eos_token."
            raise DataError(Problem("tokenizer.eos_token", None, f"an EOS token to end {where} with", remedy))
        return ids if ids and ids[-1] == eos else [*ids, eos]

    def _plain_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _judge(self, row: "Row") -> None:
        """Cut a row to length, and note what is wrong with it."""
        size = len(row.ids)
        if self.max_length is not None and size > self.max_length:
            if not self.truncate:
                remedy = "Raise max_length, or cut such rows with overlong='truncate'."
                row.problems.append(
                    Problem(row.where, f"{size} tokens", f"at most max_length={self.max_length}", remedy)
                )
                return
            row.ids = row.ids[: self.max_length]
            row.spans = [(start, min(end, self.max_length)) for start, end in row.spans if start < self.max_length]
        if not row.ids or not any(end > max(start, 1) for start, end in row.spans):
            cut = size > len(row.ids) > 0
            problem = row_problem(row.where, row.ids, [IGNORE] * len(row.ids))
            row.problems.append(Unlearnable(nothing_left(row.where, size, self.max_length)) if cut else problem)


@frozen
class Unlearnable:
    """The problem of a row that has nothing to learn since it was cut to `max_length`."""

    problem: Problem


@define
class Row:
    """A row on its way: its ids and the token ranges that bear loss, or its problems."""

    where: str
    ids: list[int] = field(factory=list)
    spans: list[Span] = field(factory=list)
    problems: list[Problem | str | Unlearnable] = field(factory=list)
    turns: bool = True  # whether the model is to learn when to stop: not asked of plain text
    notes: dict[str, Note] = field(factory=dict)  # what is told of it, though it is used, by its kind


@define
class Text:
    """A text of a row on its way: rendered from `messages` or given as it is, then tokenised, then masked."""

    row: Row
    finish: Callable[[Encoder, "Text"], None]
    messages: Sequence[Any] | None = None
    content: Mapping[str, Any] = field(factory=dict)
    name: str = "messages"  # what errors call the messages
    text: str = ""
    start: bool = False  # with the tokenizer's own start tokens
    opened: bool = False  # with the generation prompt
    given: "Text | None" = None  # the prompt of a prompt with completion
    spans: Sequence[Span] = ()
    ids: list[int] = field(factory=list)
    encoding: Any = None  # what a tokenizer that tells offsets made of it


def _finish_nothing(encoder: Encoder, text: Text) -> None:
    """Leave a prompt that is only rendered to see where the completion starts."""


def _finish_text(encoder: Encoder, text: Text) -> None:
    text.row.ids = encoder.with_eos(text.row.where, list(text.ids))
    text.row.spans = [(0, len(text.row.ids))]


def _finish_prompt(encoder: Encoder, text: Text) -> None:
    text.row.ids = list(text.ids)


def _finish_completion(encoder: Encoder, text: Text) -> None:
    given = len(text.row.ids)
    text.row.ids = text.row.ids + encoder.with_eos(text.row.where, list(text.ids))
    text.row.spans = [(0 if encoder.train_on == "all" else given, len(text.row.ids))]


def _finish_messages(encoder: Encoder, text: Text) -> None:
    text.row.ids = text.ids
    if encoder.train_on == "all":
        refuse_weights(f"{text.row.where}, {text.name}", text.messages)
        text.row.spans = [(0, len(text.ids))]
        return
    spans = mask.merged(text.spans)
    if not spans:
        remedy = "The template's {% generation %} block renders nothing for it."
        expected = "an assistant turn that leaves tokens"
        raise DataError(Problem(f"{text.row.where}, messages", short(text.messages), expected, remedy))
    text.row.spans = encoder.turns(text, text.messages, spans, encoder.train_on != "assistant")


def _finish_turns(encoder: Encoder, text: Text) -> None:
    """Mask a conversation that was given as the messages of a prompt and those of a completion."""
    where, given = text.row.where, text.given.text
    if not text.text.startswith(given):
        remedy = "The template renders the prompt otherwise alone than in the whole; use 'messages' rows instead."
        expected = "a prompt that the whole conversation starts with"
        raise DataError(Problem(f"{where}, prompt", short(text.given.messages), expected, remedy))
    spans = [(max(start, len(given)), end) for start, end in mask.merged(text.spans) if end > len(given)]
    spans = spans or [(len(given), len(text.text))]
    if encoder.train_on == "all":
        refuse_weights(f"{where}, {text.name}", text.messages)
    completion = text.messages[len(text.given.messages) :]
    whole = encoder.turns(text, completion, spans, encoder.train_on == "last")
    text.row.ids = text.ids
    text.row.spans = [(0, len(text.ids))] if encoder.train_on == "all" else whole


def plain_backend(tokenizer: Any) -> Any:
    """Return the `tokenizers.Tokenizer` to call directly, or None where the tokenizer itself does more than call it.

    The tokenizer's own call turns every encoding into lists that nobody needs here, a fifth of the time.
    """
    from transformers import PreTrainedTokenizerFast

    backend = getattr(tokenizer, "backend_tokenizer", None)
    own = ("__call__", "_encode_plus", "_batch_encode_plus", "encode", "_call_one")
    changed = any(
        getattr(type(tokenizer), name, None) is not getattr(PreTrainedTokenizerFast, name, None) for name in own
    )
    if backend is None or changed or getattr(tokenizer, "split_special_tokens", False):
        return None
    settled = backend.truncation is None and backend.padding is None and not backend.encode_special_tokens
    return backend if settled else None


def starts_anew(tokenizer: Any, text: str) -> bool:
    """Return whether the tokenizer's own start tokens are to be added: not where the text has BOS already."""
    bos = getattr(tokenizer, "bos_token", None)
    return bos is None or not text.startswith(bos)


def to_table(rows: Sequence[Row]) -> Any:
    """Return a `pyarrow.Table` with `input_ids`, `labels` (lists of int32), `problems`, `turns` (bool) and `notes`.

    `problems` is null, or a pickled list of what is wrong with the row; such a row has no ids. `notes` is null, or what
    is told of the row (`notes.packed`).
    """
    import pyarrow

    sound = [() if row.problems else row.ids for row in rows]
    ends = np.cumsum([0, *map(len, sound)], dtype=np.int32)
    ids = np.fromiter(chain.from_iterable(sound), dtype=np.int32, count=int(ends[-1]))
    labels = np.full_like(ids, IGNORE)
    for row, begin in zip(rows, ends[:-1].tolist(), strict=True):
        if not row.problems:
            for start, end in row.spans:
                labels[begin + start : begin + end] = ids[begin + start : begin + end]
    problems = [pickle.dumps(row.problems) if row.problems else None for row in rows]
    columns = {
        "input_ids": pyarrow.ListArray.from_arrays(ends, ids),
        "labels": pyarrow.ListArray.from_arrays(ends, labels),
        "problems": pyarrow.array(problems, pyarrow.binary()),
        "turns": pyarrow.array([row.turns for row in rows], pyarrow.bool_()),
        "notes": pyarrow.array([packed(row.notes) for row in rows], pyarrow.string()),
    }
    return pyarrow.table(columns)
