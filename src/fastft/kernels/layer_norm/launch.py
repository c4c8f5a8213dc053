"""Launch settings of the LayerNorm kernels: data, chosen by a function of the sizes."""

from fastft.kernels.rms_norm.launch import MAX_WIDTH as MAX_WIDTH
from fastft.kernels.rms_norm.launch import Launch, tile
from fastft.kernels.rows import ceil_div, next_power_of_2

# What CUDA allows along the second axis of a grid, which counts heads.
MAX_HEADS = 65535


def forward_launch(count: int, width: int) -> Launch:
    """Settings for `count` rows (per head) of `width`: every tile its own program."""
    rows, block, warps = tile(count, width, 2048)
    return Launch(rows, block, warps, 1, ceil_div(count, rows))


def backward_launch(count: int, width: int, heads: int, processors: int, need_affine: bool) -> Launch:
    """As forward; with weight or bias gradients, programs do several tiles so that few partial sums are written."""
    rows, block, warps = tile(count, width, 2048)
    tiles = ceil_div(count, rows)
    iterations = 1
    if need_affine:
        wanted = max(1, tiles * heads // (processors * max(1, 16 // warps)))
        iterations = min(next_power_of_2(wanted + 1) // 2, next_power_of_2(tiles))
    return Launch(rows, block, warps, iterations, ceil_div(tiles, iterations))
