"""Matrix products around frozen weights, dense, in NF4 or in fp8, that the LoRA operations share.

On a GPU a low-rank product comes first and the large one is added to it: a large GEMM that adds to what is there hides
the reading behind its arithmetic, whereas a low-rank one would wait for the memory to read and write it all again.

With fp8=True the large products have fp8 factors (`fastft.kernels.fp8`): activations and gradients are quantised once
for all weights that read them. Those GEMMs cannot add to what is there; the low-rank product is added by a kernel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastft.kernels import fp8 as fp8_kernels
from fastft.kernels.lora.casts import scale_
from fastft.kernels.nf4 import dequantize_into


def dense(weight: Tensor, state: list[Tensor], n: int, k: int, dtype: torch.dtype) -> Tensor:
    """Return the weight [n, k] in `dtype`: itself, or a temporary when it is in NF4, in fp8 or in another dtype."""
    if not state:
        return weight.to(dtype)
    if fp8_kernels.ref.held(weight, n, k):
        return fp8_kernels.dequantize(weight.view(fp8_kernels.ref.FP8), state[0], dtype)
    absmax, code2, absmax2, offset = state if len(state) == 4 else (state[0], None, None, None)
    return dequantize_into(weight, absmax, code2, absmax2, offset, n, k, dtype)


def regroup(flat: list[Tensor], counts: list[int]) -> list[list[Tensor]]:
    """Return `flat` as consecutive lists of the given lengths."""
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return [flat[end - count : end] for end, count in zip(ends, counts)]


def products(x: Tensor, weights: list[Tensor], states: list[list[Tensor]], sizes: list[int], fp8: bool) -> list[Tensor]:
    """Return x W_i^T, [M, N_i] each, for x [M, K] and W_i [N_i, K]; sizes: the N_i."""
    k = x.shape[1]
    if not fp8:  # a dequantised weight is freed before the next one is made
        return [torch.mm(x, dense(w, state, n, k, x.dtype).t()) for w, state, n in zip(weights, states, sizes)]
    q, scale = fp8_kernels.quantize_rows([x])
    outputs = []
    for weight, state, n in zip(weights, states, sizes):
        outputs.append(fp8_kernels.product(q, scale, *fp8_kernels.weight_rows(weight, state, n, k), x.dtype))
    return outputs


def lora_products(
    x: Tensor,
    weights: list[Tensor],
    states: list[list[Tensor]],
    biases: list[Tensor | None],
    xas: list[Tensor],
    bs: list[Tensor],
    scales: list[float],
    fp8: bool,
) -> list[Tensor]:
    """Return x W_i^T + bias_i + scale_i xa_i B_i^T, [M, N_i] each, for x [M, K], xa_i [M, r_i], B_i [N_i, r_i].

    xa_i and B_i are in the dtype of x.
    """
    if not fp8:
        return [_lora_product(x, *given) for given in zip(weights, states, biases, xas, bs, scales)]
    outputs = products(x, weights, states, [b.shape[0] for b in bs], fp8)
    for y, bias, xa, b, scale in zip(outputs, biases, xas, bs, scales):
        own = None if bias is None else bias.to(x.dtype)
        fp8_kernels.low_rank_add_(y, xa, b, scale, own)
    return outputs


def _lora_product(
    x: Tensor, weight: Tensor, state: list[Tensor], bias: Tensor | None, xa: Tensor, b: Tensor, scale: float
) -> Tensor:
    n, dtype = b.shape[0], x.dtype
    weight = dense(weight, state, n, x.shape[1], dtype)  # freed on return, before the next one is made
    if not x.is_cuda:  # the low-rank product is not rounded by itself then
        large = F.linear(x, weight, None if bias is None else bias.to(dtype))
        return large.addmm_(xa, b.t(), alpha=scale)
    out = torch.empty(x.shape[0], n, dtype=dtype, device=x.device)
    start = out if bias is None else bias.to(dtype)
    torch.addmm(start, xa, b.t(), beta=float(bias is not None), alpha=scale, out=out)
    return out.addmm_(x, weight.t())


def accumulating_mm(lhs: Tensor, rhs: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Return scale * lhs @ rhs in `dtype`, rounded once."""
    return accumulating_mms([lhs], [rhs], [dtype], [scale])[0]


def accumulating_mms(
    lhs: list[Tensor], rhs: list[Tensor], dtypes: list[torch.dtype], scales: list[float]
) -> list[Tensor]:
    """Return scale_i * lhs_i @ rhs_i in dtype_i each, rounded once.

    On CUDA a GEMM of 16-bit factors may reduce its partial sums in 16 bits; asked for an fp32 result it does not.
    """
    wide = [may_sum_in_16_bits(left.device, left.dtype) for left in lhs]
    made = [_sums(*given) for given in zip(lhs, rhs, scales, wide, strict=True)]
    scale_([product for product, apart in zip(made, wide) if apart], [s for s, apart in zip(scales, wide) if apart])
    return [product.to(dtype) for product, dtype in zip(made, dtypes, strict=True)]


def may_sum_in_16_bits(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether a GEMM on `device` with factors and result in `dtype` may reduce its partial sums in 16 bits."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def fp32_mm(lhs: Tensor, rhs: Tensor) -> Tensor:
    """Return lhs @ rhs in fp32 for 16-bit factors, which CUDA alone has a GEMM for."""
    return torch.mm(lhs, rhs, out_dtype=torch.float32)


def _sums(lhs: Tensor, rhs: Tensor, scale: float, wide: bool) -> Tensor:
    """Return lhs @ rhs in fp32 where it is to be `wide`, else scale * lhs @ rhs in their dtype."""
    if wide and lhs.shape[0] and rhs.shape[1]:
        return fp32_mm(lhs, rhs)
    out = torch.empty(lhs.shape[0], rhs.shape[1], dtype=torch.float32 if wide else lhs.dtype, device=lhs.device)
    if not out.numel():  # a rank of 0
        return out
    return torch.addmm(out, lhs, rhs, beta=0, alpha=scale, out=out)


def product_gradient(dys: list[Tensor], weights: list[Tensor], states: list[list[Tensor]], k: int) -> Tensor:
    """Return sum of dy_i W_i, [M, k], for dy_i [M, N_i], by one product of fp8 factors.

    The dy_i lie side by side under one scale a row, so that the sum is taken within the product.
    """
    sizes = [dy.shape[1] for dy in dys]
    weight, factors = fp8_kernels.weight_columns(weights, states, sizes, k)
    return fp8_kernels.product(*fp8_kernels.quantize_rows(dys, factors), weight, None, dys[0].dtype)


def input_gradient(
    dys: list[Tensor], weights: list[Tensor], states: list[list[Tensor]], g: Tensor, a: Tensor, fp8: bool
) -> Tensor:
    """Return g A + sum of dy_i W_i, [M, K], for dy_i [M, N_i], W_i [N_i, K], g [M, R], A [R, K]."""
    k = a.shape[1]
    if fp8:
        return fp8_kernels.low_rank_add_(product_gradient(dys, weights, states, k), g, a.t())
    dx = torch.mm(g, a) if g.is_cuda else None
    for dy, weight, state in zip(dys, weights, states):
        # A dequantised weight is freed before the next one is made.
        given = dense(weight, state, dy.shape[1], k, dy.dtype)
        dx = torch.mm(dy, given) if dx is None else dx.addmm_(dy, given)
    return dx if g.is_cuda else dx.addmm_(g, a)
