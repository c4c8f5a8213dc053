"""The formats of super-blocks of 256 weights with scales quantised in turn: q2_k, q3_k, q4_k, q5_k and q6_k.

A super-block is a column of x [256, blocks]: 8 groups of 32 weights or 16 groups of 16. q2_k, q4_k and q5_k give each
group a scale and an offset, q3_k and q6_k a scale. The groups' scales (and offsets) are integers that share one fp16
scale each; the levels are settled anew once those are rounded.
"""

from collections.abc import Callable

import torch
from attrs import frozen
from torch import Tensor

from fastft.export.gguf.quants.arithmetic import (
    TINY,
    as_half,
    divide,
    half,
    half_bytes,
    largest,
    nearest_int,
    ordered_sum,
    square_root,
)
from fastft.export.gguf.quants.packing import (
    pack_bits,
    pack_nibbles,
    pack_pairs,
    pack_signed_six,
    pack_six,
    unpack_bits,
    unpack_nibbles,
    unpack_pairs,
    unpack_signed_six,
    unpack_six,
)
from fastft.export.gguf.quants.search import (
    PLAIN,
    Affine,
    Grid,
    Steps,
    affine_search,
    descent,
    positive_search,
    symmetric_search,
)

BLOCK = 256
# The scales that are tried without and with an importance matrix.
GRIDS = {
    "q2_k": (Grid(3, -0.5, 0.1, 15, absolute=True), Grid(3, -0.9, 0.05, 36)),
    "q4_k": (Grid(15, -1.0, 0.1, 20), Grid(15, -0.9, 0.05, 36)),
    "q5_k": (Grid(31, -0.5, 0.1, 15), Grid(31, -0.9, 0.05, 36)),
}


@frozen
class Importance:
    """How much an error in each weight counts: `weight` [block, blocks]; and each block's row's mean square."""

    weight: Tensor
    row_mean_square: Tensor | None = None  # [blocks]


def square_sum(x: Tensor) -> Tensor:
    """Return the sum of squares of [elements, blocks], first to last."""
    return ordered_sum(x * x)


def importance_weights(x: Tensor, importance: Tensor, spread: Tensor) -> Tensor:
    """Return importance * sqrt(spread + x squared), the error weights of all formats that take an importance matrix."""
    return importance * square_root(spread + x * x)


# -- scales and offsets ------------------------------------------------------------------------------------------------


