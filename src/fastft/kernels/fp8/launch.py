"""Launch settings of the fp8 kernels: data, chosen by functions of the sizes."""

from attrs import frozen

from fastft.kernels.rows import ceil_div, next_power_of_2

PARTS = 3
"""Most matrices that one launch quantises side by side."""
MAX_RANK = 64
"""Largest rank that the low-rank kernel adds: beyond it a tile's factors do not fit the registers."""


@frozen
class RowLaunch:
    """A program of `warps` warps a row. stream: rows pass the L1 cache by, which the columns' factors then stay in."""

    warps: int
    stream: bool = True


@frozen
class WeightLaunch:
    """Tiles of `rows` by `columns`; `splits` programs share the columns of one row of tiles, `warps` warps each."""

    rows: int
    columns: int
    splits: int
    warps: int = 4


@frozen
class LowRankLaunch:
    """Tiles of `rows` by `columns`, `warps` warps each."""

    rows: int = 64
    columns: int = 128
    warps: int = 4


def row_launch(width: int) -> RowLaunch:
    """Settings for rows of `width` in all: 16 values a thread, or as many more as a block of 32 warps leaves to it."""
    return RowLaunch(max(4, min(32, next_power_of_2(max(1, width)) // 512)))


def weight_launch(n: int, k: int, transposed: bool, processors: int) -> WeightLaunch:
    """Settings for a weight [n, k] on a device with so many multiprocessors: about four programs for each.

    Transposed, rows of the tile become runs in memory, which are to be long; else its columns are.
    """
    rows, columns = (64, 128) if transposed else (16, 512)
    wanted = ceil_div(4 * processors, ceil_div(n, rows))
    return WeightLaunch(rows, columns, max(1, min(wanted, ceil_div(k, columns))))
