"""Conversations, prompts with completions, and plain text to token ids and labels that say what is learnt.

What the model would write itself is learnt, the stop token included; what it is given is not. Nothing is dropped or
cut without being asked for: a row that cannot be used is an error that names it.
"""

import itertools
import pickle
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from fastft.data import columns, inputs, pipeline
from fastft.data.check import (
    Mistakes,
    check_tokenised,
    overlong_problems,
    refuse_empty,
    refuse_unlearnable,
    whole_number,
)
from fastft.data.control import find_control
from fastft.data.files import told_by_file, told_of
from fastft.data.notes import Notes, StreamNotes, unpacked
from fastft.data.rendering import templates_of
from fastft.data.tokenise import Encoder, Row, Unlearnable
from fastft.errors import DataError, Problem, UsageError, did_you_mean
from fastft.given import tokenizer_problem

TrainOn = Literal["assistant", "last", "completion", "all"]
TRAIN_ON = ("assistant", "last", "completion", "all")
STREAMED = 100  # rows of a stream that are tokenised together


def chat_dataset(
    rows: Any,
    tokenizer: Any,
    train_on: TrainOn = "assistant",
    *,
    max_length: int | None = None,
    overlong: Literal["refuse", "truncate"] = "refuse",
    max_unlearnable: float = 0.0,
    alternate: bool = True,
    num_proc: int | None = None,
    progress: bool = True,
) -> Any:
    """Render, tokenise and mask `rows`; return a `datasets.Dataset` with `input_ids` and `labels` (-100: not learnt).

    `rows` is a list or another iterable of rows, a `datasets.Dataset`, or the path or name of one. A row holds
    `messages` (a list of `{"role", "content"}`, with `tools` if there are any), or `prompt` and `completion` (two
    texts, or two lists of messages), or `text`, or what becomes one of these (`recognise`); all rows are of the kind
    that the first ones are. `train_on`:

    * "assistant": every assistant turn with its stop token, by the template's `{% generation %}` markers; of a prompt
      with completion, the completion.
    * "last": the last assistant turn alone.
    * "completion": the completion; of messages, the last assistant turn.
    * "all": every token.

    Plain texts and completions end with the tokenizer's EOS token, added where it is missing. Where a template's
    markers end just before the turn's stop token, that token is learnt all the same; what they hold behind it is not.
    A template without markers that renders like a format fastft knows is masked by that format's. `max_length` is a
    number of tokens; a longer row is refused, or cut at its end with `overlong="truncate"`. Of the cut rows a share of
    `max_unlearnable` may be left without anything to learn; they are then left out, which is said.

    Two assistant turns in a row are refused; `alternate=False` takes them where the template does. Lists of texts are
    joined for templates that know text alone; tool calls, turns, reasoning and images that a template would leave out
    are errors, and so are images in an answer; others become the template's markers, which is said. So is, in one line
    a kind, what is mostly not meant: special tokens in texts, a last turn without an answer, an answer or a tool's
    result behind nothing (docs/how-to/chat-data.md). An answer with `weight: 0` bears no loss; nor does an earlier
    answer where the template leaves out the reasoning before it, which is said. Each of these is said once: of a stream
    about its first rows, or as soon as a row of the kind is read; of rows further down that the workers of a loader
    read, the first worker says its own, each time it is started.

    Large sets are tokenised over `num_proc` processes (default: all that this one may use) with a `progress` bar and
    kept on disk by content, so that the same set is not tokenised twice. A `datasets.IterableDataset` becomes another
    one that tokenises as it is read.

    Raises `UsageError` for wrong arguments, and `DataError` naming row, field, value and remedy for rows of a wrong
    type, without text, or with nothing to learn, for a template without markers where they are needed, and for a set
    (of a stream, its first rows) in which no stop token is learnt.
    """
    wrong = tokenizer_problem(tokenizer)
    _check_arguments(wrong, train_on, max_length, overlong, max_unlearnable, num_proc)
    given = rows if isinstance(rows, inputs.Input) else inputs.read(rows, alternate)
    inputs.refuse_others(given)
    templates, scaffold = templates_of(tokenizer, train_on)
    read = inputs.without_rows(given)
    control = find_control(tokenizer, scaffold.stops)
    encoder = Encoder(read, tokenizer, train_on, templates, scaffold, control, max_length, overlong == "truncate")
    if _is_stream(given.rows):
        return _streamed(given.rows, encoder)
    whole = pipeline.encoded(given.rows, encoder, num_proc, progress)
    with told_by_file(given.files):
        found = _sound_rows(whole, max_length, max_unlearnable)
    _need_stops(found, encoder)
    _print(_noted(whole).lines(len(whole), given.files, written=_is_written(encoder)))
    return found.select_columns(["input_ids", "labels"])


