"""The registered op `fastft::linears`: frozen linears of one input and LoRA's projection by A, without that by B.

For a caller that adds scale (x A^T) B^T itself where it reads x W^T anyway:

    y_i = x W_i^T,   xa = x A^T      (A = all A_i, one under the other)
    dx  = dxa A + sum_i dy_i W_i,    dA = dxa^T x
"""

import torch
from torch import Tensor

from fastft.kernels.lora.casts import stacked_and_cast
from fastft.kernels.lora.gemm import accumulating_mm, input_gradient, products, regroup


def linears(
    x: Tensor,
    weights: list[Tensor],
    a: list[Tensor],
    quant_states: list[list[Tensor]],
    out_features: list[int],
    fp8: bool = False,
) -> list[Tensor]:
    """Return [x W_i^T [..., N_i] for each i, x A^T [..., sum of ranks]].

    x: [..., K]. weights: [N_i, K] each, frozen, or the packed bytes of an NF4 weight, with quant_states as
    `lora_linears` takes them. a: [r_i, K], as many as the caller likes. Computed in the dtype of x (under autocast: in
    autocast's dtype); with fp8, the products with W_i have fp8 factors. Gradients: x and a, those of a in their own
    dtype.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    counts = [len(state) for state in quant_states]
    flat = [t for state in quant_states for t in state]
    return torch.ops.fastft.linears(x, weights, a, flat, counts, out_features, fp8)


@torch.library.custom_op("fastft::linears", mutates_args=())
def _linears(
    x: Tensor,
    weights: list[Tensor],
    a: list[Tensor],
    quant: list[Tensor],
    quant_counts: list[int],
    out_features: list[int],
    fp8: bool,
) -> list[Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        rows, states = x.reshape(-1, x.shape[-1]), regroup(quant, quant_counts)
        stack, _ = stacked_and_cast(a, [], x.dtype)
        outputs = [*products(rows, weights, states, out_features, fp8), torch.mm(rows, stack.t())]
        return [y.view(*x.shape[:-1], y.shape[1]) for y in outputs]


@_linears.register_fake
def _(x, weights, a, quant, quant_counts, out_features, fp8):
    widths = [*out_features, sum(matrix.shape[0] for matrix in a)]
    return [x.new_empty(*x.shape[:-1], width) for width in widths]


@torch.library.custom_op("fastft::linears_backward", mutates_args=())
def _linears_backward(
    dys: list[Tensor],
    dxa: Tensor,
    x: Tensor,
    weights: list[Tensor],
    a: list[Tensor],
    quant: list[Tensor],
    quant_counts: list[int],
    needs_x: bool,
    fp8: bool,
    grad_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (dx or an empty tensor, dA of all stacked, in the dtype of a or, where it is given, in `grad_dtype`)."""
    with torch.autocast(x.device.type, enabled=False):
        rows, states = x.reshape(-1, x.shape[-1]), regroup(quant, quant_counts)
        g = dxa.reshape(-1, dxa.shape[-1])
        flat = [dy.reshape(-1, dy.shape[-1]) for dy in dys]
        dx = x.new_empty(0)
        if needs_x:
            stack, _ = stacked_and_cast(a, [], x.dtype)
            dx = input_gradient(flat, weights, states, g, stack, fp8).view(x.shape)
        return dx, accumulating_mm(g.t(), rows, grad_dtype or a[0].dtype)


@_linears_backward.register_fake
def _(dys, dxa, x, weights, a, quant, quant_counts, needs_x, fp8, grad_dtype=None):
    stacked = a[0].new_empty(sum(matrix.shape[0] for matrix in a), x.shape[-1], dtype=grad_dtype or a[0].dtype)
    return x.new_empty(x.shape if needs_x else (0,)), stacked


def _setup_context(ctx, inputs, output):
    x, weights, a, quant, ctx.quant_counts, _, ctx.fp8 = inputs
    ctx.counts = (len(weights), len(a))
    ctx.save_for_backward(x, *weights, *a, *quant)


def _backward(ctx, grads):
    count, matrices = ctx.counts
    x, *rest = ctx.saved_tensors
    weights, a, quant = rest[:count], rest[count : count + matrices], rest[count + matrices :]
    needs_x = ctx.needs_input_grad[0]
    dx, stacked = torch.ops.fastft.linears_backward(
        grads[:-1], grads[-1], x, weights, a, quant, ctx.quant_counts, needs_x, ctx.fp8
    )
    pieces = torch.split(stacked, [matrix.shape[0] for matrix in a])
    d_a = [piece.to(matrix.dtype) for piece, matrix in zip(pieces, a)]
    return dx if needs_x else None, [None] * count, d_a, [None] * len(quant), None, None, None


_linears.register_autograd(_backward, setup_context=_setup_context)
