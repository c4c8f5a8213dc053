"""Is there something to learn in every row? Asked before training, answered with row numbers."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from attrs import evolve

from fastft.errors import DataError, Problem

SHOWN = 10


def check_tokenised(dataset: Any, name: str = "train") -> None:
    """Refuse a data set of token ids that is empty or has rows without tokens or without anything to learn.

    Raises `DataError`. A stream (without length) is not read.
    """
    if not hasattr(dataset, "__len__"):
        return
    refuse_empty(dataset, name)
    columns = dataset.column_names
    labelled = "labels" in columns
    problems = []
    for start in range(0, len(dataset), 1000):
        batch = dataset.select(range(start, min(start + 1000, len(dataset))))[:]
        for offset, ids in enumerate(batch["input_ids"]):
            labels = batch["labels"][offset] if labelled else ids
            problem = row_problem(f"{name} row {start + offset}", ids, labels)
            if problem:
                problems.append(problem)
    refuse(problems)


def refuse_empty(dataset: Sequence[Any], name: str = "") -> None:
    """Raise `DataError` for a data set without rows."""
    if len(dataset) == 0:
        raise DataError(
            Problem(f"{name} data".lstrip(), "0 rows", "at least one row", "Check the path or the filter it came from.")
        )


def row_problem(where: str, ids: Sequence[int], labels: Sequence[int]) -> Problem | None:
    """Return what is wrong with a tokenised row: no tokens, labels of another length, or nothing to learn."""
    if len(ids) == 0:
        return Problem(f"{where}, input_ids", [], "at least one token", "Remove the row or give it text.")
    if len(labels) != len(ids):
        return Problem(f"{where}, labels", f"{len(labels)} labels", f"as many as tokens ({len(ids)})")
    if all(label == -100 for label in labels[1:]):
        remedy = "The first token is never predicted; remove the row, or train on more of it (train_on='all')."
        return Problem(
            f"{where}, labels", "nothing to learn", "at least one label that is not -100 after the first token", remedy
        )
    return None


def refuse(problems: Iterable[Problem | str]) -> None:
    """Raise `DataError` with the first problems and the number of the others, if there are any."""
    problems = list(problems)
    if len(problems) > SHOWN:
        problems = [*problems[:SHOWN], f"and {len(problems) - SHOWN} more rows"]
    if problems:
        raise DataError(*problems)


def named(problem: Problem | str, name: str) -> Problem | str:
    """Return a problem of some rows with the name of the data they are in: "row 3" is "eval row 3"."""
    about_rows = isinstance(problem, Problem) and problem.where.startswith(("row", "data"))
    return evolve(problem, where=f"{name} {problem.where}") if about_rows else problem


def check_arguments(kwargs: Mapping[str, Any], text_field: str = "text") -> None:
    """Check the data sets that a trainer is given: they are data sets, with rows, and with text. Raises `DataError`."""
    for name in ("train_dataset", "eval_dataset"):
        data = kwargs.get(name)
        for part, rows in data.items() if isinstance(data, Mapping) else [(name, data)]:
            if isinstance(rows, list | tuple):
                remedy = "datasets.Dataset.from_list(rows) makes one, fastft.chat_dataset(rows, tokenizer) token ids."
                raise DataError(Problem(part, type(rows).__name__, "a datasets.Dataset", remedy))
            if hasattr(rows, "column_names") and hasattr(rows, "__len__"):
                refuse_empty(rows, part)
                if "input_ids" in rows.column_names:
                    check_tokenised(rows, part)
                elif kwargs.get("formatting_func") is None:
                    _refuse_without_text(rows, part, text_field)
    if "train_dataset" in kwargs and kwargs["train_dataset"] is None:
        raise DataError(Problem("train_dataset", None, "a datasets.Dataset"))


def _refuse_without_text(rows: Any, name: str, text_field: str) -> None:
    """Raise `DataError` naming the rows whose text, messages or completion is missing or empty."""
    problems = []
    for field in dict.fromkeys((text_field, "messages", "prompt", "completion")):
        if field not in rows.column_names:
            continue
        for index, value in enumerate(rows[field]):
            if value is None or (field != "prompt" and len(value.strip() if isinstance(value, str) else value) == 0):
                where = f"{name} row {index}, {field}"
                problems.append(Problem(where, value, "a text that is not empty", "Remove the row or give it text."))
    refuse(problems)


def refuse_overlong(train: Any, limit: int) -> None:
    """Raise `DataError` naming the rows with more than `limit` tokens."""
    lengths = [(index, len(ids)) for index, ids in enumerate(train["input_ids"]) if len(ids) > limit]
    remedy = "Raise max_length, or cut the rows yourself: chat_dataset(..., max_length=..., overlong='truncate')."
    refuse(
        Problem(f"train row {index}", f"{size} tokens", f"at most max_length={limit}", remedy)
        for index, size in lengths
    )
