"""Columns of token ids as arrays: lengths and counts over a whole set, a batch at a time and without Python lists."""

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
from attrs import frozen

from fastft.data.mask import IGNORE

BATCH = 20_000
FIRST = 1_000  # rows at once where the first ones mostly tell


@frozen
class Columns:
    """A batch of rows: all ids and labels end to end (int32), and each row's number of tokens (int64).

    `labels` are the ids where the set has no labels.
    """

    ids: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray

    @property
    def starts(self) -> np.ndarray:
        """The index of each row's first token."""
        return np.cumsum(self.lengths) - self.lengths

    def per_row(self, values: np.ndarray) -> np.ndarray:
        """Return the sum of `values`, one for each token, over each row (int64)."""
        whole = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
        return whole[self.starts + self.lengths] - whole[self.starts]

    def places(self) -> np.ndarray:
        """Return the place of each token in its row (int64)."""
        return np.arange(len(self.ids)) - np.repeat(self.starts, self.lengths)

    def bearing(self) -> np.ndarray:
        """Return which tokens bear loss (bool): those with a label, a row's first token excepted: none predicts it."""
        found = self.labels != IGNORE
        found[self.starts[self.lengths > 0]] = False
        return found


def columns(dataset: Any, size: int = BATCH) -> Iterator[Columns]:
    """Yield a `datasets.Dataset`'s `input_ids` and `labels` in batches of `size` rows.

    Rows whose labels are not as many as their ids are the caller's to refuse first.
    """
    labelled = "labels" in dataset.column_names
    names = ["input_ids", "labels"] if labelled else ["input_ids"]
    for table in dataset.select_columns(names).with_format("arrow").iter(size):
        ids, lengths = flat(table["input_ids"])
        yield Columns(ids, flat(table["labels"])[0] if labelled else ids, lengths)


def flat(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of a list column end to end (int32), and the length of each list (int64)."""
    array = column.combine_chunks()
    if hasattr(array, "chunks"):
        array = array.chunk(0)
    lengths = np.nan_to_num(array.value_lengths().to_numpy(zero_copy_only=False)).astype(np.int64)
    return array.flatten().to_numpy(zero_copy_only=False).astype(np.int32, copy=False), lengths


def lengths(dataset: Any, column: str = "input_ids") -> np.ndarray:
    """Return the number of tokens of every row of a `datasets.Dataset` (int64), in a column of token ids."""
    parts = [flat(table[column])[1] for table in dataset.select_columns([column]).with_format("arrow").iter(BATCH)]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def loss_bearing(dataset: Any, limit: int | None = None) -> np.ndarray:
    """Return the number of loss-bearing tokens of every row (int64), among its first `limit` where that is given."""
    parts = [
        batch.per_row(batch.bearing() if limit is None else batch.bearing() & (batch.places() < limit))
        for batch in columns(dataset)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def any_trained(dataset: Any, ids: Collection[int]) -> bool:
    """Return whether a token of `ids` bears loss anywhere; reads no further than the first few rows that tell."""
    wanted = np.asarray(sorted(ids), dtype=np.int32)
    return any(bool((np.isin(batch.ids, wanted) & batch.bearing()).any()) for batch in columns(dataset, FIRST))


def present_ids(dataset: Any, ids: Collection[int]) -> int:
    """Return how many tokens of `ids` there are in the whole set, those that begin a row excepted."""
    wanted = np.asarray(sorted(ids), dtype=np.int32)
    count = 0
    for batch in columns(dataset):
        found = np.isin(batch.ids, wanted)
        found[batch.starts[batch.lengths > 0]] = False
        count += int(found.sum())
    return count


def open_ended(dataset: Any) -> int:
    """Return how many rows end with a token that bears loss."""
    count = 0
    for batch in columns(dataset):
        last = (batch.starts + batch.lengths - 1)[batch.lengths > 0]
        count += int(batch.bearing()[last].sum())
    return count


def suspects(dataset: Any) -> list[int]:
    """Return the numbers of rows without tokens, with labels of another length, or without anything to learn."""
    labelled = "labels" in dataset.column_names
    names = ["input_ids", "labels"] if labelled else ["input_ids"]
    found, first = [], 0
    for table in dataset.select_columns(names).with_format("arrow").iter(BATCH):
        ids, sizes = flat(table["input_ids"])
        labels, others = flat(table["labels"]) if labelled else (ids, sizes)
        batch = Columns(labels, labels, others)
        wrong = (sizes == 0) | (others != sizes) | (batch.per_row(batch.bearing()) == 0)
        found.extend((first + np.flatnonzero(wrong)).tolist())
        first += len(sizes)
    return found
