"""A gated feed-forward of three LoRA linears as two registered ops, between which only GEMM results lie.

With s the scales and (A, B) the adapters of gate, up and down, for rows x [M, K]:

    gate0 = x W_g^T,  up0 = x W_u^T,  xa = x [A_g; A_u]^T                        `fastft::linears`
    gate = gate0 + s_g xa_g B_g^T,  up = up0 + s_u xa_u B_u^T,  h = act(gate) * up
    ha = h A_d^T,  y = h W_d^T + s_d ha B_d^T                                    `fastft::lora_glu_down`

and in the backward of the second, with g = s_d dy B_d:

    dh = dy W_d + g A_d,  dgate = dh * up * act'(gate),  dup = dh * act(gate)
    dxa = [s_g dgate B_g, s_u dup B_u],  dB_g = s_g dgate^T xa_g,  dB_u = s_u dup^T xa_u,  dA_d = g^T h,
    dB_d = s_d dy^T ha

gate0, up0, xa and ha are kept between them, h is not: it is computed anew in the kernel that needs it. That one reads
dh, gate0 and up0 once and writes dgate and dup once, and makes all low-rank products on the way. With `eight_bits` the
forward gives the same, and gate and up are kept in their place, in 8 bits a number (`eight_bits.compress`).
"""

import math
from typing import Any

import torch
from torch import Tensor

from fastft.errors import Problem, UsageError
from fastft.kernels.dispatch import use_triton
from fastft.kernels.glu import ref as glu_ref
from fastft.kernels.lora.casts import cast
from fastft.kernels.lora.gemm import accumulating_mm, dense, lora_products, product_gradient
from fastft.kernels.lora.linears import linears
from fastft.kernels.lora_glu import plain
from fastft.kernels.lora_glu.eight_bits import shapes
from fastft.kernels.lora_glu.launch import MAX_RANK
from fastft.kernels.rows import as_matrix


def feed_forward(
    x: Tensor,
    weights: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    scales: list[float],
    quant_states: list[list[Tensor]],
    activation: str,
    fp8: bool = False,
    eight_bits: bool = False,
) -> Tensor:
    """Return down(activation(gate(x)) * up(x)), each projection a LoRA linear on a frozen weight without bias.

    x: [..., K]. The lists hold gate's, up's and down's: weights [N, K], [N, K], [K, N] or packed NF4 bytes, with
    quant_states as `lora_linears` takes them; a [r, K], [r, K], [r, N]; b [N, r], [N, r], [K, r], of ranks of at least
    1 that may differ. Or they hold two, of one projection that gives gate and up side by side ([2N, K], a [r, K],
    b [2N, r]), and of down. Computed in the dtype of x (under autocast: in autocast's dtype); with fp8, the
    products with the weights have fp8 factors, as in `lora_linears`; with eight_bits, the backward reads gate and up as
    they are in 8 bits. Returns [..., K].
    Gradients: x, a and b, each in its own dtype; weights get none. Raises UsageError where shapes do not fit together.
    """
    packed = len(weights) == 2
    wide = b[0].shape[0] // (2 if packed else 1)
    _check(x, a, b, weights, quant_states, activation, wide)
    if packed:
        both, xa = linears(x, weights[:1], a[:1], quant_states[:1], [2 * wide], fp8)
        (gate0, up0), (b_gate, b_up) = both.chunk(2, -1), b[0].chunk(2, 0)
        xa = torch.cat([xa, xa], -1)
        scales = [scales[0], *scales]
    else:
        gate0, up0, xa = linears(x, weights[:2], a[:2], quant_states[:2], [wide, wide], fp8)
        b_gate, b_up = b[:2]
    return torch.ops.fastft.lora_glu_down(
        gate0,
        up0,
        xa,
        b_gate,
        b_up,
        a[-1],
        b[-1],
        weights[-1],
        quant_states[-1],
        [float(s) for s in scales],
        activation,
        fp8,
        eight_bits,
    )[0]


def _check(
    x: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    weights: list[Tensor],
    quant_states: list[list[Tensor]],
    activation: str,
    wide: int,
) -> None:
    narrow = x.shape[-1]
    shapes = (
        [(wide, narrow), (wide, narrow), (narrow, wide)] if len(weights) == 3 else [(2 * wide, narrow), (narrow, wide)]
    )
    problems = []
    if activation not in glu_ref.ACTIVATIONS:
        problems.append(Problem("activation", activation, f"one of {glu_ref.ACTIVATIONS}"))
    for i, (out, into) in enumerate(shapes):
        rank = a[i].shape[0]
        if rank < 1 or tuple(a[i].shape) != (rank, into):
            problems.append(Problem(f"a[{i}]", tuple(a[i].shape), f"shape (r, {into}) with r at least 1"))
        if tuple(b[i].shape) != (out, rank):
            problems.append(Problem(f"b[{i}]", tuple(b[i].shape), f"shape {(out, rank)}"))
        if not quant_states[i] and tuple(weights[i].shape) != (out, into):
            problems.append(Problem(f"weights[{i}]", tuple(weights[i].shape), f"shape {(out, into)}"))
    if problems:
        raise UsageError(*problems)


def _kernels(given: Tensor, *ranks: int) -> Any:
    """Return the Triton kernels for 16 bits and small ranks where atomics may sum in any order, else plain torch."""
    small = given.dtype in (torch.bfloat16, torch.float16) and max(ranks) <= MAX_RANK and given.numel() > 0
    if not small or not use_triton(given) or torch.are_deterministic_algorithms_enabled():
        return plain
    from fastft.kernels.lora_glu import triton

    return triton


