"""Addressing shared by the row kernels. Needs Triton: imported by the kernels' own modules only."""

import triton
import triton.language as tl


@triton.jit
def row_offset(row, d1, d2, stride0, stride1, stride2):
    """Offset in elements, int64, of the given rows; see `fastft.kernels.rows.Rows`."""
    outer = row // d2
    offset = (outer // d1).to(tl.int64) * stride0 + (outer % d1).to(tl.int64) * stride1
    return offset + (row % d2).to(tl.int64) * stride2


@triton.jit
def block_rows(index, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """Row numbers [ROWS] of tile `index`, in 64 bits where the tensor has that many rows."""
    if WIDE:
        index = index.to(tl.int64)
    return index * ROWS + tl.arange(0, ROWS)
