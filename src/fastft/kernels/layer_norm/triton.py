"""LayerNorm in Triton: whole rows in registers, one pass over memory, no atomics.

Rows are numbered outer * heads + head; the grid's second axis is the head, whose weight a program loads once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft.kernels.dispatch import launch_on, processors
from fastft.kernels.layer_norm.launch import backward_launch, forward_launch
from fastft.kernels.rows import as_rows
from fastft.kernels.rows_triton import block_rows, row_offset


@triton.jit
def layer_norm_fwd_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, count, x_d1, x_d2, x_s0, x_s1, x_s2, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HEADS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one head, each whole."""
    head = tl.program_id(1)
    outer = block_rows(tl.program_id(0), ROWS, WIDE)
    row = outer * HEADS + head
    col = tl.arange(0, BLOCK)
    mask = (outer < count)[:, None] & (col < WIDTH)[None, :]
    at = row_offset(row, x_d1, x_d2, x_s0, x_s1, x_s2)[:, None] + col[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    centred = tl.where(mask, x - (tl.sum(x, axis=1) / WIDTH)[:, None], 0.0)
    y = centred * tl.rsqrt(tl.sum(centred * centred, axis=1) / WIDTH + eps)[:, None]
    if HAS_WEIGHT:
        y = tl.load(w_ptr + head * WIDTH + col, mask=col < WIDTH, other=0.0).to(tl.float32)[None, :] * y
    if HAS_BIAS:
        y = y + tl.load(b_ptr + head * WIDTH + col, mask=col < WIDTH, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + row.to(tl.int64)[:, None] * WIDTH + col[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def layer_norm_bwd_kernel(
    dy_ptr, x_ptr, w_ptr, dx_ptr, dw_ptr, db_ptr, count,
    dy_d1, dy_d2, dy_s0, dy_s1, dy_s2, x_d1, x_d2, x_s0, x_s1, x_s2, eps,
    HAS_WEIGHT: tl.constexpr, NEED_WEIGHT: tl.constexpr, NEED_BIAS: tl.constexpr, ITERATIONS: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """ITERATIONS tiles of ROWS rows of one head, and their share of the weight and bias gradients."""
    program, head = tl.program_id(0), tl.program_id(1)
    col = tl.arange(0, BLOCK)
    if HAS_WEIGHT:
        w = tl.load(w_ptr + head * WIDTH + col, mask=col < WIDTH, other=0.0).to(tl.float32)[None, :]
    dw = tl.zeros((BLOCK,), dtype=tl.float32)
    db = tl.zeros((BLOCK,), dtype=tl.float32)
    for step in range(ITERATIONS):
        outer = block_rows(program * ITERATIONS + step, ROWS, WIDE)
        row = outer * HEADS + head
        mask = (outer < count)[:, None] & (col < WIDTH)[None, :]
        x_at = row_offset(row, x_d1, x_d2, x_s0, x_s1, x_s2)[:, None] + col[None, :]
        dy_at = row_offset(row, dy_d1, dy_d2, dy_s0, dy_s1, dy_s2)[:, None] + col[None, :]
        x = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + dy_at, mask=mask, other=0.0).to(tl.float32)
        centred = tl.where(mask, x - (tl.sum(x, axis=1) / WIDTH)[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / WIDTH + eps)[:, None]
        x_hat = centred * rstd
        g = dy
        if HAS_WEIGHT:
            g = dy * w
        dx = rstd * (g - (tl.sum(g, axis=1) / WIDTH)[:, None] - x_hat * (tl.sum(g * x_hat, axis=1) / WIDTH)[:, None])
        tl.store(dx_ptr + row.to(tl.int64)[:, None] * WIDTH + col[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if NEED_WEIGHT:
            # Rows past the end hold 0 * rstd, which is NaN where eps is 0.
            dw += tl.sum(tl.where(mask, dy * x_hat, 0.0), axis=0)
        if NEED_BIAS:
            db += tl.sum(dy, axis=0)
    partial_at = (program.to(tl.int64) * HEADS + head) * WIDTH + col
    if NEED_WEIGHT:
        tl.store(dw_ptr + partial_at, dw, mask=col < WIDTH)
    if NEED_BIAS:
        tl.store(db_ptr + partial_at, db, mask=col < WIDTH)


def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, heads: int) -> Tensor:
    """Launch the forward kernel; returns a contiguous tensor of x's shape and dtype."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = as_rows(x)
    if rows.count == 0:
        return y
    cfg = forward_launch(rows.count // heads, rows.width)
    with launch_on(x):
        layer_norm_fwd_kernel[(cfg.programs, heads)](
            rows.tensor, x if weight is None else weight.contiguous(), x if bias is None else bias.contiguous(), y,
            rows.count // heads, *rows.addressing, eps,
            HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, HEADS=heads,
            WIDTH=rows.width, BLOCK=cfg.block, ROWS=cfg.rows, WIDE=rows.wide, num_warps=cfg.warps,
        )  # fmt: skip
    return y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, eps: float, heads: int, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Launch the backward kernel; returns (dx contiguous in x's dtype, dweight and dbias [heads, D] in fp32 or None).

    Each program sums its rows' share of dweight and dbias; the shares are added in a fixed order.
    """
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, dy_rows = as_rows(x), as_rows(dy)
    if rows.count == 0:
        zeros = torch.zeros((heads, rows.width), dtype=torch.float32, device=x.device)
        return dx, zeros if need_weight else None, zeros.clone() if need_bias else None
    count = rows.count // heads
    cfg = backward_launch(count, rows.width, heads, processors(x.device), need_weight or need_bias)
    shares = (cfg.programs, heads, rows.width)
    dw = torch.empty(shares, dtype=torch.float32, device=x.device) if need_weight else dx
    db = torch.empty(shares, dtype=torch.float32, device=x.device) if need_bias else dx
    with launch_on(x):
        layer_norm_bwd_kernel[(cfg.programs, heads)](
            dy_rows.tensor, rows.tensor, x if weight is None else weight.contiguous(), dx, dw, db, count,
            *dy_rows.addressing, *rows.addressing, eps,
            HAS_WEIGHT=weight is not None, NEED_WEIGHT=need_weight, NEED_BIAS=need_bias, ITERATIONS=cfg.iterations,
            HEADS=heads, WIDTH=rows.width, BLOCK=cfg.block, ROWS=cfg.rows, WIDE=rows.wide, num_warps=cfg.warps,
            # Contracting dy * w into the subtraction would leave a residue where the terms cancel exactly.
            enable_fp_fusion=False,
        )  # fmt: skip
    return dx, dw.sum(0) if need_weight else None, db.sum(0) if need_bias else None
