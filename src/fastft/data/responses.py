"""Loss on responses alone, for token ids that somebody else has made: what is a response is told by its markers.

Markers are looked for in the text of the tokens, not among their ids: "\\n" before a marker or the first letter of an
answer may be one token with it, so that a marker's own ids need not be there.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from attrs import define, field

from fastft.data import columns, training_collator
from fastft.data.check import SHOWN, refuse_empty
from fastft.data.known_format import recognise_format, response_parts
from fastft.data.mask import IGNORE, Span, special_ids
from fastft.data.pieces import Pieces
from fastft.data.rendering import templates_of
from fastft.errors import DataError, Problem, UsageError


@define
class Responses:
    """Finds the responses in rows of token ids: from `response_part` to the stop token, that one included.

    Where a response has no stop token it goes to the next `instruction_part` or `response_part`, or to the row's end.
    What the format writes at the end of earlier answers (`earlier_end`, as gpt-oss does), or else a special token
    before these, is not sampled: the model ends with its stop token there. `thinking` are the markers of reasoning that
    the format knows: a response that is reasoning and ends with a new `response_part` goes on behind it.
    `last`: of each row, or of each document of a packed row, the last response alone. Picklable.
    """

    tokenizer: Any
    instruction_part: str
    response_part: str
    stops: frozenset[int]
    last: bool = False
    exact: bool = True
    opening: str = ""  # what the generation prompt has behind the response part: given; a document that has it anywhere
    # has its responses there alone
    thinking: tuple[str, str] = ("", "")
    earlier_end: str = ""
    pieces: Pieces = field(init=False)
    special: frozenset[int] = field(init=False)
    _patterns: dict[str, re.Pattern[str]] = field(factory=dict)

    def __attrs_post_init__(self) -> None:
        self.pieces = Pieces(self.tokenizer)
        self.special = special_ids(self.tokenizer)

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """Return the `labels` of a batch of rows: -100 outside responses, and where the rows' own labels have it."""
        ids, labels = batch["input_ids"], batch.get("labels", batch["input_ids"])
        sizes = batch.get("seq_lengths") or [None] * len(ids)
        found = zip(_lists(ids), _lists(labels), sizes, strict=True)
        return {"labels": [self.labels(row, own, parts) for row, own, parts in found]}

    def labels(self, ids: Sequence[int], own: Sequence[int], documents: Sequence[int] | None = None) -> list[int]:
        """Return the labels of one row, whose documents have so many tokens (None: it is one document)."""
        made, start = [IGNORE] * len(ids), 0
        for size in documents or [len(ids)]:
            for low, high in self.responses(ids[start : start + size]):
                made[start + low : start + high] = own[start + low : start + high]
            start += size
        return made

    def responses(self, ids: Sequence[int]) -> list[Span]:
        """Return the (first, last + 1) tokens of every response of a document."""
        pieces = self.pieces.of(ids)
        ends = list(accumulate(map(len, pieces)))
        text = "".join(pieces)
        begins = [match.end() for match in self._pattern(self.response_part).finditer(text)]
        opened = [end + len(self.opening) for end in begins if text.startswith(self.opening, end)]
        begins = opened or begins  # what stands where another prompt was, is not what the model would write
        heads = [self.instruction_part, self.response_part]
        opens = sorted(match.start() for head in heads if head for match in self._pattern(head).finditer(text))
        spans: list[Span] = []
        for begin in begins:
            low = bisect_right(ends, begin)  # the first token that ends behind the marker
            after = bisect_left(opens, begin)
            limit = opens[after] if after < len(opens) else len(text)
            high = bisect_right(ends, limit)
            reach = range(low, min(high + 1, len(ids)))  # a stop token may be what opens the next turn
            stop = next((place for place in reach if ids[place] in self.stops), None)
            if stop is not None:
                high = stop + 1
            elif limit < len(text):
                high = self._without_end(ids, text, ends, low, limit)
            if spans and self._is_thought(text, ends[spans[-1][0] - 1], begin):
                spans[-1] = (spans[-1][0], high)
            elif low < high:
                spans.append((low, high))
        return spans[-1:] if self.last else spans

    def _without_end(self, ids: Sequence[int], text: str, ends: Sequence[int], low: int, limit: int) -> int:
        """Return the last + 1 token of an earlier response from token `low` to the character `limit`."""
        if self.earlier_end and text.endswith(self.earlier_end, 0, limit):
            return bisect_right(ends, limit - len(self.earlier_end))
        high = bisect_right(ends, limit)
        while high > low and ids[high - 1] in self.special:
            high -= 1
        return high

    def _is_thought(self, text: str, start: int, end: int) -> bool:
        """Return whether a response from `start` is reasoning, and `end` is where the same turn goes on."""
        opens, closes = self.thinking
        return bool(closes) and text.startswith(opens, start) and text.endswith(closes, start, end)

    def _pattern(self, marker: str) -> re.Pattern[str]:
        """Return what finds a marker. Some tokenizers begin a word with a blank behind every special token."""
        if marker in self._patterns:
            return self._patterns[marker]
        core = marker if self.exact else marker.strip()
        special = sorted(self.tokenizer.get_added_vocab(), key=len, reverse=True)
        parts = re.split("(" + "|".join(map(re.escape, special)) + ")", core) if special else [core]
        found = [
            re.escape(part) + (" ?" if place % 2 and any(parts[place + 1 :]) else "")
            for place, part in enumerate(parts)
        ]
        tail = "" if self.exact else marker[len(marker.rstrip()) :]
        self._patterns[marker] = re.compile("".join(found) + (f"(?:{re.escape(tail)})?" if tail else ""))
        return self._patterns[marker]


