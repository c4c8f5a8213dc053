"""Blocks of 32 weights whose levels are the values of a table: iq4_nl, iq4_xs and mxfp4."""

from itertools import pairwise

import torch
from torch import Tensor

from fastft.export.gguf.quants.arithmetic import half, half_bytes, inverse, largest, nearest_int
from fastft.export.gguf.quants.kquants import Importance, importance_weights, square_sum
from fastft.export.gguf.quants.packing import pack_halves, unpack_halves
from fastft.export.gguf.quants.search import Steps, table_index, table_search

# The values of iq4_nl and iq4_xs, by the format; nearer together around zero.
TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
TRIES = 7  # scales tried each way
# Twice the magnitudes of FP4 E2M1: OCP Microscaling Formats (MX) Specification, section 5.3.3.
FP4 = (0, 1, 2, 3, 4, 6, 8, 12)


def _table_scales(groups: Tensor, importance: Tensor | None, spread: Tensor, steps: Steps) -> Tensor:
    """Search the scale of every group [groups, 32, blocks]; `spread` is twice the mean square around it [blocks]."""
    weight = groups * groups if importance is None else importance_weights(groups, importance, spread)
    return table_search(groups, weight, TABLE, TRIES, steps)


def quantize_iq4_nl(x: Tensor, importance: Importance | None, steps: Steps) -> Tensor:
    """Return the blocks [18, blocks] of x [32, blocks]: the scale, then 4 bits a weight."""
    spread = square_sum(x) * (2 / 32)
    scale = _table_scales(x[None], None if importance is None else importance.weight[None], spread, steps)[0]
    level = table_index(inverse(scale) * x, TABLE)
    return torch.cat((half_bytes(scale), pack_halves(level)))


def dequantize_iq4_nl(data: Tensor) -> Tensor:
    """Return the weights [32, blocks] of iq4_nl blocks [18, blocks]."""
    return half(data[:2]) * _values(unpack_halves(data[2:]))


def _values(index: Tensor) -> Tensor:
    return torch.tensor(TABLE, dtype=torch.float32, device=index.device)[index.int()]


def quantize_iq4_xs(x: Tensor, importance: Importance | None, steps: Steps) -> Tensor:
    """Return the blocks [136, blocks] of x [256, blocks]: d, 2 and 4 bytes of high and low bits of scales, levels."""
    groups = x.view(8, 32, -1)
    weight = None if importance is None else importance.weight.view_as(groups)
    found = _table_scales(groups, weight, square_sum(x) * (2 / 256), steps)
    d = -largest(found)[1] / 32
    level = nearest_int(inverse(d) * found).clamp_(-32, 31)
    index = table_index(inverse(d * level).unsqueeze(1) * groups, TABLE)
    scale = (level + 32).to(torch.uint8)
    low = scale & 15
    high = (scale >> 4).view(2, 4, -1)
    high = high[:, 0] | high[:, 1] << 2 | high[:, 2] << 4 | high[:, 3] << 6
    packed = (index[:, :16] | index[:, 16:] << 4).view(128, -1)
    return torch.cat((half_bytes(d), high, low[0::2] | low[1::2] << 4, packed))


def dequantize_iq4_xs(data: Tensor) -> Tensor:
    """Return the weights [256, blocks] of iq4_xs blocks [136, blocks]."""
    high = torch.stack([data[2:4] >> shift & 3 for shift in (0, 2, 4, 6)], 1).view(8, -1)
    low = torch.stack((data[4:8] & 15, data[4:8] >> 4), 1).view(8, -1)
    scale = half(data[:2]) * ((low | high << 4).int() - 32)
    index = data[8:].reshape(8, 16, -1)
    index = torch.cat((index & 15, index >> 4), 1)
    return (scale.unsqueeze(1) * _values(index)).view(256, -1)


def quantize_mxfp4(x: Tensor, importance: Importance | None, steps: Steps) -> Tensor:
    """Return the blocks [17, blocks] of x [32, blocks]: a power of two (E8M0), then 4 bits a weight. No importance."""
    magnitude = x.abs()
    most = magnitude.amax(0)
    # log2f is the double's logarithm rounded to fp32, which just below a power of two is that power's
    exponent = most.double().log2().float().floor().nan_to_num(neginf=0.0).int() + 125
    exponent = torch.where(most > 0, exponent & 0xFF, 0)
    unit = _half_power(exponent)
    level = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    for lower, upper in pairwise(FP4):  # in the middle of two the lower one is taken
        level += magnitude > unit * ((lower + upper) / 2)
    level |= ((x < 0) & (level > 0)).to(torch.uint8) << 3
    return torch.cat((exponent.to(torch.uint8)[None], pack_halves(level)))


def _half_power(exponent: Tensor) -> Tensor:
    """Return 2 ** (exponent - 128) for int32 exponents 0 .. 255, exact also where it is denormal."""
    bits = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), (exponent - 1) << 23)
    return bits.int().view(torch.float32)


def dequantize_mxfp4(data: Tensor) -> Tensor:
    """Return the weights [32, blocks] of mxfp4 blocks [17, blocks]."""
    values = torch.tensor([*FP4, *(-value for value in FP4)], dtype=torch.float32, device=data.device)
    return values[unpack_halves(data[1:]).int()] * _half_power(data[0].int())
