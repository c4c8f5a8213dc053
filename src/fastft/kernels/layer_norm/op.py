"""The registered ops `fastft::layer_norm` and `fastft::layer_norm_backward`."""

from typing import Any

import torch
from torch import Tensor

from fastft.errors import Problem, UsageError
from fastft.kernels.dispatch import use_triton
from fastft.kernels.layer_norm import ref
from fastft.kernels.layer_norm.launch import MAX_HEADS, MAX_WIDTH


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalise x [..., D] to mean 0 and variance 1 over D, then multiply by `weight` and add `bias`.

    weight and bias are [D], or [H, D] for x [..., H, D] (one row per head), or None. Computed in fp32 (fp64 for fp64
    input) and rounded to x's dtype at the end. The result is contiguous; x may have any strides. Differentiable in
    x, weight and bias. Raises UsageError for a weight or bias of another shape, or of different shapes.
    """
    allowed = (x.shape[-1:], x.shape[-2:]) if x.dim() >= 2 else (x.shape,)
    problems = [
        Problem(name, tuple(given.shape), f"[D] or [H, D] of x, one of {[tuple(shape) for shape in allowed]}")
        for name, given in (("weight", weight), ("bias", bias))
        if given is not None and given.shape not in allowed
    ]
    if weight is not None and bias is not None and weight.shape != bias.shape:
        problems.append(Problem("bias", tuple(bias.shape), f"the shape of weight, {tuple(weight.shape)}"))
    if x.dim() == 0:
        problems.append(Problem("x", "a scalar", "a tensor of at least one dimension"))
    if problems:
        raise UsageError(*problems)
    return torch.ops.fastft.layer_norm(x, weight, bias, eps)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _heads(weight: Tensor | None, bias: Tensor | None) -> int:
    affine = bias if weight is None else weight
    return affine.shape[0] if affine is not None and affine.dim() == 2 else 1


def _on_triton(x: Tensor, weight: Tensor | None, bias: Tensor | None, *others: Tensor) -> bool:
    fits = 0 < x.shape[-1] <= MAX_WIDTH and 0 < _heads(weight, bias) <= MAX_HEADS
    return fits and use_triton(x, weight, bias, *others)


@torch.library.custom_op(
    "fastft::layer_norm", mutates_args=(), schema="(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor"
)
def _layer_norm(x, weight, bias, eps):
    if _on_triton(x, weight, bias):
        from fastft.kernels.layer_norm import triton as kernels

        return kernels.forward(x, weight, bias, eps, _heads(weight, bias))
    return ref.layer_norm(x, weight, bias, eps, _compute_dtype(x)).contiguous()


@_layer_norm.register_fake
def _(x, weight, bias, eps):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op(
    "fastft::layer_norm_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, float eps, bool need_weight, bool need_bias)"
    " -> (Tensor, Tensor, Tensor)",
)
def _layer_norm_backward(dy, x, weight, bias, eps, need_weight, need_bias):
    affine = bias if weight is None else weight
    shape = x.shape[-1:] if affine is None else affine.shape
    if _on_triton(x, weight, bias, dy):
        from fastft.kernels.layer_norm import triton as kernels

        dx, dweight, dbias = kernels.backward(dy, x, weight, eps, _heads(weight, bias), need_weight, need_bias)
    else:
        dx, dweight, dbias = ref.layer_norm_backward(dy, x, weight, eps, shape, _compute_dtype(x))
        # What needs no summing is dy itself, which an op must not return.
        dx, dbias = dx.contiguous(), dbias.clone()
    dweight = dweight.reshape(shape).to(weight.dtype) if need_weight else x.new_empty(0)
    return dx, dweight, dbias.reshape(shape).to(bias.dtype) if need_bias else x.new_empty(0)


@_layer_norm_backward.register_fake
def _(dy, x, weight, bias, eps, need_weight, need_bias):
    def like(given, needed):
        if not needed:
            return torch.empty((0,), dtype=x.dtype, device=x.device)
        return torch.empty(given.shape, dtype=given.dtype, device=x.device)

    return torch.empty(x.shape, dtype=x.dtype, device=x.device), like(weight, need_weight), like(bias, need_bias)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx: Any, dy: Tensor) -> tuple:
    x, weight, bias = ctx.saved_tensors
    need = ctx.needs_input_grad
    dx, dweight, dbias = torch.ops.fastft.layer_norm_backward(dy, x, weight, bias, ctx.eps, need[1], need[2])
    return dx if need[0] else None, dweight if need[1] else None, dbias if need[2] else None, None


_layer_norm.register_autograd(_backward, setup_context=_setup_context)