def train_on_responses_only(
    trainer: Any,
    instruction_part: str | None = None,
    response_part: str | None = None,
    force_match: bool = True,
    tokenizer: Any = None,
    return_function: bool = False,
    num_proc: int | None = None,
    last_response_only: bool = False,
    *,
    max_unlearnable: float = 0.0,
) -> Any:
    """Let only the assistant's responses bear loss; return `trainer` with other data, or the data set with labels.

    `trainer` is a trainer (fastft's, TRL's or another one with a `train_dataset` of token ids), or a
    `datasets.Dataset` or `IterableDataset` with `input_ids` and the `tokenizer`. Of a trainer the evaluation data are
    masked as well. `instruction_part` and `response_part` are the texts before a user's message and before an answer;
    left out, they are those of the tokenizer's chat template. A response goes up to its stop token; what bore no loss
    before bears none now. `force_match=False` lets blanks at the ends of the markers differ. `last_response_only`: of
    every conversation the last response. `return_function`: return the function that gives a batch of rows its labels.
    A share of `max_unlearnable` of the rows may have no response; they are left out, which is said.

    Raises `UsageError` for wrong arguments, and `DataError` for rows without a response, for a set in which no stop
    token is learnt, and for a trainer whose collator would make other labels.
    """
    tokenizer = _tokenizer_of(trainer, tokenizer)
    instruction_part, response_part = _parts(tokenizer, instruction_part, response_part)
    form = recognise_format(tokenizer)
    turned = form and form.thinking and form.thinking.end.endswith(response_part)
    thinking = (form.thinking.start, form.thinking.end) if turned else ("", "")
    scaffold = templates_of(tokenizer, "all")[1]
    opening = scaffold.prompt.partition(response_part)[2]
    responses = Responses(
        tokenizer,
        instruction_part,
        response_part,
        scaffold.stops,
        last=last_response_only,
        exact=bool(force_match),
        opening=opening,
        thinking=thinking,
        earlier_end=scaffold.earlier_end,
    )
    if return_function:
        return responses
    if not hasattr(trainer, "train_dataset"):
        return _masked(trainer, responses, "the data", num_proc, max_unlearnable)
    train = _masked(trainer.train_dataset, responses, "the training data", num_proc, max_unlearnable)
    evaluation = getattr(trainer, "eval_dataset", None)
    if isinstance(evaluation, Mapping):
        evaluation = {
            name: _masked(part, responses, f"the evaluation data {name!r}", num_proc, max_unlearnable)
            for name, part in evaluation.items()
        }
    elif evaluation is not None:
        evaluation = _masked(evaluation, responses, "the evaluation data", num_proc, max_unlearnable)
    if hasattr(train, "__len__"):
        probed = [train[index] for index in range(min(training_collator.PROBED, len(train)))]
        training_collator.refuse_other_labels(trainer.data_collator, probed, scaffold.stops)
    trainer.train_dataset, trainer.eval_dataset = train, evaluation
    return trainer


