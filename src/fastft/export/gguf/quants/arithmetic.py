"""fp32 arithmetic in a fixed order, so that every result has the bits that ggml's scalar code gives.

Data lie as [..., elements, blocks]: one operation works on the same element of many blocks at once, and what a block
needs in order (a sum over its elements) is a loop over `elements`. Every product and every sum is rounded by itself:
one torch operation each, so that no compiler may fuse a product into a sum.
"""

import torch
from torch import Tensor

# Below this largest magnitude a group counts as all zero.
TINY = 1e-15
_BELOW_HALF = 0.5 - 2**-25
_NAN_BITS = 0xFE00 - 2**16


def ordered_sum(terms: Tensor, fused: bool = False) -> Tensor:
    """Sum `terms` [..., elements, blocks] over the elements, first to last, each partial sum rounded to fp32.

    `fused` is for compiled code only: a reduction over a dimension that is not the innermost becomes a loop over the
    elements with a vector of blocks inside, which is the same order (and is checked before it is used).
    """
    if fused:
        return terms.sum(-2)
    total = terms[..., 0, :] + 0.0  # a sum starts from +0
    for element in range(1, terms.shape[-2]):
        total.add_(terms[..., element, :])
    return total


def nearest_int(value: Tensor) -> Tensor:
    """Round fp32 to the nearest integer, halves to even, as int32.

    ggml adds 1.5 * 2**23 and reads the low 23 bits of the sum. Up to 2**22 that is rounding; beyond, and for infinity
    and NaN, the bits are something else, which a scale that overflowed can bring into a file.
    """
    if value.is_cuda:  # whose NaN has other bits than a processor's
        value = value.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    bits = (value + 12582912.0).view(torch.int32)
    return bits.bitwise_and_(0x007FFFFF).sub_(0x00400000)


def truncated_byte(value: Tensor) -> Tensor:
    """Return the low byte of fp32 cut to an integer, as int32 in 0..255; infinity and NaN give 0, as on x86."""
    return value.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).to(torch.int32).bitwise_and_(0xFF)


def scaled_bytes(x: Tensor, scale: Tensor) -> Tensor:
    """Return x [elements, blocks] / scale [blocks] rounded to int8, halves away from zero.

    The division is a product with the inverse; where that overflows, and where the scale is 0, the bytes are 0. Adding
    the number below 1/2 and cutting rounds every number of that size rightly, its neighbours of 1/2 among them.
    """
    factor = inverse(scale)
    value = x * torch.where(factor.isfinite(), factor, 0.0)
    return value.add_(torch.copysign(value.new_tensor(_BELOW_HALF), value)).to(torch.int8)


def largest(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest magnitude over the elements of `x` [..., elements, blocks], and the first value that has it.

    Both are +0 for a block of zeros. NaN is passed over: a scale can become it where weights overflow.
    """
    x = x.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    magnitude = x.abs()
    most = magnitude.amax(-2)
    elements = x.shape[-2]
    order = torch.arange(elements, device=x.device, dtype=torch.int32)[:, None]
    first = torch.where(magnitude == most.unsqueeze(-2), order, elements - 1).amin(-2, keepdim=True)
    value = x.gather(-2, first.long()).squeeze(-2)
    return most, torch.where(most > 0, value, 0.0)


def first_smallest(x: Tensor) -> Tensor:
    """Return the smallest value over the elements of `x` [elements, blocks]; of +0 and -0 the first one."""
    least = x[0].clone()
    for element in range(1, x.shape[0]):
        least = torch.where(x[element] < least, x[element], least)
    return least


def divide(upper: Tensor | float, lower: Tensor | float) -> Tensor:
    """Divide as IEEE 754 has it; with a Python number torch may multiply by a reciprocal instead."""
    if not isinstance(upper, Tensor):
        upper = lower.new_tensor(upper)
    elif not isinstance(lower, Tensor):
        lower = upper.new_tensor(lower)
    return upper / lower


def inverse(value: Tensor) -> Tensor:
    """Return 1/value, and 0 where value is 0."""
    return torch.where(value != 0, 1.0 / value, 0.0)


def square_root(value: Tensor) -> Tensor:
    """Return the correctly rounded fp32 square root; torch's own on the CPU can be off in the last bit."""
    return value.double().sqrt().float()


def half_bytes(value: Tensor) -> Tensor:
    """Return the two bytes of `value` [blocks] in fp16, little end first, as uint8 [2, blocks]."""
    bits = value.to(torch.float16).view(torch.int16)
    if value.is_cuda:  # the NaN that an overflow makes has other bits there than on x86
        bits = torch.where(value.isnan(), _NAN_BITS, bits)
    return bits.view(torch.uint8).view(*value.shape, 2).movedim(-1, 0)


def half(data: Tensor) -> Tensor:
    """Return the fp16 numbers in `data` uint8 [2, blocks] as fp32 [blocks]."""
    return data.t().contiguous().view(torch.float16).view(-1).float()


def as_half(value: Tensor) -> Tensor:
    """Round fp32 to fp16 and back."""
    return value.to(torch.float16).float()
