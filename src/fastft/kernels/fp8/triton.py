"""The fp8 kernels in Triton. Each value is read once, quantised in fp32, and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft.kernels.dispatch import launch_on, processors
from fastft.kernels.fp8.launch import (
    LowRankLaunch,
    RowLaunch,
    WeightLaunch,
    row_launch,
    weight_launch,
)
from fastft.kernels.fp8.ref import FP8, MAX, TINY
from fastft.kernels.nf4.triton import nf4_level
from fastft.kernels.rows import ceil_div, next_power_of_2

TO_SCALE = tl.constexpr(1 / MAX)
LEAST = tl.constexpr(TINY)
BOUND = tl.constexpr(MAX)
LEVELS_IN_TABLE = tl.constexpr(16)


@triton.jit
def scale_of(largest):
    """Return the scale under which `largest` becomes the largest number of e4m3."""
    return tl.maximum(largest * TO_SCALE, LEAST)


@triton.jit
def to_fp8(value):
    """Round to e4m3; NaN stays NaN."""
    return tl.clamp(value, -BOUND, BOUND, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)


@triton.jit
def _row(ptr, factor_ptr, N: tl.constexpr, BLOCK: tl.constexpr, FACTORS: tl.constexpr, CACHE: tl.constexpr):
    """Load one row of N values, zero up to BLOCK, times the columns' factors, which all rows share."""
    col = tl.arange(0, BLOCK)
    if N == BLOCK:
        b_x = tl.load(ptr + col, cache_modifier=CACHE).to(tl.float32)
        if FACTORS:
            b_x *= tl.load(factor_ptr + col, eviction_policy="evict_last")
    else:
        b_x = tl.load(ptr + col, mask=col < N, other=0.0, cache_modifier=CACHE).to(tl.float32)
        if FACTORS:
            b_x *= tl.load(factor_ptr + col, mask=col < N, other=0.0, eviction_policy="evict_last")
    return b_x


@triton.jit
def _store_row(ptr, value, N: tl.constexpr, BLOCK: tl.constexpr):
    col = tl.arange(0, BLOCK)
    if N == BLOCK:
        tl.store(ptr + col, value)
    else:
        tl.store(ptr + col, value, mask=col < N)


