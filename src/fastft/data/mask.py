"""Which tokens bear loss: exactly those that the model would have to sample, the stop token of its turn included.

Not among them: what the model is given (other turns, tool results, the generation prompt that opens its own turn) and
the scaffold after the stop token, which nobody samples. Spans are in characters of the rendered text; a token bears
loss if it holds a character of a span, so one that a tokenizer merges across a span's start counts as sampled.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

from attrs import frozen

from fastft.data.template import Rendered

IGNORE = -100
Span = tuple[int, int]


@frozen
class Scaffold:
    """What a chat template puts around the assistant's words.

    `prompt` is the text that opens the assistant's turn, `stops` the ids of tokens that end it, `special` the ids of
    all special and added tokens. `earlier_end` is the text that a known format writes behind an answer that is not the
    last, where the model sampled a stop token; empty for formats that write the stop token itself.
    """

    prompt: str
    stops: frozenset[int]
    special: frozenset[int]
    earlier_end: str = ""


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids of the tokenizer's special and added tokens."""
    return frozenset(tokenizer.all_special_ids) | frozenset(getattr(tokenizer, "added_tokens_decoder", None) or {})


def find_scaffold(
    tokenizer: Any, render: Callable[..., Rendered | None] | None = None, stop_tokens: Iterable[str] = ()
) -> Scaffold:
    """Ask the tokenizer's template, by a conversation rendered for the purpose, how it opens and ends a turn.

    `render(messages, add_generation_prompt)` returns None where the template refuses the conversation. `stop_tokens`
    are those of the known format, if there is one: else the stop token is the special token that ends the last span, or
    that follows the answer where nothing is marked.
    """
    special = special_ids(tokenizer)
    stops = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    stop_tokens = list(stop_tokens)
    known = tokenizer.convert_tokens_to_ids(stop_tokens) if stop_tokens else []
    stops |= {token for token in known if token is not None and token != tokenizer.unk_token_id}
    if render is None:
        return Scaffold("", frozenset(stops), special)
    asked = [{"role": "user", "content": "question"}]
    answered, before, opened = (
        render([*asked, {"role": "assistant", "content": "answer"}], False), render(asked, False), render(asked, True),
    )  # fmt: skip
    prompt = opened.text.removeprefix(before.text) if before and opened and opened.text.startswith(before.text) else ""
    if answered is not None and "answer" in answered.text and not known:
        stops |= _ending(answered, tokenizer, special)
    return Scaffold(prompt, frozenset(stops), special)


def _ending(answered: Rendered, tokenizer: Any, special: frozenset[int]) -> set[int]:
    """Return the id of the special token that ends the answer of a conversation, if one does."""
    text = answered.text

    def ids(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False)["input_ids"] if part else []

    behind = text.rindex("answer") + len("answer")
    end = max((end for _, end in answered.spans), default=0)
    inside = ids(text[behind:end].strip())[-1:] if end > behind else []
    outside = ids(text[max(behind, end) :].strip())[:1]
    return {token for token in (inside if inside and inside[0] in special else outside) if token in special}


def merged(spans: Iterable[Span]) -> list[Span]:
    """Return the spans in order, those that touch as one, empty ones left out."""
    whole: list[Span] = []
    for start, end in sorted(span for span in spans if span[0] < span[1]):
        if whole and start <= whole[-1][1]:
            whole[-1] = (whole[-1][0], max(end, whole[-1][1]))
        else:
            whole.append((start, end))
    return whole


def token_range(offsets: Sequence[Span], start: int, end: int) -> Span:
    """Return the (first, last + 1) tokens that hold a character of `start` to `end`; `offsets` are in order."""
    high = bisect_left(offsets, (end,))
    low = bisect_left(offsets, (start,), hi=high)
    while low > 0 and offsets[low - 1][1] > start:
        low -= 1
    return low, high


def turn_range(text: str, span: Span, ids: Sequence[int], offsets: Sequence[Span], scaffold: Scaffold) -> Span | None:
    """Return the tokens of one assistant turn from its first sampled token to its stop token.

    A span that begins with the generation prompt is entered behind it; one that goes on with blanks behind the stop
    token ends at it; one that ends just before the stop token is given it. None: the turn has no stop token.
    """
    start, end = span
    if scaffold.prompt and text.startswith(scaffold.prompt, start) and start + len(scaffold.prompt) < end:
        start += len(scaffold.prompt)
    low, high = token_range(offsets, start, end)
    last = high - 1
    while last >= low and ids[last] not in scaffold.special and not text[offsets[last][0] : offsets[last][1]].strip():
        last -= 1
    if last >= low and ids[last] in scaffold.stops:
        return low, last + 1
    if high < len(ids) and ids[high] in scaffold.stops:
        return low, high + 1
    if last >= low and ids[last] in scaffold.special:
        return low, last + 1
    return None


def prefix_offsets(
    text: str, ids: Sequence[int], encode: Callable[[str], list[int]], cuts: Iterable[int]
) -> list[Span]:
    """Return offsets for a tokenizer that tells none: exact at `cuts` (in characters), and the same in between.

    The number of tokens before a cut is the length of what the text's ids and those of the text up to it share.
    """
    bounds = [(0, 0)]
    for cut in sorted(set(cuts)):
        part, count = encode(text[:cut]), 0
        while count < min(len(part), len(ids)) and part[count] == ids[count]:
            count += 1
        bounds.append((cut, max(count, bounds[-1][1])))
    bounds.append((len(text), len(ids)))
    offsets: list[Span] = []
    for (begin, first), (end, last) in pairwise(bounds):
        offsets.extend([(begin, end)] * (last - first))
    return offsets
