"""One function over the rows of a list, a data set or a stream; what is wrong with rows is told together."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from fastft.data.check import Mistakes
from fastft.errors import DataError, Problem, short

Row = dict[str, Any]
Change = Callable[[str, Any], tuple[Row, list[Problem]]]
REVISION = 1  # of what the changes do, part of their fingerprint in the cache of `datasets`
_PROBLEMS = "__problems__"


def change_rows(
    rows: Any,
    change: Change,
    features: Mapping[str, Any] | None = None,
    removed: Sequence[str] = (),
    num_proc: int | None = None,
    batch_size: int = 1000,
) -> Any:
    """Apply `change("row 3", row) -> (row, problems)` to every row.

    A list gives a list; a `Dataset` a mapped one with the columns `features`, cached by `datasets`; an
    `IterableDataset` one that changes rows as they are read, without the columns `removed`.

    Raises `DataError` with the first `check.SHOWN` mistakes and the number of rows that have some; in a stream, when
    the row is reached.
    """
    if hasattr(rows, "column_names") and hasattr(rows, "__len__"):
        return _change_dataset(rows.with_format(None), change, dict(features or {}), num_proc, batch_size)
    if hasattr(rows, "column_names"):
        there = rows.column_names
        gone = [name for name in removed if there is None or name in there]
        return rows.map(partial(_stream_row, change=change), with_indices=True, remove_columns=gone or None)
    mistakes, made = Mistakes(), []
    for index, row in enumerate(rows):
        changed, problems = change(f"row {index}", row)
        mistakes.add(problems)
        made.append(changed)
    mistakes.refuse(len(made))
    return made


def _stream_row(row: Any, index: int, change: Change) -> Row:
    made, problems = change(f"row {index}", row)
    if problems:
        raise DataError(*problems)
    return made


def _change_dataset(rows: Any, change: Change, features: dict[str, Any], num_proc: int | None, batch_size: int) -> Any:
    from datasets import Features, Value

    made = rows.map(
        partial(_map_batch, change=change, columns=list(features)),
        batched=True,
        batch_size=batch_size,
        with_indices=True,
        remove_columns=rows.column_names,
        features=Features({**features, _PROBLEMS: Value("string")}),
        num_proc=num_proc,
        fn_kwargs={"revision": REVISION},
        desc="Reading rows",
    )
    mistakes, column = Mistakes(), made.data.column(_PROBLEMS)
    for told in column.drop_null() if column.null_count < len(column) else ():
        mistakes.add([Problem(*problem) for problem in json.loads(told.as_py())])
    mistakes.refuse(len(made))
    return made.remove_columns(_PROBLEMS)


def _map_batch(
    batch: Mapping[str, list[Any]], indices: list[int], change: Change, columns: Sequence[str], revision: int
) -> dict[str, list[Any]]:
    """Change a batch of columns; the mistakes of a row go into a column of their own, to be told together."""
    made: dict[str, list[Any]] = {column: [] for column in (*columns, _PROBLEMS)}
    for offset, index in enumerate(indices):
        row = {column: values[offset] for column, values in batch.items()}
        row, problems = change(f"row {index}", row)
        told = [(problem.where, problem.value, problem.expected, problem.remedy) for problem in problems]
        for column in columns:
            made[column].append(None if problems else row.get(column))
        made[_PROBLEMS].append(json.dumps(told, default=lambda value: short(repr(value))) if told else None)
    return made


def turns_feature(given: Any = None, keys: tuple[str, str] = ("role", "content")) -> Any:
    """Return the feature of a column of messages: JSON, so that a message has the keys it was written with alone.

    `given` is the column's own, which stays, role and content under their usual names, where messages hold what JSON
    does not: images, sound, bytes.
    """
    from datasets import Json, List

    inner = given[0] if isinstance(given, list) else getattr(given, "feature", None)
    if not isinstance(inner, dict) or not _holds_media(inner):
        return List(Json())
    names = dict(zip(keys, ("role", "content"), strict=True))
    return List({names.get(name, name): part for name, part in inner.items()})


def _holds_media(feature: Any) -> bool:
    if isinstance(feature, dict):
        return any(_holds_media(part) for part in feature.values())
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    if inner is not None:
        return _holds_media(inner)
    known = type(feature).__name__ in ("Value", "Json", "ClassLabel")
    return not known or "binary" in str(getattr(feature, "dtype", ""))