@torch.library.custom_op("fastft::lora_glu_down", mutates_args=())
def _lora_glu_down(
    gate0: Tensor,
    up0: Tensor,
    xa: Tensor,
    b_gate: Tensor,
    b_up: Tensor,
    a_down: Tensor,
    b_down: Tensor,
    weight: Tensor,
    quant: list[Tensor],
    scales: list[float],
    activation: str,
    fp8: bool,
    eight_bits: bool,
) -> list[Tensor]:
    """Return [y [..., K], ha [..., r_down]], the second for the backward.

    With eight_bits also, for the backward, gate and up in 8 bits and their scales, as `eight_bits.compress` gives them
    for matrices.
    """
    with torch.autocast(gate0.device.type, enabled=False):
        lead, dtype = gate0.shape[:-1], gate0.dtype
        gate0, up0, xa = as_matrix(gate0), as_matrix(up0), as_matrix(xa)
        b_gate, b_up, b_down = cast([b_gate, b_up, b_down], dtype)
        pair = (scales[0], scales[1])
        kernels = _kernels(gate0, b_gate.shape[1], b_up.shape[1], a_down.shape[0])
        h, ha, *kept = kernels.forward(gate0, up0, xa, b_gate, b_up, a_down, pair, activation, eight_bits)
        (y,) = lora_products(h, [weight], [quant], [None], [ha], [b_down], [scales[2]], fp8)
        return [y.view(*lead, y.shape[1]), ha.view(*lead, ha.shape[1]), *kept]


@_lora_glu_down.register_fake
def _(gate0, up0, xa, b_gate, b_up, a_down, b_down, weight, quant, scales, activation, fp8, eight_bits):
    lead = gate0.shape[:-1]
    made = [gate0.new_empty(*lead, b_down.shape[0]), gate0.new_empty(*lead, a_down.shape[0])]
    if eight_bits:
        of_q, of_scale = shapes(math.prod(lead), gate0.shape[-1])
        made += [gate0.new_empty(of_q, dtype=torch.uint8), gate0.new_empty(of_scale, dtype=torch.float32)]
    return made


@torch.library.custom_op("fastft::lora_glu_down_backward", mutates_args=())
def _lora_glu_down_backward(
    dy: Tensor,
    kept: list[Tensor],
    xa: Tensor,
    ha: Tensor,
    b_gate: Tensor,
    b_up: Tensor,
    a_down: Tensor,
    b_down: Tensor,
    weight: Tensor,
    quant: list[Tensor],
    scales: list[float],
    activation: str,
    fp8: bool,
    grad_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (dgate0, dup0, dxa, dB_gate, dB_up, dA_down, dB_down), the adapters' in their own dtypes or `grad_dtype`.

    kept: [gate0, up0], or [q, scale] that the forward made of gate and up in 8 bits.
    """
    with torch.autocast(dy.device.type, enabled=False):
        lead, wide, dtype = dy.shape[:-1], b_gate.shape[0], dy.dtype
        dy, xa, ha = as_matrix(dy), as_matrix(xa), as_matrix(ha)
        first, second = kept if kept[0].dtype == torch.uint8 else (as_matrix(kept[0]), as_matrix(kept[1]))
        own_dtypes = [grad_dtype or matrix.dtype for matrix in (b_gate, b_up, a_down, b_down)]
        b_gate, b_up, b_down = cast([b_gate, b_up, b_down], dtype)
        g = torch.empty(dy.shape[0], b_down.shape[1], dtype=dtype, device=dy.device)
        torch.addmm(g, dy, b_down, beta=0, alpha=scales[2], out=g)
        db_down = accumulating_mm(dy.t(), ha, own_dtypes[3], scales[2])
        if fp8:
            dh = product_gradient([dy], [weight], [quant], wide)
        else:
            dh = torch.mm(dy, dense(weight, quant, dy.shape[1], wide, dtype))
        pair = (scales[0], scales[1])
        kernels = _kernels(dh, b_gate.shape[1], b_up.shape[1], a_down.shape[0])
        made = kernels.backward(dh, first, second, xa, g, b_gate, b_up, a_down, pair, activation, own_dtypes[:3])
        dgate, dup, dxa, *adapters = made
        return dgate.view(*lead, wide), dup.view(*lead, wide), dxa.view(*lead, dxa.shape[1]), *adapters, db_down


@_lora_glu_down_backward.register_fake
def _(dy, kept, xa, ha, b_gate, b_up, a_down, b_down, weight, quant, scales, activation, fp8, grad_dtype=None):
    wide, matrices = b_gate.shape[0], (b_gate, b_up, a_down, b_down)
    dgate, dup = (dy.new_empty(*dy.shape[:-1], wide) for _ in range(2))
    return dgate, dup, xa.new_empty(xa.shape), *(t.new_empty(t.shape, dtype=grad_dtype or t.dtype) for t in matrices)


def _setup_context(ctx, inputs, output):
    gate0, up0, *tensors, quant, ctx.scales, ctx.activation, ctx.fp8, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(output[2:] or (gate0, up0)), *tensors, output[1], *quant)


def _backward(ctx, grads):
    first, second, xa, b_gate, b_up, a_down, b_down, weight, ha, *quant = ctx.saved_tensors
    if grads[0] is None:
        return (*(None,) * 8, [None] * len(quant), *(None,) * 4)
    made = torch.ops.fastft.lora_glu_down_backward(
        grads[0], [first, second], xa, ha, b_gate, b_up, a_down, b_down, weight, quant, ctx.scales, ctx.activation,
        ctx.fp8,
    )  # fmt: skip
    return *made, None, [None] * len(quant), None, None, None, None


_lora_glu_down.register_autograd(_backward, setup_context=_setup_context)
