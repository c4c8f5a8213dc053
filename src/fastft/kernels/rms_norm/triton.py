"""RMSNorm in Triton: whole rows in registers, one pass over memory, no atomics."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft.kernels.dispatch import launch_on, processors
from fastft.kernels.rms_norm.launch import backward_launch, forward_launch
from fastft.kernels.rows import as_rows
from fastft.kernels.rows_triton import block_rows, row_offset


@triton.jit
def _scale(w_ptr, col, OFFSET: tl.constexpr, ROUND: tl.constexpr, WIDTH: tl.constexpr):
    """(offset + weight) in fp32; with ROUND the sum is first rounded to the weight's dtype, as torch does."""
    w = tl.load(w_ptr + col, mask=col < WIDTH, other=0.0).to(tl.float32)
    if OFFSET != 0.0:
        w = w + OFFSET
        if ROUND:
            w = w.to(w_ptr.dtype.element_ty).to(tl.float32)
    return w[None, :]


@triton.jit
def rms_norm_fwd_kernel(
    x_ptr, w_ptr, y_ptr, count, x_d1, x_d2, x_s0, x_s1, x_s2, eps,
    OFFSET: tl.constexpr, BEFORE: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """ROWS rows, each whole."""
    row = block_rows(tl.program_id(0), ROWS, WIDE)
    col = tl.arange(0, BLOCK)
    mask = (row < count)[:, None] & (col < WIDTH)[None, :]
    at = row_offset(row, x_d1, x_d2, x_s0, x_s1, x_s2)[:, None] + col[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    x_hat = x * tl.rsqrt(tl.sum(x * x, axis=1) / WIDTH + eps)[:, None]
    if BEFORE:
        x_hat = x_hat.to(x_ptr.dtype.element_ty).to(tl.float32)
    y = x_hat * _scale(w_ptr, col, OFFSET, BEFORE, WIDTH)
    tl.store(y_ptr + row.to(tl.int64)[:, None] * WIDTH + col[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rms_norm_bwd_kernel(
    dy_ptr, x_ptr, w_ptr, dx_ptr, partial_ptr, count,
    dy_d1, dy_d2, dy_s0, dy_s1, dy_s2, x_d1, x_d2, x_s0, x_s1, x_s2, eps,
    OFFSET: tl.constexpr, NEED_WEIGHT: tl.constexpr, ITERATIONS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """ITERATIONS tiles of ROWS rows, and their share of the weight gradient."""
    program = tl.program_id(0)
    col = tl.arange(0, BLOCK)
    w = _scale(w_ptr, col, OFFSET, False, WIDTH)
    dw = tl.zeros((BLOCK,), dtype=tl.float32)
    for step in range(ITERATIONS):
        row = block_rows(program * ITERATIONS + step, ROWS, WIDE)
        mask = (row < count)[:, None] & (col < WIDTH)[None, :]
        x_at = row_offset(row, x_d1, x_d2, x_s0, x_s1, x_s2)[:, None] + col[None, :]
        dy_at = row_offset(row, dy_d1, dy_d2, dy_s0, dy_s1, dy_s2)[:, None] + col[None, :]
        x = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + dy_at, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x * x, axis=1) / WIDTH + eps)[:, None]
        x_hat = x * rstd
        g = dy * w
        dx = rstd * (g - x_hat * (tl.sum(g * x_hat, axis=1) / WIDTH)[:, None])
        tl.store(dx_ptr + row.to(tl.int64)[:, None] * WIDTH + col[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if NEED_WEIGHT:
            # Rows past the end hold 0 * rstd, which is NaN where eps is 0.
            dw += tl.sum(tl.where(mask, dy * x_hat, 0.0), axis=0)
    if NEED_WEIGHT:
        tl.store(partial_ptr + program.to(tl.int64) * WIDTH + col, dw, mask=col < WIDTH)


def forward(x: Tensor, weight: Tensor, eps: float, offset: float, before: bool, dtype: torch.dtype) -> Tensor:
    """Launch the forward kernel; returns a contiguous [..., D] tensor of `dtype`."""
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    rows = as_rows(x)
    if rows.count == 0:
        return y
    cfg = forward_launch(rows.count, rows.width)
    with launch_on(x):
        rms_norm_fwd_kernel[(cfg.programs,)](
            rows.tensor, weight.contiguous(), y, rows.count, *rows.addressing, eps,
            OFFSET=offset, BEFORE=before,
            WIDTH=rows.width, BLOCK=cfg.block, ROWS=cfg.rows, WIDE=rows.wide, num_warps=cfg.warps,
        )  # fmt: skip
    return y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float, need_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Launch the backward kernel; returns (dx contiguous in x's dtype, dweight in weight's dtype or None).

    Each program sums its rows' share of dweight in fp32; the shares are added in a fixed order.
    """
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, dy_rows = as_rows(x), as_rows(dy)
    if rows.count == 0:
        return dx, torch.zeros_like(weight) if need_weight else None
    cfg = backward_launch(rows.count, rows.width, processors(x.device), need_weight)
    partial = torch.empty((cfg.programs, rows.width), dtype=torch.float32, device=x.device) if need_weight else dx
    with launch_on(x):
        rms_norm_bwd_kernel[(cfg.programs,)](
            dy_rows.tensor, rows.tensor, weight.contiguous(), dx, partial, rows.count,
            *dy_rows.addressing, *rows.addressing, eps,
            OFFSET=offset, NEED_WEIGHT=need_weight, ITERATIONS=cfg.iterations,
            WIDTH=rows.width, BLOCK=cfg.block, ROWS=cfg.rows, WIDE=rows.wide, num_warps=cfg.warps,
        )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype) if need_weight else None
