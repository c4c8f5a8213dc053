"""Quantisation to fp8 in plain torch: the meaning of the format, to which the kernels are equal bit by bit."""

import torch
from torch import Tensor

from fastft.kernels.nf4 import ref as nf4_ref

FP8 = torch.float8_e4m3fn
MAX = 448.0
"""Largest number of e4m3 (Micikevicius et al., "FP8 Formats for Deep Learning", table 1)."""
TINY = 2.0**-126
"""Least scale, the smallest normal number of fp32: a row of zeros has it, and its reciprocal is finite."""


def quantize_rows(parts: list[Tensor], factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the parts side by side in fp8 [M, sum of N_i], and the scale of each row, fp32 [M, 1].

    parts: [M, N_i] each. factors: fp32 [sum of N_i], multiplied into the columns before. A row's largest magnitude
    becomes 448. A NaN makes its row NaN.
    """
    wide = torch.cat([part.float() for part in parts], dim=1)
    wide = wide if factors is None else wide * factors
    scale = scale_of(wide.abs().amax(1, keepdim=True))
    return to_fp8(wide * scale.reciprocal()), scale


def scale_of(largest: Tensor) -> Tensor:
    """Return the scale of rows with these largest magnitudes."""
    return (largest * (1 / MAX)).clamp_min(TINY)


def to_fp8(value: Tensor) -> Tensor:
    """Round to fp8; what lies beyond its largest number, by a rounding, becomes that number."""
    return value.clamp(-MAX, MAX).to(FP8)


def held(weight: Tensor, n: int, k: int) -> bool:
    """Say whether a weight [n, k] is held in fp8, or as the bytes of that; in NF4 it has half as many bytes."""
    return weight.element_size() == 1 and weight.numel() == n * k


def held_turned(weight: Tensor, state: list[Tensor], n: int, k: int) -> Tensor | None:
    """Return the values [k, n] that a weight held in fp8 has beside its own [n, k], None where it has none."""
    return state[1].view(FP8) if held(weight, n, k) and len(state) == 2 else None


def weight_rows(weight: Tensor, state: list[Tensor], n: int, k: int) -> tuple[Tensor, Tensor]:
    """Return a frozen weight in fp8 [n, k] and the scale of each row, fp32 [n].

    weight and state: as `fastft.kernels.fp8.op.weight_rows` takes them. The scale of a row in NF4 is that of its
    largest block.
    """
    if held(weight, n, k):
        return weight.view(FP8), state[0].reshape(-1)
    if not state:
        q, scale = quantize_rows([weight])
        return q, scale.view(-1)
    absmax, code2, absmax2, offset = state if len(state) == 4 else (state[0], None, None, None)
    wide = nf4_ref.nf4_dequantize(weight, absmax, code2, absmax2, offset, n, k, torch.float32)
    scale = scale_of(nf4_ref.block_scales(absmax, code2, absmax2, offset).abs().view(n, -1).amax(1))
    return to_fp8(wide * scale.reciprocal()[:, None]), scale


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight [n, k] of an fp8 one and its rows' scales, fp32 [n], in `dtype`, rounded once."""
    return (weight.float() * scale.reshape(-1, 1)).to(dtype)


def product(q: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (q scale) (weight weight_scale)^T in `dtype`, [M, N], for q [M, K], weight [N, K] in fp8."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return ((q.to(wide) @ weight.to(wide).t()) * scale.to(wide) * weight_scale.to(wide)).to(dtype)
