"""The registered ops `fastft::glu` and `fastft::glu_backward`."""

from typing import Any

import torch
from torch import Tensor

from fastft.errors import Problem, UsageError
from fastft.kernels.dispatch import use_triton
from fastft.kernels.glu import ref


def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return activation(gate) * up for gate and up of one shape [..., N]; activation "silu", "gelu_tanh" or "gelu".

    The activation is computed in fp32 and rounded to gate's dtype before the product, as separate torch calls do; the
    result has the promoted dtype and is contiguous. gate and up may be the two halves of one packed tensor: they are
    read where they lie. Differentiable in both; the backward computes the activation anew instead of keeping it.
    Raises UsageError for an unknown activation or shapes that differ.
    """
    problems = []
    if activation not in ref.ACTIVATIONS:
        problems.append(Problem("activation", activation, f"one of {ref.ACTIVATIONS}"))
    if gate.shape != up.shape or gate.dim() == 0:
        problems.append(
            Problem("up", tuple(up.shape), f"the shape of gate, {tuple(gate.shape)}, of at least one dimension")
        )
    if problems:
        raise UsageError(*problems)
    return torch.ops.fastft.glu(gate, up, activation)


@torch.library.custom_op("fastft::glu", mutates_args=(), schema="(Tensor gate, Tensor up, str activation) -> Tensor")
def _glu(gate, up, activation):
    if use_triton(gate, up):
        from fastft.kernels.glu import triton as kernels

        return kernels.forward(gate, up, activation, torch.promote_types(gate.dtype, up.dtype))
    return ref.glu(gate, up, activation).contiguous()


@_glu.register_fake
def _(gate, up, activation):
    return torch.empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype), device=gate.device)


@torch.library.custom_op(
    "fastft::glu_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)",
)
def _glu_backward(dy, gate, up, activation):
    if use_triton(gate, up, dy):
        from fastft.kernels.glu import triton as kernels

        return kernels.backward(dy, gate, up, activation)
    dgate, dup = ref.glu_backward(dy, gate, up, activation)
    return dgate.contiguous(), dup.contiguous()


@_glu_backward.register_fake
def _(dy, gate, up, activation):
    def like(given):
        return torch.empty(given.shape, dtype=given.dtype, device=given.device)

    return like(gate), like(up)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, dy: Tensor) -> tuple:
    return *torch.ops.fastft.glu_backward(dy, *ctx.saved_tensors, ctx.activation), None


_glu.register_autograd(_backward, setup_context=_setup_context)
