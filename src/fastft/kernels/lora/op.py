"""The registered op `fastft::lora_linears` and its backward: GEMMs that accumulate in place, NF4 weights in passing.

For the projections i of one input x [M, K], with W_i [N_i, K], A_i [r_i, K], B_i [N_i, r_i] and scale s_i:

    y_i  = x W_i^T + bias_i + s_i (x A_i^T) B_i^T          (Hu et al., "LoRA", equation 3)
    g_i  = s_i dy_i B_i                                     [M, r_i]
    dx   = sum_i dy_i W_i + g A                             A = all A_i, one under the other
    dA   = g^T x,   dB_i = s_i dy_i^T (x A_i^T),   dbias_i = sum over rows of dy_i,   dW_i = dy_i^T x

x is read once for all A_i in the forward and once for all dA_i in the backward. A weight in NF4 is dequantised into a
temporary in the forward and again in the backward, so that only x and x A^T are kept between them.
"""

import torch
from torch import Tensor

from fastft.errors import Problem, UsageError
from fastft.kernels.lora.casts import cast, stacked_and_cast
from fastft.kernels.lora.gemm import accumulating_mm, accumulating_mms, input_gradient, lora_products, regroup


def lora_linears(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    a: list[Tensor],
    b: list[Tensor],
    scales: list[float],
    quant_states: list[list[Tensor]] | None = None,
    out_features: list[int] | None = None,
    fp8: bool = False,
) -> list[Tensor]:
    """Apply one or several LoRA linears to the same input.

    x: [..., K]. weights: [N_i, K] each, or the packed bytes of an NF4 weight. biases: [N_i] or None. a: [r_i, K].
    b: [N_i, r_i]; ranks and scales may differ, and a rank of 0 is a linear without an adapter. quant_states: for each
    projection [] (dense), [absmax], or [absmax, code2, absmax2, offset] as `nf4_dequantize` takes them; or, for a
    weight [N_i, K] that is held in fp8 (or as its bytes), [scales of its rows, fp32 [N_i]], which the same values as
    [K, N_i] may follow: with fp8 the gradient then need not transpose them.
    out_features: N_i, needed by nobody but callers that know it; by default the rows of b.

    Everything is computed in the dtype of x (under autocast: in autocast's dtype), to which weights, biases and
    adapters are cast. With fp8, the products with W_i have fp8 factors (`fastft.kernels.fp8`), those with A and B do
    not; every projection must be one that `fp8.obstacle` lets pass, and its weight frozen. Returns [..., N_i] each,
    contiguous. Gradients: x, a, b, and weights and biases where they require it, each in its own dtype. Raises
    UsageError where lengths or shapes do not fit together.
    """
    states = quant_states if quant_states is not None else [[] for _ in weights]
    _check(x, weights, biases, a, b, scales, states, out_features)
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return torch.ops.fastft.lora_linears(
        x,
        weights,
        [bias for bias in biases if bias is not None],
        [bias is not None for bias in biases],
        a,
        b,
        [float(scale) for scale in scales],
        [tensor for state in states for tensor in state],
        [len(state) for state in states],
        fp8,
    )[:-1]


def _check(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    a: list[Tensor],
    b: list[Tensor],
    scales: list[float],
    states: list[list[Tensor]],
    out_features: list[int] | None,
) -> None:
    count = len(weights)
    lists = {"biases": biases, "a": a, "b": b, "scales": scales, "quant_states": states, "out_features": out_features}
    problems = [
        Problem(f"lora_linears {name}", len(value), f"{count} entries, one per weight")
        for name, value in lists.items()
        if value is not None and len(value) != count
    ]
    if not count:
        problems.append(Problem("lora_linears weights", 0, "at least one weight"))
    if problems:
        raise UsageError(*problems)
    k = x.shape[-1]
    for i in range(count):
        n, r = (b[i].shape[0] if out_features is None else out_features[i]), a[i].shape[0]
        if len(states[i]) not in (0, 1, 2, 4):
            problems.append(Problem(f"quant_states[{i}]", len(states[i]), "0, 1, 2 or 4 tensors"))
        if not states[i] and tuple(weights[i].shape) != (n, k):
            problems.append(Problem(f"weights[{i}]", tuple(weights[i].shape), f"shape {(n, k)}"))
        if tuple(a[i].shape) != (r, k):
            problems.append(Problem(f"a[{i}]", tuple(a[i].shape), f"shape {(r, k)}"))
        if tuple(b[i].shape) != (n, r):
            problems.append(Problem(f"b[{i}]", tuple(b[i].shape), f"shape {(n, r)}"))
        if biases[i] is not None and tuple(biases[i].shape) != (n,):
            problems.append(Problem(f"biases[{i}]", tuple(biases[i].shape), f"shape {(n,)}"))
    if problems:
        raise UsageError(*problems)