def tokenised(
    data: Any, tokenizer: Any, train_on: str, name: str, alternate: bool = True, num_proc: int | None = None
) -> Any:
    """Return token ids: `data` itself after a check, or what `chat_dataset` makes of its rows; errors tell its `name`.

    Raises `UsageError` and `DataError`.
    """
    source = inputs.open_named_rows(data, name, alternate)
    rows = source.rows
    with told_of(name, source.files):
        if isinstance(rows, list) and rows and isinstance(rows[0], Mapping) and "input_ids" in rows[0]:
            from datasets import Dataset

            rows = Dataset.from_list(rows)
        if "input_ids" in (getattr(rows, "column_names", None) or ()):
            check_tokenised(rows)
            return rows
        return chat_dataset(source, tokenizer, train_on=train_on, alternate=alternate, num_proc=num_proc)


def _is_stream(rows: Any) -> bool:
    from datasets import IterableDataset

    return isinstance(rows, IterableDataset)


def _streamed(rows: Any, encoder: Encoder) -> Any:
    """Return an `IterableDataset` that encodes as it is read, and raises at the first batch with a row it cannot.

    Whether stop tokens are learnt is asked of its first rows. What is told of rows is told of these now, and of later
    ones, where they are the first of their kind, as they are read.
    """
    head = list(itertools.islice(iter(rows), STREAMED))
    if not head:
        refuse_empty(())
    first = head[0]
    made = encoder.encode(head, range(len(head)))
    _need_stops_of_head(made, encoder)
    notes = StreamNotes()
    _tell_more(notes, made, range(len(head)), encoder)
    needed, files = set(encoder.given.recognised.fields.values()), encoder.given.files

    def encode(batch: Mapping[str, Any], indices: list[int]) -> dict[str, Any]:
        # `datasets` gives every row of a batch the fields of all; the first row's need not be those of all others
        whole = pipeline.rows_of(batch, tuple(batch))
        own = [{name: value for name, value in row.items() if value is not None or name in needed} for row in whole]
        made = encoder.encode(own, indices)
        mistakes = Mistakes()
        for row in made:
            mistakes.add([getattr(problem, "problem", problem) for problem in row.problems])
        with told_by_file(files):
            mistakes.refuse()
        _tell_more(notes, made, indices, encoder)
        labels = [np.full(len(row.ids), -100) for row in made]
        for row, learnt in zip(made, labels, strict=True):
            for start, end in row.spans:
                learnt[start:end] = row.ids[start:end]
        return {"input_ids": [row.ids for row in made], "labels": [learnt.tolist() for learnt in labels]}

    features, names = pipeline.features(), ["input_ids", "labels"]
    return rows.map(
        encode,
        with_indices=True,
        batched=True,
        batch_size=STREAMED,
        remove_columns=list(rows.column_names or first),
        features=type(features)({name: features[name] for name in names}),
    ).select_columns(names)


def _sound_rows(found: Any, max_length: int | None, allowed: float) -> Any:
    """Return the encoded rows without those that may be left out. Raises `DataError` for all others with problems."""
    column = found.with_format("arrow").select_columns(["problems"])
    wrong: list[list[Problem | str]] = []  # of each row that has any
    cut: dict[int, Problem] = {}
    first = 0
    for table in column.iter(10_000):
        marks = table["problems"]
        if marks.null_count < len(marks):
            for number, data in enumerate(marks.to_pylist()):
                problems = pickle.loads(data) if data else []
                lost = [problem.problem for problem in problems if isinstance(problem, Unlearnable)]
                other = [problem for problem in problems if not isinstance(problem, Unlearnable)]
                cut |= {first + number: lost[0]} if lost else {}
                wrong += [other] if other else []
        first += len(marks)
    general = [problem for row in wrong for problem in row if str(problem).startswith("tokenizer.")]
    if general:
        raise DataError(*{str(problem): problem for problem in general}.values())
    too_many = _told_cut(len(cut), len(found), max_length, allowed)
    mistakes = Mistakes()
    for row in [*wrong, *([problem] for problem in cut.values() if too_many)]:
        mistakes.add(row)
    mistakes.refuse(also=too_many)
    if not cut:
        return found
    print(
        f"fastft: {len(cut)} of {len(found)} rows have nothing left to learn within max_length={max_length}: left out."
    )
    return found.select([index for index in range(len(found)) if index not in cut])


