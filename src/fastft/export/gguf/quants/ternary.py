"""Super-blocks of 256 weights that are -1, 0 or 1 times a scale: tq1_0 (five to a byte) and tq2_0 (four to a byte)."""

import torch
from torch import Tensor

from fastft.export.gguf.quants.arithmetic import half, half_bytes, scaled_bytes
from fastft.export.gguf.quants.kquants import Importance
from fastft.export.gguf.quants.packing import pack_pairs, unpack_pairs
from fastft.export.gguf.quants.search import Steps

# tq1_0 takes the weights as (weights to a byte, bytes): byte i of a part holds weights i, i + bytes, i + 2 * bytes ...
PARTS = ((5, 32), (5, 16), (4, 4))


def _trits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scale [blocks], the largest magnitude, and 0, 1 or 2 for every weight (uint8 [256, blocks])."""
    scale = x.abs().amax(0)
    return scale, (scaled_bytes(x, scale) + 1).view(torch.uint8)


def quantize_tq1_0(x: Tensor, importance: Importance | None, steps: Steps) -> Tensor:
    """Return the blocks [54, blocks] of x [256, blocks]: 52 bytes of base-3 digits, the scale. Takes no importance.

    A byte is the five digits' number times 256/243, rounded up: multiplying by 3 brings out a digit as the carry.
    """
    scale, trits = _trits(x)
    packed, start = [], 0
    for digits, size in PARTS:
        part = trits[start : start + digits * size].view(digits, size, -1).int()
        start += digits * size
        number = torch.zeros_like(part[0])
        for digit in part:
            number = number * 3 + digit
        number = number * 3 ** (5 - digits)
        packed.append(((number * 256 + 242) // 243).to(torch.uint8))
    return torch.cat((*packed, half_bytes(scale)))


def dequantize_tq1_0(data: Tensor) -> Tensor:
    """Return the weights [256, blocks] of tq1_0 blocks [54, blocks]."""
    trits, start = [], 0
    for digits, size in PARTS:
        part = data[start : start + size].int()
        start += size
        trits += [(part * 3**digit & 0xFF) * 3 >> 8 for digit in range(digits)]
    return (torch.cat(trits) - 1) * half(data[52:54])


def quantize_tq2_0(x: Tensor, importance: Importance | None, steps: Steps) -> Tensor:
    """Return the blocks [66, blocks] of x [256, blocks]: 2 bits a weight, the scale. Takes no importance."""
    scale, trits = _trits(x)
    return torch.cat((pack_pairs(trits), half_bytes(scale)))


def dequantize_tq2_0(data: Tensor) -> Tensor:
    """Return the weights [256, blocks] of tq2_0 blocks [66, blocks]."""
    return (unpack_pairs(data[:64]).int() - 1) * half(data[64:66])