@torch.library.custom_op("fastft::lora_linears", mutates_args=())
def _lora_linears(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    has_bias: list[bool],
    a: list[Tensor],
    b: list[Tensor],
    scales: list[float],
    quant: list[Tensor],
    quant_counts: list[int],
    fp8: bool,
) -> list[Tensor]:
    """Return the outputs, and x A^T [..., sum of ranks] last, which the backward wants."""
    with torch.autocast(x.device.type, enabled=False):
        rows, states, bias = x.reshape(-1, x.shape[-1]), regroup(quant, quant_counts), iter(biases)
        stack, b = stacked_and_cast(a, b, x.dtype)
        xa = torch.mm(rows, stack.t())
        own = [next(bias) if present else None for present in has_bias]
        pieces = xa.split([matrix.shape[1] for matrix in b], dim=1)
        outputs = lora_products(rows, weights, states, own, pieces, b, scales, fp8)
        return [y.view(*x.shape[:-1], y.shape[1]) for y in (*outputs, xa)]


@_lora_linears.register_fake
def _(x, weights, biases, has_bias, a, b, scales, quant, quant_counts, fp8):
    outputs = [x.new_empty(*x.shape[:-1], matrix.shape[0]) for matrix in b]
    return [*outputs, x.new_empty(*x.shape[:-1], sum(matrix.shape[0] for matrix in a))]