def _tokenizer_of(trainer: Any, tokenizer: Any) -> Any:
    """Return the tokenizer given, or the trainer's; of a processor its tokenizer. Raises `UsageError`."""
    found = tokenizer or getattr(trainer, "processing_class", None) or getattr(trainer, "tokenizer", None)
    found = getattr(found, "tokenizer", found)
    if found is None or not callable(getattr(found, "convert_tokens_to_ids", None)):
        remedy = "train_on_responses_only(dataset, tokenizer=...) takes it."
        raise UsageError(Problem("train_on_responses_only: tokenizer", found, "a tokenizer", remedy))
    return found


def _parts(tokenizer: Any, instruction_part: str | None, response_part: str | None) -> tuple[str, str]:
    """Return the markers given, or those of the tokenizer's chat template. Raises `UsageError`."""
    if (instruction_part is None) != (response_part is None):
        name = "instruction_part" if instruction_part is None else "response_part"
        raise UsageError(f"train_on_responses_only: {name} is missing; give both parts, or neither of them")
    if response_part is None:
        instruction_part, response_part = response_parts(tokenizer)
    wrong = [
        Problem(f"train_on_responses_only: {name}", part, "a text that is not empty")
        for name, part in (("instruction_part", instruction_part), ("response_part", response_part))
        if not isinstance(part, str) or not part.strip()
    ]
    if wrong:
        raise UsageError(*wrong)
    return instruction_part, response_part


def _masked(dataset: Any, responses: Responses, name: str, num_proc: int | None, allowed: float) -> Any:
    """Return a data set with the labels of its responses. Raises `DataError`."""
    names = getattr(dataset, "column_names", None) or ()
    if "input_ids" not in names:
        remedy = "Tokenise it first; a trainer does so when it is made."
        raise DataError(Problem(f"{name}, columns", list(names), "'input_ids' among them", remedy))
    if not hasattr(dataset, "__len__"):
        return dataset.map(responses, batched=True)
    refuse_empty(dataset, name)
    made = dataset.map(responses, batched=True, num_proc=num_proc, desc=f"Masking {name}")
    bearing = columns.loss_bearing(made)
    lost = (bearing == 0).nonzero()[0].tolist()
    if len(lost) > allowed * len(made):
        raise DataError(*_without_response(lost, len(made), responses, name, allowed))
    if lost:
        print(f"fastft: {len(lost)} of {len(made)} rows of {name} have no response to learn: left out.")
        made = made.select((bearing > 0).nonzero()[0])
        refuse_empty(made, name)
    refuse_untrained_stop(made, responses.stops, responses.tokenizer, name)
    return made


def _without_response(
    lost: Sequence[int], total: int, responses: Responses, name: str, allowed: float
) -> Iterable[Problem | str]:
    remedy = (
        "Cut rows end before their answer: raise max_length. Markers that do not fit the data: give instruction_part "
        "and response_part as the rows have them, or force_match=False."
    )
    if len(lost) < total:
        share = min(1.0, len(lost) / total + 0.005)
        remedy += f" Rows that cannot be helped: max_unlearnable={share:.2f} leaves them out."
    shown = ", ".join(map(str, lost[:SHOWN])) + (", ..." if len(lost) > SHOWN else "")
    parts = f"instruction_part={responses.instruction_part!r}, response_part={responses.response_part!r}"
    where = f"{name}, rows without a response to learn ({parts})"
    got = f"{len(lost)} of {total} ({len(lost) / total:.2%}): rows {shown}"
    return [Problem(where, got, f"at most {allowed:.2%}", remedy)]


def refuse_untrained_stop(dataset: Any, stops: Collection[int], tokenizer: Any, name: str) -> None:
    """Raise `DataError` if stop tokens stand in a `datasets.Dataset` of masked rows, and none of them bears loss."""
    if not stops or columns.any_trained(dataset, stops):
        return
    present = columns.present_ids(dataset, stops)
    if not present:
        return
    names = sorted(tokenizer.convert_ids_to_tokens(sorted(stops)))
    remedy = "The model would never learn to stop: let the labels hold the token that ends an answer."
    cut = columns.open_ended(dataset)  # no stop token bears loss, so what these rows end with is none
    if cut:
        remedy = (
            f"{cut:,} of {len(dataset):,} rows end inside an answer, as cut ones do: raise max_length. Else: {remedy}"
        )
    where = f"{name}: loss-bearing stop tokens, of {present:,} in {len(dataset):,} rows"
    raise DataError(Problem(where, 0, f"at least one of {names}", remedy))


def _lists(rows: Sequence[Any]) -> Iterable[list[int]]:
    return (row.tolist() if hasattr(row, "tolist") else row for row in rows)