@triton.jit
def fp8_quantize_rows_kernel(
    x0_ptr, x1_ptr, x2_ptr, factor_ptr, q_ptr, scale_ptr, stride0, stride1, stride2,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
    FACTORS: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """Quantise one row of up to three matrices side by side, held in registers between maximum and rounding.

    x*_ptr: [M, N*], row stride stride*; N* is 0 where there is none. factor_ptr: [N0 + N1 + N2] fp32. q_ptr:
    [M, N0 + N1 + N2] e4m3. scale_ptr: [M] fp32. B*: N* rounded up to a power of two.
    """
    row = tl.program_id(0).to(tl.int64)
    out_ptr = q_ptr + row * (N0 + N1 + N2)
    b_x0 = _row(x0_ptr + row * stride0, factor_ptr, N0, B0, FACTORS, CACHE)
    largest = tl.max(tl.abs(b_x0), 0)
    if N1 > 0:
        b_x1 = _row(x1_ptr + row * stride1, factor_ptr + N0, N1, B1, FACTORS, CACHE)
        largest = tl.maximum(largest, tl.max(tl.abs(b_x1), 0))
    if N2 > 0:
        b_x2 = _row(x2_ptr + row * stride2, factor_ptr + (N0 + N1), N2, B2, FACTORS, CACHE)
        largest = tl.maximum(largest, tl.max(tl.abs(b_x2), 0))
    scale = scale_of(largest)
    tl.store(scale_ptr + row, scale)
    inverse = tl.div_rn(1.0, scale)
    _store_row(out_ptr, to_fp8(b_x0 * inverse), N0, B0)
    if N1 > 0:
        _store_row(out_ptr + N0, to_fp8(b_x1 * inverse), N1, B1)
    if N2 > 0:
        _store_row(out_ptr + (N0 + N1), to_fp8(b_x2 * inverse), N2, B2)


@triton.jit
def _block_scale(absmax, code2, absmax2, offset, index, mask, NESTED: tl.constexpr):
    """Return the scales of NF4 blocks `index`, fp32, zero where `mask` is false."""
    if NESTED:
        b_code = tl.load(absmax + index, mask=mask, other=0).to(tl.int32)
        b_scale = tl.load(code2 + b_code) * tl.load(absmax2 + index // 256, mask=mask, other=0.0) + tl.load(offset)
        return tl.where(mask, b_scale, 0.0)
    else:
        return tl.load(absmax + index, mask=mask, other=0.0)


@triton.jit
def nf4_to_fp8_kernel(
    packed, absmax, code2, absmax2, offset, out_ptr, scale_ptr, n, out_stride,
    K: tl.constexpr, PADDED_BLOCKS: tl.constexpr, NESTED: tl.constexpr, TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Dequantise rows of an NF4 weight straight into fp8, as they lie or transposed; K is a multiple of 64.

    packed: [n, K / 8] int32, high nibble of each byte first. absmax and the rest: as in `nf4_dequantize_kernel`.
    out_ptr: [n, K], or transposed [K, n], with row stride out_stride. scale_ptr: [n] fp32. PADDED_BLOCKS: K / 64
    rounded up to a power of two. Every program finds the scales of its rows, the first of a row's SPLITS stores them.
    """
    BLOCKS: tl.constexpr = K // 64
    split = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = row < n
    b_block = tl.arange(0, PADDED_BLOCKS)
    whole = in_rows[:, None] & (b_block < BLOCKS)[None, :]
    b_all = _block_scale(absmax, code2, absmax2, offset, row[:, None] * BLOCKS + b_block[None, :], whole, NESTED)
    b_row_scale = scale_of(tl.max(tl.abs(b_all), 1))
    if split == 0:
        tl.store(scale_ptr + row, b_row_scale, mask=in_rows)
    inverse = tl.div_rn(1.0, b_row_scale)
    b_shift = (tl.arange(0, 8) ^ 1) * 4
    for start in range(split * COLUMNS, K, SPLITS * COLUMNS):
        block = start // 64 + tl.arange(0, COLUMNS // 64)
        of_block = in_rows[:, None] & (block < BLOCKS)[None, :]
        b_scale = _block_scale(absmax, code2, absmax2, offset, row[:, None] * BLOCKS + block[None, :], of_block, NESTED)
        word = start // 8 + tl.arange(0, COLUMNS // 8)
        of_word = in_rows[:, None] & (word < K // 8)[None, :]
        b_data = tl.load(packed + row[:, None] * (K // 8) + word[None, :], mask=of_word, other=0)
        b_index = (b_data[:, :, None] >> b_shift[None, None, :]) & 15
        b_level = tl.gather(nf4_level(tl.arange(0, LEVELS_IN_TABLE)), tl.reshape(b_index, (ROWS * COLUMNS,)), 0)
        b_value = tl.reshape(b_level, (ROWS, COLUMNS // 64, 64)) * b_scale[:, :, None]
        b_out = to_fp8(tl.reshape(b_value, (ROWS, COLUMNS)) * inverse[:, None])
        col = start + tl.arange(0, COLUMNS)
        if TRANSPOSED:
            place = col.to(tl.int64)[:, None] * out_stride + row[None, :]
            tl.store(out_ptr + place, tl.trans(b_out), mask=(col < K)[:, None] & in_rows[None, :])
        else:
            place = row[:, None] * out_stride + col[None, :]
            tl.store(out_ptr + place, b_out, mask=in_rows[:, None] & (col < K)[None, :])


@triton.jit
def transpose_kernel(x_ptr, out_ptr, n, k, x_stride, out_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write the bytes x [n, k] as out [k, n], a tile a program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    b_x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=(row < n)[:, None] & (col < k)[None, :])
    place = col[:, None] * out_stride + row[None, :]
    tl.store(out_ptr + place, tl.trans(b_x), mask=(col < k)[:, None] & (row < n)[None, :])


@triton.jit
def fp8_scale_kernel(x_ptr, scale_ptr, out_ptr, numel, BLOCK: tl.constexpr):
    """Write x / scale in fp8, a scalar on the device for all of x."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < numel
    inverse = tl.div_rn(1.0, tl.load(scale_ptr))
    b_x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offset, to_fp8(b_x * inverse), mask=mask)


@triton.jit
def fp8_dequantize_kernel(q_ptr, scale_ptr, out_ptr, K: tl.constexpr, BLOCK: tl.constexpr):
    """Write one row [K] of a weight in another dtype."""
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(scale_ptr + row)
    for start in range(0, K, BLOCK):
        col = start + tl.arange(0, BLOCK)
        b_q = tl.load(q_ptr + row * K + col, mask=col < K, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * K + col, (b_q * scale).to(out_ptr.dtype.element_ty), mask=col < K)


@triton.jit
def low_rank_add_kernel(
    y_ptr, left_ptr, right_ptr, bias_ptr, m, n, y_stride, left_stride, right_stride, right_column, scale,
    R: tl.constexpr, P: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y += scale * left right^T + bias on one tile: y [m, n], left [m, R], right [n, R] of any strides, bias [n].

    P: R rounded up to a power of two of at least 16.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.arange(0, P)
    in_rows, in_cols = row < m, col < n
    mask = in_rows[:, None] & in_cols[None, :]
    place = row[:, None] * y_stride + col[None, :]
    b_y = tl.load(y_ptr + place, mask=mask, other=0.0).to(tl.float32)
    b_left = tl.load(left_ptr + row[:, None] * left_stride + r[None, :], mask=in_rows[:, None] & (r < R), other=0.0)
    right = right_ptr + col[None, :] * right_stride + r[:, None] * right_column
    b_right = tl.load(right, mask=in_cols[None, :] & (r < R)[:, None], other=0.0)
    b_y += scale * tl.dot(b_left, b_right, input_precision="ieee")
    if BIAS:
        b_y += tl.load(bias_ptr + col, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + place, b_y.to(y_ptr.dtype.element_ty), mask=mask)


def quantize_rows(
    parts: list[Tensor], factors: Tensor | None = None, cfg: RowLaunch | None = None
) -> tuple[Tensor, Tensor]:
    """Return (q, scale) as `ref.quantize_rows` does, for up to `PARTS` parts with last stride 1."""
    m, widths = parts[0].shape[0], [part.shape[1] for part in parts]
    q = torch.empty(m, sum(widths), dtype=FP8, device=parts[0].device)
    scale = torch.empty(m, 1, dtype=torch.float32, device=q.device)
    if m == 0:
        return q, scale
    cfg = cfg or row_launch(sum(widths))
    given = [*parts, *[parts[0]] * (3 - len(parts))]
    sizes = [*widths, *[0] * (3 - len(parts))]
    with launch_on(q):
        fp8_quantize_rows_kernel[(m,)](
            *given, q if factors is None else factors, q, scale, *(part.stride(0) for part in given),
            *sizes, *(next_power_of_2(size) if size else 0 for size in sizes),
            FACTORS=factors is not None, CACHE=".cg" if cfg.stream else "", num_warps=cfg.warps,
        )  # fmt: skip
    return q, scale


def scale_into(x: Tensor, scale: Tensor, out: Tensor) -> None:
    """Write x / scale in fp8 into the first elements of `out`; both contiguous, scale fp32 with one element."""
    numel, block = x.numel(), 4096
    if numel:
        with launch_on(x):
            fp8_scale_kernel[(ceil_div(numel, block),)](x, scale, out, numel, BLOCK=block, num_warps=8)


def nf4_to_fp8(
    packed: Tensor, state: list[Tensor], n: int, k: int, out: Tensor, scale: Tensor, transposed: bool,
    cfg: WeightLaunch | None = None,
) -> None:  # fmt: skip
    """Write an NF4 weight [n, k] into `out`, [n, k] or transposed [k, n], in fp8, and its rows' scales into `scale`.

    k: a multiple of 64. out: last stride 1. scale: fp32 [n].
    """
    absmax, code2, absmax2, offset = state if len(state) == 4 else (state[0], None, None, None)
    cfg = cfg or weight_launch(n, k, transposed, processors(packed.device))
    data = packed.contiguous().view(torch.uint8).reshape(-1)[: n * k // 2]
    data = data if data.data_ptr() % 4 == 0 else data.clone()
    with launch_on(packed):
        nf4_to_fp8_kernel[(ceil_div(n, cfg.rows), cfg.splits)](
            data.view(torch.int32), absmax.contiguous(), code2, absmax2, offset, out, scale, n, out.stride(0),
            K=k, PADDED_BLOCKS=next_power_of_2(k // 64), NESTED=code2 is not None, TRANSPOSED=transposed,
            ROWS=cfg.rows, COLUMNS=cfg.columns, SPLITS=cfg.splits, num_warps=cfg.warps, enable_fp_fusion=False,
        )  # fmt: skip


def transpose_into(q: Tensor, out: Tensor) -> None:
    """Write q [n, k], one byte an element, into out [k, n]; last strides 1."""
    n, k = q.shape
    with launch_on(q):
        transpose_kernel[(ceil_div(n, 64), ceil_div(k, 64))](
            q.view(torch.uint8), out.view(torch.uint8), n, k, q.stride(0), out.stride(0), ROWS=64, COLUMNS=64
        )


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what `ref.dequantize` does, for a contiguous weight."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if out.numel():
        with launch_on(weight):
            fp8_dequantize_kernel[(weight.shape[0],)](weight, scale, out, K=weight.shape[1], BLOCK=2048)
    return out


def low_rank_add_(
    y: Tensor, left: Tensor, right: Tensor, scale: float, bias: Tensor | None, cfg: LowRankLaunch | None = None
) -> Tensor:
    """Add scale * left right^T + bias to y in place: y [m, n], left [m, r] with last stride 1, right [n, r]."""
    (m, n), r = y.shape, left.shape[1]
    cfg = cfg or LowRankLaunch()
    if m == 0 or n == 0:
        return y
    with launch_on(y):
        low_rank_add_kernel[(ceil_div(m, cfg.rows), ceil_div(n, cfg.columns))](
            y, left, right, y if bias is None else bias, m, n, y.stride(0), left.stride(0), *right.stride(), scale,
            R=r, P=max(16, next_power_of_2(r)), BIAS=bias is not None, ROWS=cfg.rows, COLUMNS=cfg.columns,
            num_warps=cfg.warps,
        )  # fmt: skip
    return y
