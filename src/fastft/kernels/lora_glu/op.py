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
dh, gate0 and up0 once and writes dgate and dup once, and makes all low-rank products on the way.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastft.errors import Problem, UsageError
from fastft.kernels.dispatch import use_triton
from fastft.kernels.glu import ref as glu_ref
from fastft.kernels.lora.gemm import accumulating_mm, dense, lora_product
from fastft.kernels.lora.linears import linears
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
) -> Tensor:
    """Return down(activation(gate(x)) * up(x)), each projection a LoRA linear on a frozen weight without bias.

    x: [..., K]. The lists hold gate's, up's and down's: weights [N, K], [N, K], [K, N] or packed NF4 bytes, with
    quant_states as `lora_linears` takes them; a [r, K], [r, K], [r, N]; b [N, r], [N, r], [K, r], of ranks of at least
    1 that may differ. Or they hold two, of one projection that gives gate and up side by side ([2N, K], a [r, K],
    b [2N, r]), and of down. Computed in the dtype of x (under autocast: in autocast's dtype). Returns [..., K].
    Gradients: x, a and b, each in its own dtype; weights get none. Raises UsageError where shapes do not fit together.
    """
    packed = len(weights) == 2
    wide = b[0].shape[0] // (2 if packed else 1)
    _check(x, a, b, weights, quant_states, activation, wide)
    if packed:
        both, xa = linears(x, weights[:1], a[:1], quant_states[:1], [2 * wide])
        (gate0, up0), (b_gate, b_up) = both.chunk(2, -1), b[0].chunk(2, 0)
        xa = torch.cat([xa, xa], -1)
        scales = [scales[0], *scales]
    else:
        gate0, up0, xa = linears(x, weights[:2], a[:2], quant_states[:2], [wide, wide])
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


def _fused(gate0: Tensor, *ranks: int) -> bool:
    """Say whether the Triton kernels run: 16 bits, small ranks, and atomics allowed to sum in any order."""
    small = gate0.dtype in (torch.bfloat16, torch.float16) and max(ranks) <= MAX_RANK and gate0.numel() > 0
    return small and use_triton(gate0) and not torch.are_deterministic_algorithms_enabled()


def _gate_up(
    gate0: Tensor, up0: Tensor, xa: Tensor, b_gate: Tensor, b_up: Tensor, scales: list[float]
) -> tuple[Tensor, Tensor]:
    dtype, rank = gate0.dtype, b_gate.shape[1]
    gate = torch.addmm(gate0, xa[:, :rank], b_gate.to(dtype).t(), alpha=scales[0])
    return gate, torch.addmm(up0, xa[:, rank:], b_up.to(dtype).t(), alpha=scales[1])


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
) -> tuple[Tensor, Tensor]:
    """Return (y [..., K], ha [..., r_down]), the second for the backward."""
    with torch.autocast(gate0.device.type, enabled=False):
        lead, dtype = gate0.shape[:-1], gate0.dtype
        gate0, up0, xa = as_matrix(gate0), as_matrix(up0), as_matrix(xa)
        if _fused(gate0, b_gate.shape[1], b_up.shape[1], a_down.shape[0]):
            from fastft.kernels.lora_glu import triton as kernels

            h, ha = kernels.forward(gate0, up0, xa, b_gate, b_up, a_down, (scales[0], scales[1]), activation)
        else:
            h = glu_ref.glu(*_gate_up(gate0, up0, xa, b_gate, b_up, scales), activation)
            ha = F.linear(h, a_down.to(dtype))
        y = lora_product(h, weight, quant, None, ha, b_down, scales[2])
        return y.view(*lead, y.shape[1]), ha.view(*lead, ha.shape[1])


@_lora_glu_down.register_fake
def _(gate0, up0, xa, b_gate, b_up, a_down, b_down, weight, quant, scales, activation):
    lead = gate0.shape[:-1]
    return gate0.new_empty(*lead, b_down.shape[0]), gate0.new_empty(*lead, a_down.shape[0])