def _told_cut(count: int, total: int, max_length: int | None, allowed: float) -> Sequence[Problem | str]:
    try:
        refuse_unlearnable(count, total, max_length, allowed)
    except DataError as error:
        return error.problems
    return ()


def _noted(found: Any) -> Notes:
    """Return what was noted of rows, which are numbered as they came; those that are left out are told as such."""
    notes, first = Notes(), 0
    for table in found.with_format("arrow").select_columns(["notes", "problems"]).iter(10_000):
        column, problems = table["notes"], table["problems"]
        if column.null_count < len(column):
            for number, (data, wrong) in enumerate(
                zip(column.to_pylist(), problems.is_valid().to_pylist(), strict=True)
            ):
                if data and not wrong:
                    notes.add(first + number, unpacked(data))
        first += len(column)
    return notes


def _tell_more(notes: StreamNotes, rows: Sequence[Row], numbers: Sequence[int], encoder: Encoder) -> None:
    """Note more rows of a stream, and print what was not told before; rows with problems are refused elsewhere."""
    noted = [{} if row.problems else row.notes for row in rows]
    _print(notes.lines(numbers, noted, encoder.given.files, written=_is_written(encoder)))


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(f"fastft: {line}")


def _is_written(encoder: Encoder) -> bool:
    """Return whether rows are texts that no template renders."""
    what = encoder.given.recognised
    return what.kind == "text" or (what.kind == "prompt_completion" and what.keys is None)


def _need_stops(found: Any, encoder: Encoder) -> None:
    """Raise `DataError` if there are turns in the set, and in none of them a stop token is learnt."""
    import pyarrow.compute

    if not any(
        pyarrow.compute.any(table["turns"]).as_py()
        for table in found.with_format("arrow").select_columns(["turns"]).iter(100_000)
    ):
        return
    stops = encoder.scaffold.stops
    if stops and not columns.any_trained(found, stops):
        full = int((columns.lengths(found) == encoder.max_length).sum())
        _refuse_no_stops(f"{len(found)} rows", full, encoder)


def _need_stops_of_head(rows: Sequence[Row], encoder: Encoder) -> None:
    """Do what `_need_stops` does for the first rows of a stream; those with problems are told when they are read."""
    stops = encoder.scaffold.stops
    sound = [row for row in rows if not row.problems and row.turns]
    learnt = {int(token) for row in sound for start, end in row.spans for token in row.ids[start:end]}
    if sound and stops and learnt.isdisjoint(stops):
        full = sum(len(row.ids) == encoder.max_length for row in sound)
        _refuse_no_stops(f"the first {len(rows)} rows of the stream", full, encoder)


def _refuse_no_stops(where: str, full: int, encoder: Encoder) -> None:
    """Raise `DataError` for rows without a learnt stop token, of which `full` fill `max_length`."""
    names = sorted(encoder.tokenizer.convert_ids_to_tokens(sorted(encoder.scaffold.stops)))
    limit = f"max_length={encoder.max_length}"
    cut = f"{full:,} of them fill {limit} and are cut before it: raise max_length. " if full else ""
    remedy = f"{cut}A model that never learns to stop goes on until it is stopped."
    raise DataError(Problem(f"stop token, learnt in {where}", "0 times", f"at least once one of {names}", remedy))


def _check_arguments(
    wrong: Problem | None, train_on: str, max_length: Any, overlong: str, max_unlearnable: Any, num_proc: Any
) -> None:
    problems = [wrong] if wrong else []
    if train_on not in TRAIN_ON:
        problems.append(Problem("train_on", train_on, f"one of {TRAIN_ON}", did_you_mean(train_on, TRAIN_ON)))
    problems += overlong_problems(overlong)
    if max_length is not None and not (whole_number(max_length) and max_length >= 2):
        expected = "a whole number of tokens, at least 2: the first token is never predicted"
        problems.append(Problem("max_length", max_length, expected))
    if num_proc is not None and not (whole_number(num_proc) and num_proc >= 1):
        problems.append(Problem("num_proc", num_proc, "a whole number of processes, at least 1, or None"))
    if not isinstance(max_unlearnable, int | float) or not 0 <= max_unlearnable <= 1:
        problems.append(Problem("max_unlearnable", max_unlearnable, "a share from 0 to 1"))
    if problems:
        raise UsageError(*problems)