@torch.library.custom_op("fastft::lora_linears_backward", mutates_args=())
def _lora_linears_backward(
    grads: list[Tensor],
    x: Tensor,
    xa: Tensor,
    starts: list[int],
    weights: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    scales: list[float],
    quant: list[Tensor],
    quant_counts: list[int],
    needs_x: bool,
    needs_weight: list[bool],
    needs_bias: list[bool],
    fp8: bool,
    grad_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Return [dx or an empty tensor, dA of all stacked, dB_1 .. dB_n, the needed dW_i, the needed dbias_i].

    starts: where the columns of each projection begin in xa [..., R]. grad_dtype: that of dA and dB, where it is not
    that of a and b.
    """
    with torch.autocast(x.device.type, enabled=False):
        rows, states, dtype = x.reshape(-1, x.shape[-1]), regroup(quant, quant_counts), x.dtype
        xa, dys = xa.reshape(rows.shape[0], xa.shape[-1]), [dy.reshape(-1, dy.shape[-1]) for dy in grads]
        stack, b_cast = stacked_and_cast(a, b, dtype) if needs_x else (None, cast(b, dtype))
        gs, own_xa = [], []
        for i, dy in enumerate(dys):
            r = b[i].shape[1]
            # Each into memory of its own: into a slice of a wider matrix, CUDA's GEMM would round twice.
            g_i = torch.empty(rows.shape[0], r, dtype=dtype, device=x.device)
            gs.append(torch.addmm(g_i, dy, b_cast[i], beta=0, alpha=scales[i], out=g_i))
            own_xa.append(xa[:, starts[i] : starts[i] + r])
        dbs = accumulating_mms([dy.t() for dy in dys], own_xa, [grad_dtype or matrix.dtype for matrix in b], scales)
        g = torch.cat(gs, dim=1) if len(gs) > 1 else gs[0]
        dx = x.new_empty(0)
        if needs_x:
            dx = input_gradient(dys, weights, states, g, stack, fp8).view(x.shape)
        da = accumulating_mm(g.t(), rows, grad_dtype or a[0].dtype)
        dws = [accumulating_mm(dys[i].t(), rows, weights[i].dtype) for i in range(len(dys)) if needs_weight[i]]
        dbias = [dys[i].sum(0, dtype=_sum_dtype(dtype)) for i in range(len(dys)) if needs_bias[i]]
        return [dx, da, *dbs, *dws, *dbias]


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@_lora_linears_backward.register_fake
def _(
    grads, x, xa, starts, weights, a, b, scales, quant, quant_counts, needs_x, needs_weight, needs_bias, fp8,
    grad_dtype=None,
):  # fmt: skip
    stacked = a[0].new_empty(sum(matrix.shape[0] for matrix in a), x.shape[-1], dtype=grad_dtype or a[0].dtype)
    dbs = [matrix.new_empty(matrix.shape, dtype=grad_dtype or matrix.dtype) for matrix in b]
    dws = [weight.new_empty(weight.shape) for weight, needed in zip(weights, needs_weight) if needed]
    dbias = [x.new_empty(b[i].shape[0], dtype=_sum_dtype(x.dtype)) for i, needed in enumerate(needs_bias) if needed]
    return [x.new_empty(x.shape if needs_x else (0,)), stacked, *dbs, *dws, *dbias]


def _setup_context(ctx, inputs, output):
    x, weights, biases, has_bias, a, b, scales, quant, quant_counts, ctx.fp8 = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[-1], *weights, *a, *b, *quant)
    ctx.has_bias, ctx.scales, ctx.quant_counts = has_bias, scales, quant_counts
    ctx.bias_dtypes = [bias.dtype for bias in biases]


def _backward(ctx, grads):
    count = len(ctx.scales)
    x, xa, *rest = ctx.saved_tensors
    weights, a, b = rest[:count], rest[count : 2 * count], rest[2 * count : 3 * count]
    states = regroup(rest[3 * count :], ctx.quant_counts)
    needs_x, needs_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
    needed_bias = iter(ctx.needs_input_grad[2])
    needs_bias = [next(needed_bias) if present else False for present in ctx.has_bias]
    live = [i for i in range(count) if grads[i] is not None]  # an unused output has no gradient
    d_weight, d_a, d_b, d_bias = ([None] * count for _ in range(4))
    dx = None
    if live:
        starts = [sum(matrix.shape[0] for matrix in a[:i]) for i in live]
        results = torch.ops.fastft.lora_linears_backward(
            [grads[i] for i in live], x, xa, starts,
            [weights[i] for i in live], [a[i] for i in live], [b[i] for i in live], [ctx.scales[i] for i in live],
            [tensor for i in live for tensor in states[i]], [ctx.quant_counts[i] for i in live],
            needs_x, [needs_weight[i] for i in live], [needs_bias[i] for i in live], ctx.fp8,
        )  # fmt: skip
        dx, stacked, *rest = results
        dx = dx if needs_x else None
        pieces = torch.split(stacked, [a[i].shape[0] for i in live])
        for i, piece in zip(live, pieces):
            d_a[i], d_b[i] = piece.to(a[i].dtype), rest.pop(0)
        for i in live:
            d_weight[i] = rest.pop(0) if needs_weight[i] else None
        for i in live:
            d_bias[i] = rest.pop(0) if needs_bias[i] else None
    present = [d_bias[i] for i in range(count) if ctx.has_bias[i]]
    present = [None if d is None else d.to(dtype) for d, dtype in zip(present, ctx.bias_dtypes)]
    no_quant = [None] * sum(ctx.quant_counts)
    return dx, d_weight, present, None, d_a, d_b, None, no_quant, None, None


_lora_linears.register_autograd(_backward, setup_context=_setup_context)