@torch.library.custom_op("fastft::lora_glu_down_backward", mutates_args=())
def _lora_glu_down_backward(
    dy: Tensor,
    gate0: Tensor,
    up0: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (dgate0, dup0, dxa, dB_gate, dB_up, dA_down, dB_down), the adapters' in their own dtypes."""
    with torch.autocast(gate0.device.type, enabled=False):
        shape, dtype = gate0.shape, gate0.dtype
        dy, gate0, up0, xa, ha = (as_matrix(t) for t in (dy, gate0, up0, xa, ha))
        g = torch.empty(dy.shape[0], b_down.shape[1], dtype=dtype, device=dy.device)
        torch.addmm(g, dy, b_down.to(dtype), beta=0, alpha=scales[2], out=g)
        db_down = accumulating_mm(dy.t(), ha, b_down.dtype, scales[2])
        dh = torch.mm(dy, dense(weight, quant, dy.shape[1], shape[-1], dtype))
        pair = (scales[0], scales[1])
        if _fused(gate0, b_gate.shape[1], b_up.shape[1], a_down.shape[0]):
            from fastft.kernels.lora_glu import triton as kernels

            made = kernels.backward(dh, gate0, up0, xa, g, b_gate, b_up, a_down, pair, activation)
        else:
            made = _torch_backward(dh, gate0, up0, xa, g, b_gate, b_up, a_down, pair, activation)
        dgate, dup, dxa, *adapters = made
        own = [given.to(like.dtype).contiguous() for given, like in zip(adapters, (b_gate, b_up, a_down))]
        return dgate.view(shape), dup.view(shape), dxa.view(*shape[:-1], dxa.shape[1]), *own, db_down


def _torch_backward(
    dh: Tensor, gate0: Tensor, up0: Tensor, xa: Tensor, g: Tensor, b_gate: Tensor, b_up: Tensor, a_down: Tensor,
    scales: tuple[float, float], activation: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Do what `triton.backward` does in plain torch."""
    dtype, rank = gate0.dtype, b_gate.shape[1]
    gate, up = _gate_up(gate0, up0, xa, b_gate, b_up, list(scales))
    dh = dh.addmm_(g, a_down.to(dtype))
    dgate, dup = glu_ref.glu_backward(dh, gate, up, activation)
    da_down = accumulating_mm(g.t(), glu_ref.glu(gate, up, activation), a_down.dtype)
    dxa = torch.cat([scales[0] * (dgate @ b_gate.to(dtype)), scales[1] * (dup @ b_up.to(dtype))], 1)
    db_gate = accumulating_mm(dgate.t(), xa[:, :rank], b_gate.dtype, scales[0])
    return dgate, dup, dxa, db_gate, accumulating_mm(dup.t(), xa[:, rank:], b_up.dtype, scales[1]), da_down


@_lora_glu_down_backward.register_fake
def _(dy, gate0, up0, xa, ha, b_gate, b_up, a_down, b_down, weight, quant, scales, activation):
    wide, matrices = (gate0, up0, xa), (b_gate, b_up, a_down, b_down)
    return (*(gate0.new_empty(t.shape) for t in wide), *(t.new_empty(t.shape) for t in matrices))


def _setup_context(ctx, inputs, output):
    *tensors, quant, ctx.scales, ctx.activation = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1], *quant)


def _backward(ctx, dy, _):
    gate0, up0, xa, b_gate, b_up, a_down, b_down, weight, ha, *quant = ctx.saved_tensors
    if dy is None:
        return (None,) * 11
    made = torch.ops.fastft.lora_glu_down_backward(
        dy, gate0, up0, xa, ha, b_gate, b_up, a_down, b_down, weight, quant, ctx.scales, ctx.activation
    )
    return *made, None, [None] * len(quant), None, None


_lora_glu_down.register_autograd(_backward, setup_context=_setup_context)
