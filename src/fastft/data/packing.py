"""Rows laid end to end: first-fit-decreasing into rows of `max_length` tokens, without losing or cutting any.

First-fit-decreasing: rows from the longest to the shortest, each into the first packed row that has room for it. It
needs at most 11/9 of the fewest possible packed rows, and 6/9 of one more (Dosa 2007).
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen

from fastft.data import columns, pipeline
from fastft.data.check import refuse, refuse_empty
from fastft.errors import Problem, UsageError

WINDOW = 10_000  # rows of a stream that are packed together
IN_MEMORY = 50_000_000  # tokens: a packed set with more of them is kept on disk
GATHERED = 1_000_000  # tokens that are laid end to end at a time


@frozen(eq=False)
class Packing:
    """Which row goes where: packed row `i` holds the rows `order[ends[i - 1]:ends[i]]` in this order (int64 arrays).

    `lengths` are those of the rows, in tokens; `longest` is the longest of them.
    """

    order: np.ndarray
    ends: np.ndarray
    lengths: np.ndarray
    max_length: int

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[np.ndarray]:
        start = 0
        for end in self.ends.tolist():
            yield self.order[start:end]
            start = end

    def statistics(self) -> dict[str, Any]:
        """Return `rows`, `packed_rows`, `tokens`, `max_length`, and the shares of them that are filled.

        `fill`: tokens over the room of all packed rows. `fill_padded`: what it would be if every row were padded to
        the longest.
        """
        tokens, longest = int(self.lengths.sum()), int(self.lengths.max(initial=0))
        return {
            "rows": len(self.lengths),
            "packed_rows": len(self),
            "tokens": tokens,
            "max_length": self.max_length,
            "fill": tokens / max(1, len(self) * self.max_length),
            "fill_padded": tokens / max(1, len(self.lengths) * longest),
        }


def pack_lengths(lengths: Sequence[int] | np.ndarray, max_length: int) -> Packing:
    """Pack rows of these `lengths` (tokens) into rows of at most `max_length`, first-fit-decreasing.

    Rows of one length are put in together: packed rows that stand side by side and have the same room are a run, and a
    run takes as many rows of a length as it has room for in one operation. The work grows with the square of the number
    of different lengths and not with that of rows. The same lengths give the same packing.
    Raises `UsageError` for a `max_length` below 1, `DataError` for rows that are empty or longer than it.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if max_length < 1:
        raise UsageError(Problem("max_length", max_length, "at least 1"))
    wrong = np.flatnonzero((sizes < 1) | (sizes > max_length))
    remedy = "Cut rows to max_length before they are packed, raise it, or leave these rows out."
    refuse(Problem(f"row {i}", f"{sizes[i]} tokens", f"1 to max_length={max_length}", remedy) for i in wrong.tolist())
    order = np.argsort(-sizes, kind="stable")
    values, counts = np.unique(sizes, return_counts=True)
    first, many, room = (np.zeros(0, np.int64) for _ in range(3))  # the runs: first packed row, how many, room in each
    made, placed = 0, []
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        open_ = room >= values[0]
        first, many, room = first[open_], many[open_], room[open_]
        each = room // length
        new = -(-max(0, count - int((each * many).sum())) // (max_length // length))
        first, many, room = np.append(first, made), np.append(many, new), np.append(room, max_length)
        made += new
        first, many, room, part = _put(first, many, room, length, count)
        placed.append(part)
    bins = np.concatenate(placed) if placed else np.zeros(0, np.int64)
    return Packing(
        order[np.argsort(bins, kind="stable")], np.cumsum(np.bincount(bins, minlength=made)), sizes, max_length
    )


def _put(
    first: np.ndarray, many: np.ndarray, room: np.ndarray, length: int, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Put `count` rows of `length` into the runs from the left; return the runs, and each row's packed row."""
    each = room // length
    whole = np.minimum(many, np.maximum(0, count - (np.cumsum(each * many) - each * many)) // np.maximum(each, 1))
    whole[each == 0] = 0
    rest = count - int((whole * each).sum())
    cut = int(np.argmax((whole < many) & (each > 0))) if rest else -1  # the run whose next packed row gets the rest
    pieces = []
    for shift, number, taken in (
        (np.zeros_like(many), whole, each),
        (whole, np.where(np.arange(len(many)) == cut, 1, 0), np.full_like(many, rest)),
        (whole + (np.arange(len(many)) == cut), many - whole - (np.arange(len(many)) == cut), np.zeros_like(many)),
    ):
        pieces.append(np.stack([first + shift, number, room - taken * length, taken]))
    runs = np.stack(pieces, axis=2).reshape(4, -1)  # the three parts of each run, in its place
    runs = runs[:, runs[1] > 0]
    got = runs[:, runs[3] > 0]
    bins = np.repeat(got[0], got[1]) + _counted(got[1])
    return runs[0], runs[1], runs[2], np.repeat(bins, np.repeat(got[3], got[1]))


def _counted(numbers: np.ndarray) -> np.ndarray:
    """Return 0, 1, ... n - 1 for each n of `numbers`, end to end."""
    ends = np.cumsum(numbers)
    return np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - numbers, numbers)


def pack(dataset: Any, max_length: int) -> tuple[Any, dict[str, Any]]:
    """Pack a `datasets.Dataset` with `input_ids` (and `labels`); return the packed one and `Packing.statistics`.

    A packed row has the `input_ids` and `labels` of its documents end to end, and their lengths in `seq_lengths`, from
    which the collator makes positions that start again at 0 in every document. Raises what `pack_lengths` raises.
    """
    from datasets import Dataset

    refuse_empty(dataset)
    packing = pack_lengths(columns.lengths(dataset), max_length)
    statistics = packing.statistics()
    if statistics["tokens"] <= IN_MEMORY:
        import pyarrow

        return Dataset(pyarrow.concat_tables(_tables(dataset, packing)).combine_chunks()), statistics
    path = pipeline.cache_folder() / f"{pipeline.rows_hash(dataset)[:32]}-packed-{max_length}.arrow"
    if not path.exists():
        _write(_tables(dataset, packing), path)
    return Dataset.from_file(str(path)), statistics


def _tables(dataset: Any, packing: Packing) -> Iterator[Any]:
    """Yield the packed rows as `pyarrow.Table`s of about `GATHERED` tokens."""
    labelled = "labels" in dataset.column_names
    names = ["input_ids", "labels"] if labelled else ["input_ids"]
    source = dataset.select_columns(names).with_format("arrow")
    sizes = packing.lengths[packing.order]
    before = np.concatenate([[0], np.cumsum(sizes)])[np.concatenate([[0], packing.ends])]
    cuts = np.unique(np.searchsorted(before, np.arange(0, before[-1] + GATHERED, GATHERED)).clip(max=len(packing)))
    ends = np.concatenate([[0], packing.ends])
    for low, high in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        rows = packing.order[ends[low] : ends[high]]
        yield _laid(source.select(rows)[:], sizes[ends[low] : ends[high]], np.diff(ends[low : high + 1]))


def _laid(table: Any, sizes: np.ndarray, counts: np.ndarray) -> Any:
    """Return rows in `table`, which have `sizes` tokens, as packed rows of `counts` documents each."""
    import pyarrow

    documents = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    tokens = np.concatenate([[0], np.cumsum(sizes)])[documents].astype(np.int32)
    ids, _ = columns.flat(table["input_ids"])
    labels = columns.flat(table["labels"])[0] if "labels" in table.column_names else ids
    return pyarrow.table(
        {
            "input_ids": pyarrow.ListArray.from_arrays(tokens, ids),
            "labels": pyarrow.ListArray.from_arrays(tokens, labels),
            "seq_lengths": pyarrow.ListArray.from_arrays(documents, sizes),
        }
    )


def _write(tables: Iterator[Any], path: Path) -> None:
    """Write tables to an Arrow file that is there whole or not at all."""
    import os

    from datasets.arrow_writer import ArrowWriter

    part = path.with_suffix(f".{os.getpid()}.part")
    with ArrowWriter(path=str(part)) as writer:
        for table in tables:
            writer.write_table(table)
        writer.finalize()
    part.replace(path)


def pack_stream(dataset: Any, max_length: int) -> Any:
    """Return a `datasets.IterableDataset` that packs another one with `labels` as it is read, `WINDOW` rows at once."""

    def packed(batch: Mapping[str, Any]) -> dict[str, Any]:
        ids, labels = batch["input_ids"], batch["labels"]
        rows = [rows.tolist() for rows in pack_lengths([len(row) for row in ids], max_length)]
        return {
            "input_ids": [[token for row in group for token in ids[row]] for group in rows],
            "labels": [[label for row in group for label in labels[row]] for group in rows],
            "seq_lengths": [[len(ids[row]) for row in group] for group in rows],
        }

    names = ["input_ids", "labels"]
    return dataset.select_columns(names).map(packed, batched=True, batch_size=WINDOW, remove_columns=names)
