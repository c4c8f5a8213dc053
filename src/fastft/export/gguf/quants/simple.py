"""Blocks of 32 weights with one scale, or one scale and the smallest value: q4_0, q4_1, q5_0, q5_1, q8_0; and floats.

A block is a column of x [32, blocks]. Without an importance matrix a block's extreme value sets the scale; with one the
scale is searched for, except for q8_0, which takes none.
"""

import torch
from torch import Tensor

from fastft.export.gguf.quants.arithmetic import (
    divide,
    first_smallest,
    half,
    half_bytes,
    inverse,
    largest,
    scaled_bytes,
    truncated_byte,
)
from fastft.export.gguf.quants.kquants import Importance, importance_weights
from fastft.export.gguf.quants.packing import pack_halves, unpack_halves
from fastft.export.gguf.quants.search import Grid, Steps, affine_search, symmetric_search


def quantize_q8_0(x: Tensor, importance: Importance | None, steps: Steps) -> Tensor:
    """Return the blocks [34, blocks] of x [32, blocks]: the scale, then a byte a weight. Takes no importance."""
    scale = divide(x.abs().amax(0), 127)
    return torch.cat((half_bytes(scale), scaled_bytes(x, scale).view(torch.uint8)))


def dequantize_q8_0(data: Tensor) -> Tensor:
    """Return the weights [32, blocks] of q8_0 blocks [34, blocks]."""
    return half(data[:2]) * data[2:].view(torch.int8)


def _symmetric(x: Tensor, importance: Importance | None, steps: Steps, most: int) -> tuple[Tensor, Tensor]:
    """Return the scale [blocks] and the levels 0 .. 2 * most - 1 (uint8) of blocks [32, blocks]."""
    if importance is not None:
        weight = importance_weights(x, importance.weight, importance.row_mean_square)
        found = symmetric_search(x[None], weight[None], most, steps)
        return found.scale[0], found.levels(x[None], most)[0].to(torch.uint8)
    scale = divide(largest(x)[1], -most)
    level = truncated_byte(x * inverse(scale) + (most + 0.5))
    level = torch.where(level > 127, level - 256, level).clamp_(max=2 * most - 1)
    return scale, level.to(torch.uint8)


def _affine(x: Tensor, importance: Importance | None, steps: Steps, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the scale, the smallest value (both [blocks]) and the levels 0 .. most (uint8) of blocks [32, blocks]."""
    if importance is not None:
        weight = importance_weights(x, importance.weight, importance.row_mean_square)
        found = affine_search(x[None], weight[None], Grid(most, -0.9, 0.05, 36), steps, first_smallest(x)[None])
        return found.scale[0], -found.minus[0], found.levels(x[None], most)[0].to(torch.uint8)
    least = first_smallest(x)
    scale = divide(x.amax(0) - least, most) + 0.0  # never -0
    level = truncated_byte((x - least) * inverse(scale) + 0.5)
    return scale, least, (level.clamp_(max=most) if most == 15 else level).to(torch.uint8)


def quantize_q4_0(x: Tensor, importance: Importance | None, steps: Steps) -> Tensor:
    """Return the blocks [18, blocks] of x [32, blocks]: the scale, then 4 bits a weight."""
    scale, level = _symmetric(x, importance, steps, 8)
    return torch.cat((half_bytes(scale), pack_halves(level)))


def dequantize_q4_0(data: Tensor) -> Tensor:
    """Return the weights [32, blocks] of q4_0 blocks [18, blocks]."""
    return (unpack_halves(data[2:]).int() - 8) * half(data[:2])


def quantize_q4_1(x: Tensor, importance: Importance | None, steps: Steps) -> Tensor:
    """Return the blocks [20, blocks] of x [32, blocks]: scale, smallest value, then 4 bits a weight."""
    scale, least, level = _affine(x, importance, steps, 15)
    return torch.cat((half_bytes(scale), half_bytes(least), pack_halves(level)))


def dequantize_q4_1(data: Tensor) -> Tensor:
    """Return the weights [32, blocks] of q4_1 blocks [20, blocks]."""
    return unpack_halves(data[4:]) * half(data[:2]) + half(data[2:4])


def quantize_q5_0(x: Tensor, importance: Importance | None, steps: Steps) -> Tensor:
    """Return the blocks [22, blocks] of x [32, blocks]: the scale, 4 bytes of fifth bits, 16 of the four low bits."""
    scale, level = _symmetric(x, importance, steps, 16)
    return torch.cat((half_bytes(scale), _fifth_bits(level), pack_halves(level & 15)))


def dequantize_q5_0(data: Tensor) -> Tensor:
    """Return the weights [32, blocks] of q5_0 blocks [22, blocks]."""
    level = unpack_halves(data[6:]) | _from_fifth_bits(data[2:6])
    return (level.int() - 16) * half(data[:2])


def quantize_q5_1(x: Tensor, importance: Importance | None, steps: Steps) -> Tensor:
    """Return the blocks [24, blocks] of x [32, blocks]: q5_0's with the smallest value after the scale."""
    scale, least, level = _affine(x, importance, steps, 31)
    return torch.cat((half_bytes(scale), half_bytes(least), _fifth_bits(level), pack_halves(level & 15)))


def dequantize_q5_1(data: Tensor) -> Tensor:
    """Return the weights [32, blocks] of q5_1 blocks [24, blocks]."""
    level = unpack_halves(data[8:]) | _from_fifth_bits(data[4:8])
    return level * half(data[:2]) + half(data[2:4])


def _fifth_bits(level: Tensor) -> Tensor:
    """Return the fifth bits of levels [32, blocks] as four bytes, element i being bit i % 8 of byte i // 8."""
    bits = (level >> 4 & 1).view(4, 8, -1)
    packed = bits[:, 0].clone()
    for place in range(1, 8):
        packed |= bits[:, place] << place
    return packed


def _from_fifth_bits(data: Tensor) -> Tensor:
    return torch.stack([(data >> place & 1) << 4 for place in range(8)], 1).view(32, -1)


def quantize_f32(x: Tensor, importance: Importance | None, steps: Steps) -> Tensor:
    """Return the bytes [4, weights] of x [1, weights]."""
    return x[0].view(torch.uint8).view(-1, 4).t()


def dequantize_f32(data: Tensor) -> Tensor:
    """Return the numbers [1, weights] of bytes [4, weights]."""
    return data.t().contiguous().view(torch.float32).view(1, -1)


def quantize_f16(x: Tensor, importance: Importance | None, steps: Steps) -> Tensor:
    """Return the bytes [2, weights] of x [1, weights] in fp16, rounded to nearest, halves to even."""
    return half_bytes(x[0])


def dequantize_f16(data: Tensor) -> Tensor:
    """Return the numbers [1, weights] of fp16 bytes [2, weights]."""
    return half(data).view(1, -1)


def quantize_bf16(x: Tensor, importance: Importance | None, steps: Steps) -> Tensor:
    """Return the bytes [2, weights] of x [1, weights] in bf16, rounded to nearest, halves to even."""
    return x[0].to(torch.bfloat16).view(torch.uint8).view(-1, 2).t()


def dequantize_bf16(data: Tensor) -> Tensor:
    """Return the numbers [1, weights] of bf16 bytes [2, weights]."""
    return data.t().contiguous().view(torch.bfloat16).view(1, -1).float()
