"""The progress bars of `datasets`: shown where there is something to wait for."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastft.data.pipeline import LARGE


@contextmanager
def bars_if_large(*data: Any) -> Iterator[None]:
    """Show no bars while the block runs unless some of the `data` have `LARGE` rows, or do not say how many.

    `data` are rows of any kind, several by name, or None. A switch that the user has set stays as it is.
    """
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hide = not (are_progress_bars_disabled() or _always() or any(map(_large, data)))
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()


def _always() -> bool:
    """Say whether the user's environment asks for bars, which nothing can hide then."""
    from datasets import config

    return config.HF_DATASETS_DISABLE_PROGRESS_BARS is False


def _large(rows: Any) -> bool:
    if rows is None:
        return False
    if isinstance(rows, Mapping) and not hasattr(rows, "column_names"):
        return any(map(_large, rows.values()))
    return not hasattr(rows, "__len__") or len(rows) >= LARGE
