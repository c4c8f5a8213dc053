"""Batches that are not whole: `dataloader_drop_last` leaves them out of training, never out of an evaluation."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastft.errors import Problem, UsageError


def refuse_none(args: Any, rows: Any) -> None:
    """Raise `UsageError` if `dataloader_drop_last` leaves nothing of `rows`, as they are trained on, in any process."""
    if not args.dataloader_drop_last or not hasattr(rows, "__len__"):
        return
    batch = args.train_batch_size * args.world_size
    if len(rows) < batch:
        remedy = "Leave it out, or make batches smaller."
        expected = f"at least {batch:,} rows, a whole batch; there are {len(rows):,}"
        raise UsageError(Problem(f"{type(args).__name__} dataloader_drop_last", True, expected, remedy))


@contextmanager
def all_kept(args: Any) -> Iterator[None]:
    """Have a loader made in the block hand out the last rows, too: means of an evaluation are over all of them."""
    dropped, args.dataloader_drop_last = args.dataloader_drop_last, False
    try:
        yield
    finally:
        args.dataloader_drop_last = dropped
