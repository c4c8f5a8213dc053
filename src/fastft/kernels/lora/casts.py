"""Adapters in the dtype of a computation, and their gradients scaled: many small matrices in a launch or two.

On a GPU a copy of an adapter takes about as long as its launch. Those of an operation are laid one after the other and
cast together: two short kernels, which took about 5 us where `_foreach_copy_`, which is one and gives 65,536 numbers to
each of its few programs, took 11. Every number is rounded as `.to` and `mul_` round it.
"""

import torch
from torch import Tensor

ALIGNED = 8
"""Numbers in 16 bits that GEMMs want to begin together."""


def cast(matrices: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return the matrices in `dtype`, those that are in it already as they are."""
    return _cast_around([], matrices, dtype)[1]


def stacked_and_cast(a: list[Tensor], b: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Return the matrices a [r_i, K] one under the other, and each of b, in `dtype`."""
    if len(a) == 1:
        stack, *others = cast([*a, *b], dtype)
        return stack, others
    if _in_a_row(a, dtype):
        width = a[0].shape[1]
        return a[0].as_strided((sum(m.shape[0] for m in a), width), (width, 1)), cast(b, dtype)
    if not all(joins(m, dtype) for m in a):
        return torch.cat(cast(a, dtype)), cast(b, dtype)
    stack, others = _cast_around(a, b, dtype)
    return stack.view(-1, a[0].shape[1]), others


def transposed(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the transpose in `dtype`, contiguous: by one copy."""
    return torch.empty(matrix.shape[1], matrix.shape[0], dtype=dtype, device=matrix.device).copy_(matrix.t())


def scale_(matrices: list[Tensor], scales: list[float]) -> None:
    """Multiply every matrix by its scale, in place; a scale of 1 costs nothing."""
    pairs = [(matrix, scale) for matrix, scale in zip(matrices, scales, strict=True) if scale != 1.0]
    if pairs:
        torch._foreach_mul_([matrix for matrix, _ in pairs], [scale for _, scale in pairs])


@torch.library.custom_op("fastft::cast_matrices", mutates_args=())
def cast_matrices(matrices: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the numbers of all matrices in `dtype`, one matrix after the other."""
    return torch.cat([m.reshape(-1) for m in matrices]).to(dtype)


@cast_matrices.register_fake
def _(matrices, dtype):
    return matrices[0].new_empty(sum(m.numel() for m in matrices), dtype=dtype)


def _in_a_row(matrices: list[Tensor], dtype: torch.dtype) -> bool:
    """Say whether the matrices have the dtype and lie one after the other in one piece of memory."""
    if any(m.dtype != dtype or not m.is_contiguous() for m in matrices):
        return False
    if len({m.untyped_storage().data_ptr() for m in matrices}) > 1:
        return False
    ends = [m.storage_offset() + m.numel() for m in matrices]
    return ends[:-1] == [m.storage_offset() for m in matrices[1:]]


def joins(matrix: Tensor, dtype: torch.dtype) -> bool:
    """Say whether the matrix is cast together with others: dense, and what follows it lies aligned."""
    return matrix.dtype == torch.float32 != dtype and matrix.is_contiguous() and matrix.numel() % ALIGNED == 0


def _cast_around(first: list[Tensor], matrices: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Return the numbers of all `first` as one piece, and each of the matrices, in `dtype`."""
    joined = [m for m in matrices if joins(m, dtype)]
    if not first and len(joined) < 2:
        return torch.empty(0), [m.to(dtype) for m in matrices]
    flat = torch.cat([m.view(-1) for m in (*first, *joined)]).to(dtype)
    whole, *pieces = flat.split([sum(m.numel() for m in first), *(m.numel() for m in joined)])
    rest = iter(pieces)
    return whole, [next(rest).view(m.shape) if joins(m, dtype) else m.to(dtype) for m in matrices]