def _searched(name: str, x: Tensor, importance: Importance | None, steps: Steps) -> tuple[Affine, Tensor]:
    """Search scale and offset of every group [groups, elements, blocks]; also returns the groups' summed weights."""
    size = 16 if name == "q2_k" else 32
    groups = x.view(BLOCK // size, size, -1)
    plain, weighted = GRIDS[name]
    if importance is None:
        if name == "q2_k":
            weight = groups.abs()
        else:
            weight = square_root(ordered_sum(groups * groups) / size).unsqueeze(1) + groups.abs()
        return affine_search(groups, weight, plain, steps), weight
    spread = square_sum(x)
    spread = spread / BLOCK if name == "q2_k" else 2 * spread / BLOCK
    weight = importance_weights(groups, importance.weight.view_as(groups), spread)
    return affine_search(groups, weight, weighted, steps), ordered_sum(weight)


def _scaled_bytes(found: Tensor, most: int, guarded: bool) -> tuple[Tensor, Tensor]:
    """Round positive scales [groups, blocks] to 0 .. most times a shared one; returns both (int32, fp32)."""
    shared = found.amax(0).clamp_(min=0.0)
    positive = shared > 0
    inverse = torch.where(positive, divide(most, shared), 0.0)
    level = nearest_int(inverse * found).bitwise_and_(0xFF)
    if guarded:
        level.clamp_(max=most)
    return level.masked_fill_(~positive, 0), torch.where(positive, divide(shared, most), 0.0)


def _settled(x: Tensor, scale: Tensor, offset: Tensor, most: int, found: Callable[[], Tensor]) -> Tensor:
    """Return the levels (fp32) for the rounded scales [groups, blocks]; a group of scale 0 keeps those found first."""
    levels = nearest_int((x + offset.unsqueeze(1)) / scale.unsqueeze(1)).clamp_(0, most)
    return _kept(levels, scale, found)


def _kept(levels: Tensor, scale: Tensor, found: Callable[[], Tensor]) -> Tensor:
    """Put the levels `found` first (fp32) where the rounded scale is 0; returns uint8 of the same shape."""
    zero = scale == 0
    if bool(zero.any()):
        levels = torch.where(zero.unsqueeze(1), found().to(levels.dtype), levels)
    return levels.to(torch.uint8)


def quantize_q2_k(x: Tensor, importance: Importance | None, steps: Steps) -> Tensor:
    """Return the blocks [84, blocks] of x [256, blocks]: 16 scales | offsets << 4, 64 of 2-bit levels, d, dmin."""
    affine, weights = _searched("q2_k", x, importance, steps)
    if importance is None:
        (scale, d), (offset, dmin) = (_scaled_bytes(part, 15, False) for part in (affine.scale, affine.minus))
    else:
        d, scale = positive_search(affine.scale, weights, 15)
        dmin, offset = positive_search(affine.minus, weights, 15)
    packed = (scale | offset << 4).bitwise_and_(0xFF)
    group = as_half(d) * (packed & 15)
    levels = _settled(
        x.view(16, 16, -1), group, as_half(dmin) * (packed >> 4), 3, lambda: affine.levels(x.view(16, 16, -1), 3)
    )
    return torch.cat((packed.to(torch.uint8), pack_pairs(levels), half_bytes(d), half_bytes(dmin)))


def quantize_q4_k(x: Tensor, importance: Importance | None, steps: Steps) -> Tensor:
    """Return the blocks [144, blocks] of x [256, blocks]: d, dmin, 12 bytes of 6-bit scales, 128 of 4-bit levels."""
    head, levels = _scales_and_levels("q4_k", x, importance, steps)
    return torch.cat((head, pack_nibbles(levels)))


def quantize_q5_k(x: Tensor, importance: Importance | None, steps: Steps) -> Tensor:
    """Return the blocks [176, blocks] of x [256, blocks]: as q4_k, with 32 bytes of fifth bits before the levels."""
    head, levels = _scales_and_levels("q5_k", x, importance, steps)
    fifth = levels.view(8, 32, -1) >> 4
    return torch.cat((head, pack_bits(fifth), pack_nibbles(levels & 15)))


def _scales_and_levels(name: str, x: Tensor, importance: Importance | None, steps: Steps) -> tuple[Tensor, Tensor]:
    """Return the first 16 bytes of q4_k and q5_k blocks, and the levels [8, 32, blocks]."""
    affine, weights = _searched(name, x, importance, steps)
    if importance is None:
        (scale, d), (offset, dmin) = (_scaled_bytes(part, 63, True) for part in (affine.scale, affine.minus))
    else:
        d, scale = positive_search(affine.scale, weights, 63)
        dmin, offset = positive_search(affine.minus, weights, 63)
        if name == "q5_k":
            scale, offset = scale.clamp(max=63), offset.clamp(max=63)
    packed = pack_six(scale.to(torch.uint8), offset.to(torch.uint8))
    scale, offset = unpack_six(packed)
    most = GRIDS[name][0].levels
    groups = x.view(8, 32, -1)
    levels = _settled(groups, as_half(d) * scale, as_half(dmin) * offset, most, lambda: affine.levels(groups, most))
    return torch.cat((half_bytes(d), half_bytes(dmin), packed)), levels


# -- scales alone ------------------------------------------------------------------------------------------------------


def quantize_q3_k(x: Tensor, importance: Importance | None, steps: Steps) -> Tensor:
    """Return the blocks [110, blocks] of x [256, blocks]: 32 bytes of high bits, 64 of low bits, 12 of scales, d."""
    groups = x.view(16, 16, -1)
    if importance is None:
        found, first = descent(groups, 4, steps)
        scale, d = _signed_scales(found)
        levels = lambda: first  # noqa: E731
    else:
        spread = 2 * square_sum(x) / BLOCK
        weight = importance_weights(groups, importance.weight.view_as(groups), spread)
        result = symmetric_search(groups, weight, 4, steps)
        over = symmetric_search(result.scale[None], ordered_sum(weight)[None], 32, PLAIN)
        d, scale = over.scale[0], over.levels(result.scale[None], 32)[0].int()
        levels = lambda: result.levels(groups, 4)  # noqa: E731
    packed = pack_signed_six(scale.to(torch.uint8))
    group = as_half(d) * (scale - 32)
    settled = nearest_int(groups / group.unsqueeze(1)).clamp_(-4, 3).add_(4)
    level = _kept(settled, group, levels)
    high = pack_bits((level > 3).view(8, 32, -1).to(torch.uint8))
    return torch.cat((high, pack_pairs(level & 3), packed, half_bytes(d)))


def _signed_scales(found: Tensor) -> tuple[Tensor, Tensor]:
    """Round signed scales [16, blocks] to -32 .. 31 times a shared one; returns them plus 32 (int32), and it (fp32)."""
    magnitude, peak = largest(found)
    some = magnitude > 0
    inverse = divide(-32.0, torch.where(some, peak, 1.0))
    level = _as_int8(nearest_int(inverse * found)).clamp_(-32, 31).add_(32)
    return level.masked_fill_(~some, 0), torch.where(some, 1.0 / inverse, 0.0)


def _as_int8(value: Tensor) -> Tensor:
    """Wrap int32 around to -128 .. 127."""
    return value.to(torch.int8).int()


def quantize_q6_k(x: Tensor, importance: Importance | None, steps: Steps) -> Tensor:
    """Return the blocks [210, blocks] of x [256, blocks]: 128 bytes of low 4 bits, 64 of high 2, 16 scales, d."""
    groups = x.view(16, 16, -1)
    weight = groups * groups if importance is None else importance.weight.view_as(groups)
    result = symmetric_search(groups, weight, 32, steps)
    found = result.scale
    magnitude, peak = largest(found)
    empty = magnitude < TINY
    inverse = divide(-128.0, torch.where(empty, 1.0, peak))
    d = (1.0 / inverse).masked_fill_(empty, 0.0)
    scale = _as_int8(nearest_int(inverse * found).clamp_(max=127))
    group = as_half(d) * scale
    level = nearest_int(groups / group.unsqueeze(1)).clamp_(-32, 31).add_(32)
    level = _kept(level, group, lambda: result.levels(groups, 32)).view(2, 4, 32, -1)
    low, high = level & 15, level >> 4
    low = torch.cat((low[:, 0] | low[:, 2] << 4, low[:, 1] | low[:, 3] << 4), 1).view(128, -1)
    high = (high[:, 0] | high[:, 1] << 2 | high[:, 2] << 4 | high[:, 3] << 6).view(64, -1)
    whole = torch.cat((low, high, scale.to(torch.int8).view(torch.uint8), half_bytes(d)))
    return whole.masked_fill_(empty, 0)


# -- back to fp32 ------------------------------------------------------------------------------------------------------


def dequantize_q2_k(data: Tensor) -> Tensor:
    """Return the weights [256, blocks] of q2_k blocks [84, blocks]."""
    scale, offset = half(data[80:82]) * (data[:16] & 15), half(data[82:84]) * (data[:16] >> 4)
    levels = unpack_pairs(data[16:80]).view(16, 16, -1)
    return (scale.unsqueeze(1) * levels - offset.unsqueeze(1)).view(BLOCK, -1)


def dequantize_q3_k(data: Tensor) -> Tensor:
    """Return the weights [256, blocks] of q3_k blocks [110, blocks]."""
    scale = half(data[108:110]) * (unpack_signed_six(data[96:108]).int() - 32)
    levels = unpack_pairs(data[32:96]).int() + unpack_bits(data[:32]).view(BLOCK, -1).int() * 4 - 4
    return (scale.unsqueeze(1) * levels.view(16, 16, -1)).view(BLOCK, -1)


def dequantize_q4_k(data: Tensor) -> Tensor:
    """Return the weights [256, blocks] of q4_k blocks [144, blocks]."""
    return _with_offsets(data, unpack_nibbles(data[16:]))


def dequantize_q5_k(data: Tensor) -> Tensor:
    """Return the weights [256, blocks] of q5_k blocks [176, blocks]."""
    return _with_offsets(data, unpack_nibbles(data[48:]) | unpack_bits(data[16:48]) << 4)


def _with_offsets(data: Tensor, levels: Tensor) -> Tensor:
    scale, offset = unpack_six(data[4:16])
    scale, offset = half(data[:2]) * scale, half(data[2:4]) * offset
    return (scale.unsqueeze(1) * levels - offset.unsqueeze(1)).view(BLOCK, -1)


def dequantize_q6_k(data: Tensor) -> Tensor:
    """Return the weights [256, blocks] of q6_k blocks [210, blocks]."""
    scale = half(data[208:210]) * data[192:208].view(torch.int8)
    low, high = data[:128].reshape(2, 2, 32, -1), data[128:192].reshape(2, 32, -1)
    low = torch.cat((low & 15, low >> 4), 1)
    high = torch.stack([high >> shift & 3 for shift in (0, 2, 4, 6)], 1)
    levels = (low | high << 4).view(16, 16, -1).int() - 32
    return (scale.unsqueeze(1) * levels).view(BLOCK, -1)
