"""Launch settings of the gated activation kernels: data, chosen by a function of the sizes."""

from attrs import frozen

from fastft.kernels.rows import ceil_div, next_power_of_2

# Elements of one program: 8 per thread of 4 warps, one 16-byte load per input of a 16-bit dtype.
TILE = 1024


@frozen
class Launch:
    """Tiles of `rows` by `block`, `segments` of them side by side, `programs` in all, with `warps` warps each."""

    rows: int
    block: int
    segments: int
    warps: int
    programs: int


def launch(count: int, width: int) -> Launch:
    """Settings for `count` rows of `width`; forward and backward share them."""
    block = min(next_power_of_2(width), TILE)
    rows = max(1, min(TILE // block, next_power_of_2(max(count, 1))))
    segments = ceil_div(width, block)
    return Launch(rows, block, segments, max(1, rows * block // 256), ceil_div(count, rows) * segments)
