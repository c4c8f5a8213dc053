"""The registered op `fastft::rope`; its backward is the same op with the angles negated."""

from typing import Any

import torch
from torch import Tensor

from fastft.errors import Problem, UsageError
from fastft.kernels.dispatch import use_triton
from fastft.kernels.rope import ref
from fastft.kernels.rope.launch import MAX_HEAD


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Rotate the first R features of queries q [B, H, T, D] and keys k [B, Hk, T, D] by position.

    cos and sin [B or 1, T, R/2] hold one value per rotated pair, with any attention scaling multiplied in; they get no
    gradient. Layout "half" pairs features (i, i + R/2), "interleaved" (2i, 2i + 1); features from R on pass unchanged.
    Products and sums are rounded to the promoted dtype of q and cos, as separate torch calls do: hand over fp32 tables
    where a model rotates in fp32. Returns contiguous [B, H, T, D] and [B, Hk, T, D] in the dtypes of q and k, which may
    come with any strides. Raises UsageError for an unknown layout, or shapes or dtypes that do not fit together.
    """
    problems = [*_shape_problems(q, k, cos, sin)]
    if layout not in ref.LAYOUTS:
        problems.append(Problem("layout", layout, f"one of {ref.LAYOUTS}"))
    if problems:
        raise UsageError(*problems)
    return torch.ops.fastft.rope(q, k, cos, sin, layout, False)


def _shape_problems(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> list[Problem]:
    if q.dim() != 4 or cos.dim() != 3:
        return [Problem("q, cos", (tuple(q.shape), tuple(cos.shape)), "[B, H, T, D] and [B or 1, T, R/2]")]
    (batch, _, tokens, width), problems = q.shape, []
    if k.dim() != 4 or (k.shape[0], *k.shape[2:]) != (batch, tokens, width):
        problems.append(Problem("k", tuple(k.shape), f"[{batch}, Hk, {tokens}, {width}], as q {tuple(q.shape)}"))
    if cos.shape[0] not in (1, batch) or cos.shape[1] != tokens or 2 * cos.shape[2] > width:
        problems.append(Problem("cos", tuple(cos.shape), f"[1 or {batch}, {tokens}, at most {width // 2}]"))
    if sin.shape != cos.shape:
        problems.append(Problem("sin", tuple(sin.shape), f"the shape of cos, {tuple(cos.shape)}"))
    if k.dtype != q.dtype or sin.dtype != cos.dtype:
        dtypes = (q.dtype, k.dtype, cos.dtype, sin.dtype)
        problems.append(Problem("dtypes of q, k, cos, sin", dtypes, "k as q, sin as cos"))
    return problems


@torch.library.custom_op(
    "fastft::rope",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor cos, Tensor sin, str layout, bool inverse) -> (Tensor, Tensor)",
)
def _rope(q, k, cos, sin, layout, inverse):
    if use_triton(q, k, cos, sin) and q.shape[-1] <= MAX_HEAD:
        from fastft.kernels.rope import triton as kernels

        return kernels.rotate(q, k, cos, sin, layout, inverse)
    q, k = ref.rope(q, k, cos, -sin if inverse else sin, layout)
    return q.contiguous(), k.contiguous()


@_rope.register_fake
def _(q, k, cos, sin, layout, inverse):
    def like(given):
        return torch.empty(given.shape, dtype=given.dtype, device=given.device)

    return like(q), like(k)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, ctx.layout, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple:
    cos, sin = ctx.saved_tensors
    return *torch.ops.fastft.rope(dq, dk, cos, sin, ctx.layout, not ctx.inverse), None, None, None, None


_rope.register_autograd(_backward, setup_context=_setup_context)
