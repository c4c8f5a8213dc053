"""The gated activation in Triton, elementwise over rows that may be strided (halves of a packed projection)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft.kernels.dispatch import launch_on
from fastft.kernels.glu.launch import TILE, launch
from fastft.kernels.rows import MAX_INT32, as_matrix
from fastft.kernels.rows_triton import block_rows


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """(activation(x), activation'(x)) in fp32."""
    if ACTIVATION == "silu":
        p = 1.0 / (1.0 + tl.exp(-x))
        return x / (1.0 + tl.exp(-x)), p * (1.0 + x * (1.0 - p))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) is the logistic function of 2u, with u = sqrt(2 / pi) * (x + 0.044715 x^3).
        u2 = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        du2 = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        p = 1.0 / (1.0 + tl.exp(-u2))
        q = 1.0 / (1.0 + tl.exp(u2))
        # Where q or p is 0 the product is 0, though du2 may overflow.
        slope = tl.where((p == 0.0) | (q == 0.0), 0.0, x * p * q * du2)
        return x * p, p + slope
    else:
        p = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return x * p, p + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def glu_fwd_kernel(
    gate_ptr, up_ptr, y_ptr, count, gate_stride, up_stride, ACTIVATION: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, SEGMENTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One [ROWS, BLOCK] tile of y = activation(gate) * up."""
    row = block_rows(tl.program_id(0) // SEGMENTS, ROWS, WIDE)
    col = (tl.program_id(0) % SEGMENTS) * BLOCK + tl.arange(0, BLOCK)
    mask = (row < count)[:, None] & (col < WIDTH)[None, :]
    row, col = row.to(tl.int64)[:, None], col[None, :]
    gate = tl.load(gate_ptr + row * gate_stride + col, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + col, mask=mask, other=0.0).to(tl.float32)
    activated, _ = _activate(gate, ACTIVATION)
    y = activated.to(gate_ptr.dtype.element_ty).to(tl.float32) * up
    tl.store(y_ptr + row * WIDTH + col, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def glu_bwd_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, count, dy_stride, gate_stride, up_stride, ACTIVATION: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, SEGMENTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One [ROWS, BLOCK] tile of both gradients."""
    row = block_rows(tl.program_id(0) // SEGMENTS, ROWS, WIDE)
    col = (tl.program_id(0) % SEGMENTS) * BLOCK + tl.arange(0, BLOCK)
    mask = (row < count)[:, None] & (col < WIDTH)[None, :]
    row, col = row.to(tl.int64)[:, None], col[None, :]
    dy = tl.load(dy_ptr + row * dy_stride + col, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + col, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + col, mask=mask, other=0.0).to(tl.float32)
    activated, slope = _activate(gate, ACTIVATION)
    dup = dy * activated.to(gate_ptr.dtype.element_ty).to(tl.float32)
    dgate = dy * up * slope
    tl.store(dup_ptr + row * WIDTH + col, dup.to(dup_ptr.dtype.element_ty), mask=mask)
    tl.store(dgate_ptr + row * WIDTH + col, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)


def forward(gate: Tensor, up: Tensor, activation: str, dtype: torch.dtype) -> Tensor:
    """Launch the forward kernel; returns a contiguous tensor of `dtype`."""
    y = torch.empty(gate.shape, dtype=dtype, device=gate.device)
    if y.numel() == 0:
        return y
    gate, up = as_matrix(gate), as_matrix(up)
    (count, width), cfg = gate.shape, launch(*gate.shape)
    with launch_on(gate):
        glu_fwd_kernel[(cfg.programs,)](
            gate, up, y, count, gate.stride(0), up.stride(0), ACTIVATION=activation,
            WIDTH=width, BLOCK=cfg.block, ROWS=cfg.rows, SEGMENTS=cfg.segments, WIDE=count > MAX_INT32 - TILE,
            num_warps=cfg.warps,
        )  # fmt: skip
    return y


def backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel, which computes the activation anew; returns (dgate, dup), contiguous."""
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty(up.shape, dtype=up.dtype, device=up.device)
    if dup.numel() == 0:
        return dgate, dup
    dy, gate, up = as_matrix(dy), as_matrix(gate), as_matrix(up)
    (count, width), cfg = gate.shape, launch(*gate.shape)
    with launch_on(gate):
        glu_bwd_kernel[(cfg.programs,)](
            dy, gate, up, dgate, dup, count, dy.stride(0), gate.stride(0), up.stride(0), ACTIVATION=activation,
            WIDTH=width, BLOCK=cfg.block, ROWS=cfg.rows, SEGMENTS=cfg.segments, WIDE=count > MAX_INT32 - TILE,
            num_warps=cfg.warps,
        )  # fmt: skip
    return dgate, dup
