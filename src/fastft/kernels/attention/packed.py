"""Causal attention of documents that lie end to end, and of a sliding window: `fastft::packed_attention`.

Keys and values have fewer heads than queries where a model has it so; none is repeated.
"""

import torch
from torch import Tensor

from fastft.kernels.attention.parts import Part, part_backward, part_forward


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, offsets: Tensor, longest: int, window: int | None = None
) -> Tensor:
    """Return the attention [T, H, D] of q [T, H, D] over k, v [T, Hk, D], Hk a divisor of H.

    offsets [documents + 1] int32 say where each document begins, longest is the length of the longest (or more).
    window: how many tokens a query sees, itself included; None for all of its document up to itself.
    """
    return torch.ops.fastft.packed_attention(q, k, v, offsets, longest, scale, -1 if window is None else window - 1)[0]


def _part(offsets: Tensor, longest: int, scale: float, before: int) -> Part:
    return Part((offsets, offsets), (longest, longest), True, scale, before)


@torch.library.custom_op("fastft::packed_attention", mutates_args=())
def _packed_attention(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, scale: float, before: int
) -> tuple[Tensor, Tensor]:
    """Return (output [T, H, D], logsumexp [H, T]). before: how many tokens before itself a query sees, -1 for all."""
    q, k, v = (t.contiguous() for t in (q, k, v))
    return part_forward(q, k, v, _part(offsets, longest, scale, before))


@_packed_attention.register_fake
def _(q, k, v, offsets, longest, scale, before):
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), lse


@torch.library.custom_op("fastft::packed_attention_backward", mutates_args=())
def _packed_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, offsets: Tensor, longest: int,
    scale: float, before: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (dq, dk, dv)."""
    grad, q, k, v = (t.contiguous() for t in (grad, q, k, v))
    return part_backward(grad, q, k, v, out, lse, _part(offsets, longest, scale, before))


@_packed_attention_backward.register_fake
def _(grad, q, k, v, out, lse, offsets, longest, scale, before):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    q, k, v, offsets, *ctx.numbers = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, offsets)


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 7
    made = torch.ops.fastft.packed_attention_backward(grad, *ctx.saved_tensors, *ctx.numbers)
    return *made, *(None,) * 4


_packed_attention.register_autograd(_backward, setup_context=_setup_context)
