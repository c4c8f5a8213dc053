"""The registered ops `fastft::rms_norm` and `fastft::rms_norm_backward`."""

from typing import Any

import torch
from torch import Tensor

from fastft.errors import Problem, UsageError
from fastft.kernels.dispatch import use_triton
from fastft.kernels.rms_norm import ref
from fastft.kernels.rms_norm.launch import MAX_WIDTH

CASTS = ("before_weight", "after_weight")


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, cast: str) -> Tensor:
    """Normalise x [..., D] by its root mean square over D and multiply by (offset + weight), weight [D].

    Computed in fp32 (fp64 for fp64 input). cast="before_weight" rounds to x's dtype before the weight (Llama) and
    returns the promoted dtype of x and weight; "after_weight" rounds at the end (Gemma, OLMo 2) and returns x's dtype.
    The result is contiguous; x may have any strides. Differentiable in x and weight, a frozen weight costing nothing.
    Raises UsageError for an unknown `cast` or a weight of another shape.
    """
    problems = []
    if cast not in CASTS:
        problems.append(Problem("cast", cast, f"one of {CASTS}"))
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        problems.append(
            Problem("weight", tuple(weight.shape), f"the shape of x's last dimension, x being {tuple(x.shape)}")
        )
    if problems:
        raise UsageError(*problems)
    return torch.ops.fastft.rms_norm(x, weight, eps, offset, cast)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _output_dtype(x: Tensor, weight: Tensor, cast: str) -> torch.dtype:
    return torch.promote_types(x.dtype, weight.dtype) if cast == "before_weight" else x.dtype


def _on_triton(*tensors: Tensor) -> bool:
    return use_triton(*tensors) and 0 < tensors[0].shape[-1] <= MAX_WIDTH


@torch.library.custom_op(
    "fastft::rms_norm", mutates_args=(), schema="(Tensor x, Tensor weight, float eps, float offset, str cast) -> Tensor"
)
def _rms_norm(x, weight, eps, offset, cast):
    if _on_triton(x, weight):
        from fastft.kernels.rms_norm import triton as kernels

        return kernels.forward(x, weight, eps, offset, cast == "before_weight", _output_dtype(x, weight, cast))
    return ref.rms_norm(x, weight, eps, offset, cast, _compute_dtype(x)).contiguous()


@_rms_norm.register_fake
def _(x, weight, eps, offset, cast):
    return torch.empty(x.shape, dtype=_output_dtype(x, weight, cast), device=x.device)


@torch.library.custom_op(
    "fastft::rms_norm_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor weight, float eps, float offset, bool need_weight) -> (Tensor, Tensor)",
)
def _rms_norm_backward(dy, x, weight, eps, offset, need_weight):
    if _on_triton(x, dy, weight):
        from fastft.kernels.rms_norm import triton as kernels

        dx, dweight = kernels.backward(dy, x, weight, eps, offset, need_weight)
    else:
        dx, dweight = ref.rms_norm_backward(dy, x, weight, eps, offset, _compute_dtype(x))
        dx = dx.contiguous()
    return dx, dweight.contiguous() if need_weight else weight.new_empty(0)


@_rms_norm_backward.register_fake
def _(dy, x, weight, eps, offset, need_weight):
    dweight = torch.empty(weight.shape if need_weight else (0,), dtype=weight.dtype, device=weight.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), dweight


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, ctx.eps, ctx.offset, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, dy: Tensor) -> tuple:
    x, weight = ctx.saved_tensors
    dx, dweight = torch.ops.fastft.rms_norm_backward(dy, x, weight, ctx.eps, ctx.offset, ctx.needs_input_grad[1])
    return dx if ctx.needs_input_grad[0] else None, dweight if ctx.needs_input_grad[1] else None, None, None, None


_rms_norm.register_autograd(_backward, setup_context=_setup_context)
