"""What cutting rows to a length would lose: rows that are cut, rows left with nothing to learn, loss-bearing tokens."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from attrs import asdict, frozen

from fastft.data import columns
from fastft.data.check import whole_number
from fastft.errors import Problem, UsageError, short

LENGTHS = (1024, 2048, 4096, 8192)


@frozen
class Loss:
    """What is lost of a set when its rows are cut at their end to `length` tokens."""

    length: int
    rows_cut: int
    rows_lost: int
    tokens_lost: int
    bearing_lost: int


@frozen
class TruncationTable:
    """The losses at several lengths, beside the whole set's `rows`, `tokens` and loss-bearing tokens (`bearing`).

    `longest` is its longest row. It prints itself.
    """

    rows: int
    tokens: int
    bearing: int
    longest: int
    losses: tuple[Loss, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        head = ("max_length", "rows cut", "rows left with nothing to learn", "loss-bearing tokens lost")
        lines = [head]
        for loss in self.losses:
            share = loss.bearing_lost / max(1, self.bearing)
            lost = f"{loss.bearing_lost:,} ({share:.1%})" if loss.bearing_lost else "0"
            lines.append((f"{loss.length:,}", f"{loss.rows_cut:,}", f"{loss.rows_lost:,}", lost))
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        shown = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        sizes = f"{self.rows:,} rows (longest {self.longest:,} tokens), {self.tokens:,} tokens"
        whole = f"{sizes}, {self.bearing:,} of them bear loss"
        return "\n".join([whole, *shown])


def check_lengths(lengths: Any, name: str) -> None:
    """Raise `UsageError` where `lengths`, an argument of the function `name`, are no whole numbers of at least 1."""
    listed = isinstance(lengths, Iterable) and not isinstance(lengths, str | bytes)
    wrong = [length for length in lengths if not whole_number(length) or length < 1] if listed else lengths
    if not listed or wrong:
        raise UsageError(f"{name}: lengths are whole numbers of tokens of at least 1, a list of them, got {wrong!r}")


def truncation_table(dataset: Any, lengths: Sequence[int] = LENGTHS) -> TruncationTable:
    """Return what a `datasets.Dataset` of token ids (`chat_dataset`'s result) would lose when cut to each of `lengths`.

    A row is lost if it had something to learn and has nothing left. Raises `UsageError` for a length below 1, and for
    what is no data set of token ids.
    """
    check_lengths(lengths, "truncation_table")
    if "input_ids" not in (getattr(dataset, "column_names", None) or ()) or not hasattr(dataset, "__len__"):
        remedy = "fastft.chat_dataset(rows, tokenizer) makes one."
        expected = "a datasets.Dataset with 'input_ids'"
        raise UsageError(Problem("truncation_table: dataset", short(type(dataset).__name__), expected, remedy))
    cut, lost, tokens, bearing_lost = (dict.fromkeys(lengths, 0) for _ in range(4))
    rows = whole = bearing = longest = 0
    for batch in columns.columns(dataset):
        marks = batch.bearing()
        per_row = batch.per_row(marks)
        rows, whole, bearing = rows + len(batch.lengths), whole + len(batch.ids), bearing + int(per_row.sum())
        longest = max(longest, int(batch.lengths.max(initial=0)))
        place = batch.places()
        for length in lengths:
            kept = batch.per_row(marks & (place < length))
            cut[length] += int((batch.lengths > length).sum())
            lost[length] += int(((kept == 0) & (per_row > 0)).sum())
            tokens[length] += int(np.maximum(0, batch.lengths - length).sum())
            bearing_lost[length] += int((per_row - kept).sum())
    losses = tuple(Loss(length, cut[length], lost[length], tokens[length], bearing_lost[length]) for length in lengths)
    return TruncationTable(rows, whole, bearing, longest, losses)
