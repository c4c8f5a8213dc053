"""What a reward returned, checked: a number or None for each row, and the rows for which it is neither."""

import math
from collections.abc import Sequence
from typing import Any

from attrs import field, frozen


@frozen
class Failure:
    """A row that a reward did not score, and why; `error` is the exception that it raised, None if it raised none."""

    row: int
    why: str
    error: Exception | None = field(default=None, eq=False, repr=False)


def checked(returned: Any, rows: int) -> tuple[list[float | None], list[Failure]]:
    """Return the rewards as numbers with None for those that are missing, and the failures among these.

    None is the reward's own word for a row that it does not score. NaN, infinities and what is no number are failures,
    and so is every row where the number of rewards is not that of the rows.
    """
    if not isinstance(returned, Sequence) and callable(getattr(returned, "tolist", None)):
        returned = returned.tolist()  # tensors and arrays
    if isinstance(returned, str) or not isinstance(returned, Sequence):
        return _all_fail(rows, f"it returned {_short(returned)} instead of a list of {rows} numbers")
    if len(returned) != rows:
        return _all_fail(rows, f"it returned {len(returned)} rewards for {rows} rows")
    rewards: list[float | None] = []
    failures = []
    for row, value in enumerate(returned):
        number = _number(value)
        if value is not None and (number is None or not math.isfinite(number)):
            failures.append(Failure(row, f"it returned {_short(value)}"))
            number = None
        rewards.append(number)
    return rewards, failures


def _all_fail(rows: int, why: str) -> tuple[list[float | None], list[Failure]]:
    return [None] * rows, [Failure(row, why) for row in range(rows)]


def _number(value: Any) -> float | None:
    if value is None or isinstance(value, str | bytes):
        return None
    try:
        return float(value)  # bools, numbers of numpy, tensors of one number
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
