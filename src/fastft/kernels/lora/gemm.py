"""Matrix products around frozen weights, dense or in NF4, that the LoRA operations share.

On a GPU a low-rank product comes first and the large one is added to it: a large GEMM that adds to what is there hides
the reading behind its arithmetic, whereas a low-rank one would wait for the memory to read and write it all again.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastft.kernels.nf4 import dequantize_into


def dense(weight: Tensor, state: list[Tensor], n: int, k: int, dtype: torch.dtype) -> Tensor:
    """Return the weight [n, k] in `dtype`: itself, or a temporary when it is in NF4 or in another dtype."""
    if not state:
        return weight.to(dtype)
    absmax, code2, absmax2, offset = state if len(state) == 4 else (state[0], None, None, None)
    return dequantize_into(weight, absmax, code2, absmax2, offset, n, k, dtype)


def regroup(flat: list[Tensor], counts: list[int]) -> list[list[Tensor]]:
    """Return `flat` as consecutive lists of the given lengths."""
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return [flat[end - count : end] for end, count in zip(ends, counts)]


def stack(a: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the matrices one under the other, in `dtype`."""
    return torch.cat([matrix.to(dtype) for matrix in a]) if len(a) > 1 else a[0].to(dtype)


def lora_product(
    x: Tensor, weight: Tensor, state: list[Tensor], bias: Tensor | None, xa: Tensor, b: Tensor, scale: float
) -> Tensor:
    """Return x W^T + bias + scale xa B^T, [M, N], for x [M, K], xa [M, r], W [N, K] dense or in NF4, B [N, r]."""
    n, dtype = b.shape[0], x.dtype
    weight = dense(weight, state, n, x.shape[1], dtype)  # freed on return, before the next one is made
    if not x.is_cuda:  # the low-rank product is not rounded by itself then
        large = F.linear(x, weight, None if bias is None else bias.to(dtype))
        return large.addmm_(xa, b.to(dtype).t(), alpha=scale)
    out = torch.empty(x.shape[0], n, dtype=dtype, device=x.device)
    start = out if bias is None else bias.to(dtype)
    torch.addmm(start, xa, b.to(dtype).t(), beta=float(bias is not None), alpha=scale, out=out)
    return out.addmm_(x, weight.t())


def accumulating_mm(lhs: Tensor, rhs: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Return scale * lhs @ rhs in `dtype`, rounded once.

    On CUDA a GEMM of 16-bit factors may reduce its partial sums in 16 bits; asked for an fp32 result it does not.
    """
    if lhs.is_cuda and lhs.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(lhs, rhs, out_dtype=torch.float32).mul_(scale).to(dtype)
    out = torch.empty(lhs.shape[0], rhs.shape[1], dtype=lhs.dtype, device=lhs.device)
    return torch.addmm(out, lhs, rhs, beta=0, alpha=scale, out=out).to(dtype)


def input_gradient(
    dys: list[Tensor], weights: list[Tensor], states: list[list[Tensor]], g: Tensor, a: Tensor
) -> Tensor:
    """Return g A + sum of dy_i W_i, [M, K], for dy_i [M, N_i], W_i [N_i, K] dense or in NF4, g [M, R], A [R, K]."""
    dx = torch.mm(g, a) if g.is_cuda else None
    for dy, weight, state in zip(dys, weights, states):
        # A dequantised weight is freed before the next one is made.
        given = dense(weight, state, dy.shape[1], a.shape[1], dy.dtype)
        dx = torch.mm(dy, given) if dx is None else dx.addmm_(dy, given)
    return dx if g.is_cuda else dx.addmm_(g, a)
