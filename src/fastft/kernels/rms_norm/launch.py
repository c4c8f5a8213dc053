"""Launch settings of the RMSNorm kernels: data, chosen by a function of the sizes."""

from attrs import frozen

from fastft.kernels.rows import ceil_div, next_power_of_2

# The widest row that one program holds in registers; wider ones run on the reference.
MAX_WIDTH = 65536


@frozen
class Launch:
    """A grid of `programs`, each doing `iterations` tiles of `rows` rows by `block` columns with `warps` warps."""

    rows: int
    block: int
    warps: int
    iterations: int
    programs: int


def tile(count: int, width: int, elements: int) -> tuple[int, int, int]:
    """Return (rows, block, warps) of a tile that holds whole rows and about `elements` elements.

    Sixteen elements per thread are two 16-byte loads of a 16-bit dtype, enough to keep memory busy.
    """
    block = next_power_of_2(width)
    rows = max(1, min(elements // block, next_power_of_2(max(count, 1))))
    warps = max(1, min(rows * block // 512, 16 if block <= 16384 else 32))
    return rows, block, warps


def forward_launch(count: int, width: int) -> Launch:
    """Settings for `count` rows of `width`: every tile its own program."""
    rows, block, warps = tile(count, width, 2048)
    return Launch(rows, block, warps, 1, ceil_div(count, rows))


def backward_launch(count: int, width: int, processors: int, need_weight: bool) -> Launch:
    """As forward; with a weight gradient, programs do several tiles so that few partial sums are written.

    `iterations` is a power of two, being a compile-time constant of the kernel: few variants whatever the batch.
    """
    rows, block, warps = tile(count, width, 2048)
    tiles = ceil_div(count, rows)
    iterations = 1
    if need_weight:
        wanted = max(1, tiles // (processors * max(1, 16 // warps)))
        iterations = next_power_of_2(wanted + 1) // 2
    return Launch(rows, block, warps, iterations, ceil_div(tiles, iterations))
