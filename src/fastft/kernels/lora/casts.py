"""Adapters in the dtype of a computation, and their gradients scaled: many small matrices in one launch.

On a GPU a copy of an adapter takes about as long as its launch. `_foreach_copy_` and `_foreach_mul_` launch one kernel
for all matrices of a list (per some hundred of them) where those are dense and of one dtype on either side; elsewhere
they go through them one by one. Every number is rounded as `.to` and `mul_` round it.
"""

import torch
from torch import Tensor


def cast(matrices: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return the matrices in `dtype`, those that are in it already as they are."""
    made = [m if m.dtype == dtype else torch.empty_like(m, dtype=dtype) for m in matrices]
    _copy(made, matrices)
    return made


def stacked_and_cast(a: list[Tensor], b: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Return the matrices a [r_i, K] one under the other, and each of b, in `dtype`."""
    if len(a) == 1:
        stack, *others = cast([a[0], *b], dtype)
        return stack, others
    ranks = [matrix.shape[0] for matrix in a]
    stack = torch.empty(sum(ranks), a[0].shape[1], dtype=dtype, device=a[0].device)
    made = [m if m.dtype == dtype else torch.empty_like(m, dtype=dtype) for m in b]
    _copy([*stack.split(ranks), *made], [*a, *b])
    return stack, made


def transposed(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the transpose in `dtype`, contiguous: by one copy."""
    return torch.empty(matrix.shape[1], matrix.shape[0], dtype=dtype, device=matrix.device).copy_(matrix.t())


def scale_(matrices: list[Tensor], scales: list[float]) -> None:
    """Multiply every matrix by its scale, in place; a scale of 1 costs nothing."""
    pairs = [(matrix, scale) for matrix, scale in zip(matrices, scales, strict=True) if scale != 1.0]
    if pairs:
        torch._foreach_mul_([matrix for matrix, _ in pairs], [scale for _, scale in pairs])


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    pairs = [(target, source) for target, source in zip(targets, sources, strict=True) if target is not source]
    if pairs:
        torch._foreach_copy_([target for target, _ in pairs], [source for _, source in pairs])
