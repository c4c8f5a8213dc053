"""Launch settings of the gated feed-forward's LoRA kernels: data, chosen by a function of the sizes."""

from attrs import frozen

from fastft.kernels.rows import ceil_div, next_power_of_2

MAX_RANK = 32
"""Largest rank whose products the kernels make in passing: beyond it a tile's sums do not fit the registers."""

THREE = 168
"""Registers a thread with which three programs of 128 threads have room among a multiprocessor's 65,536."""


@frozen
class Launch:
    """Tiles of `rows` by `columns`; `splits` programs share the columns of one row of tiles, `warps` warps each.

    stages: tiles that are loaded ahead. registers: the most that a thread may have, None for as many as it wants.
    """

    rows: int = 64
    columns: int = 64
    splits: int = 4
    warps: int = 4
    stages: int = 3
    registers: int | None = None


def launch(count: int, width: int, processors: int, rank: int = 16, backward: bool = False) -> Launch:
    """Settings for `count` rows of `width` on a device with so many multiprocessors: at least eight programs for each.

    The programs of one row of tiles run side by side: a power of two of them, where the width has as many, reads and
    writes whole pages of memory.
    rank: the largest of the adapters'. Above 16 the backward loads one tile less ahead: with three, its tiles and the
    adapters' take so much shared memory (143 of 227 KB on sm_90) that a multiprocessor holds one program, not two. Up
    to 16 the forward is held to `THREE` registers a thread, which are enough: with 8 bits it would take 226, and a
    multiprocessor would hold two programs, not three.
    """
    default = Launch()
    wanted = ceil_div(8 * processors, max(1, ceil_div(count, default.rows)))
    splits = max(1, min(next_power_of_2(wanted), ceil_div(width, 4 * default.columns)))
    stages = default.stages - (backward and rank > 16)
    return Launch(splits=splits, stages=stages, registers=None if backward or rank > 16 else THREE)
