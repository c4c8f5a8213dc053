"""Rows for preference training: pairs of answers, or answers with a verdict, as TRL's trainers take them."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from fastft.data import check
from fastft.data.bars import bars_if_large
from fastft.data.columns import lengths as lengths_of
from fastft.data.control import tell_control
from fastft.data.files import told_of
from fastft.data.inputs import open_named_rows
from fastft.data.recognise import canonical, recognise
from fastft.data.sources import Source, open_named
from fastft.errors import DataError, Problem, did_you_mean, short
from fastft.train import arguments

PAIRS = ("chosen", "rejected")
VERDICTS = ("prompt", "completion", "label")
SPOKEN = ("prompt", *PAIRS, "completion")


def preference_dataset(rows: Any, tokenizer: Any, kinds: Sequence[Sequence[str]], name: str) -> Any:
    """Return rows, as `fastft.load_rows` takes them, as a data set of one of the `kinds` of columns.

    With a tokenizer that has a chat template, texts are turns: the prompt the user's, the answers the assistant's.
    Raises `DataError` with the rows that cannot be used.
    """
    chat = getattr(tokenizer, "chat_template", None) is not None
    opened = partial(open_named_rows, kinds=("preference",)) if chat else open_named
    source = opened(rows, name).listed()
    with told_of(name, source.files):
        made = _listed(source, chat, kinds, name)
    if chat:
        tell_control(made, SPOKEN, tokenizer, name, source.files)
    return made


def _listed(source: Source, chat: bool, kinds: Sequence[Sequence[str]], name: str) -> Any:
    rows = source.rows
    columns = set(_columns(rows))
    if chat and set(PAIRS) <= columns:
        rows = canonical(rows, recognise(rows))
    elif chat and set(VERDICTS) <= columns:
        made = as_dataset(rows, kinds, name)
        with bars_if_large(made):
            return made.map(_turns) if isinstance(next(iter(made))["prompt"], str) else made
    return as_dataset(rows, kinds, name)


def mixed_verdicts(rows: Any, seed: int) -> Any:
    """Return pairs as answers with a verdict, two rows of each pair, and any rows in a random order.

    KTO reads rows in the order in which they are, and estimates from each batch how far the model has moved.
    """
    from trl import extract_prompt, unpair_preference_dataset

    if not hasattr(rows, "__len__"):
        return rows
    if set(PAIRS) <= set(rows.column_names):
        with bars_if_large(rows):
            rows = rows if "prompt" in rows.column_names else rows.map(extract_prompt)
            rows = unpair_preference_dataset(rows)
    return rows.shuffle(seed=seed)


def datasets_of(kwargs: Mapping[str, Any], kinds: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Return a trainer's data as data sets of one of the `kinds` of columns. Raises `DataError`."""
    made: dict[str, Any] = {}
    for argument, name in (("train_dataset", "train"), ("eval_dataset", "eval")):
        data = kwargs.get(argument)
        if data is None:
            continue
        parts = isinstance(data, Mapping) and not hasattr(data, "column_names")
        made[argument] = (
            {part: _named(rows, kinds, part) for part, rows in data.items()} if parts else _named(data, kinds, name)
        )
    return made


def _named(rows: Any, kinds: Sequence[Sequence[str]], name: str) -> Any:
    with told_of(name):
        return as_dataset(rows, kinds, name)


def as_dataset(rows: Any, kinds: Sequence[Sequence[str]], name: str) -> Any:
    """Return rows as a data set that has all columns of one of the `kinds`; a stream stays one and is not read.

    Raises `DataError`.
    """
    from datasets import Dataset

    if not hasattr(rows, "column_names"):
        check.refuse_empty(rows, name)
        rows = list(rows)
        if VERDICTS in kinds:
            _refuse_labels(rows)  # before Arrow asks for values of one type
        rows = Dataset.from_list(rows)
    columns = rows.column_names
    if columns is not None and not any(set(kind) <= set(columns) for kind in kinds):
        missing = sorted({column for kind in kinds for column in kind} - set(columns))
        given = [column for column in columns if not any(column in kind for kind in kinds)]
        hints = ((column, did_you_mean(column, missing)) for column in given)
        near = next((f"{hint.rstrip('?')} by {column!r}?" for column, hint in hints if hint), "")
        expected = " or ".join(f"columns {', '.join(map(repr, kind))}" for kind in kinds)
        raise DataError(Problem(f"{name} columns", sorted(columns), expected, near))
    if hasattr(rows, "__len__"):
        check.refuse_empty(rows, name)
        if VERDICTS in kinds and "label" in rows.column_names:
            _refuse_labels({"label": label} for label in rows["label"])
    return rows


def _refuse_labels(rows: Iterable[Any]) -> None:
    """Raise `DataError` naming the rows whose verdict is none."""
    remedy = "True where the completion is a good one, False where it is not; without quotes."
    check.refuse(
        Problem(f"row {number}, label", short(row["label"]), "True or False", remedy)
        for number, row in enumerate(rows)
        if isinstance(row, Mapping) and "label" in row and not arguments.on_or_off(row["label"])
    )


def without_long_prompts(rows: Any, column: str, limit: int | None, name: str) -> Any:
    """Return tokenised rows without those whose prompt has more than `limit` tokens; one line says how many.

    Raises `DataError` if none is left.
    """
    if limit is None or rows is None:
        return rows
    with bars_if_large(rows):
        kept = rows.filter(lambda row: len(row[column]) <= limit)
    tell_left_out(rows, kept, name, f"a prompt of more than max_prompt_length={limit} tokens")
    return kept


def tell_left_out(before: Any, after: Any, name: str, why: str) -> None:
    """Say how many rows were left out. Raises `DataError` if none is left. Streams are not counted."""
    if not hasattr(before, "__len__") or not hasattr(after, "__len__"):
        return
    lost = len(before) - len(after)
    if lost == len(before):
        raise DataError(Problem(f"{name} rows", f"all {lost} have {why}", "rows that can be learnt from"))
    if lost:
        print(f"fastft: {name}: {lost} of {len(before)} rows have {why}: left out.")


def tell_cut(rows: Any, parts: Iterable[Sequence[str]], limit: int | None, name: str) -> None:
    """Say how many rows are cut at `limit` tokens; the lengths of a part's columns add up to one sequence."""
    if limit is None or not hasattr(rows, "__len__"):
        return
    lengths = {column: lengths_of(rows, column).tolist() for part in parts for column in part}
    cut = sum(any(sum(lengths[column][row] for column in part) > limit for part in parts) for row in range(len(rows)))
    if cut:
        print(
            f"fastft: {name}: {cut} of {len(rows)} rows are longer than max_length={limit}; what is longer is cut off."
        )


def longest(rows: Any, parts: Iterable[Sequence[str]]) -> int | None:
    """Return the tokens of the longest sequence, None for a stream; parts as for `tell_cut`."""
    if not hasattr(rows, "__len__"):
        return None
    lengths = {column: lengths_of(rows, column).tolist() for part in parts for column in part}
    return max(max(map(sum, zip(*(lengths[column] for column in part), strict=True))) for part in parts)


def _columns(rows: Any) -> list[str]:
    columns = getattr(rows, "column_names", None)
    first = next(iter(rows), {}) if columns is None else {}
    return list(columns or first)


def _turns(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }
