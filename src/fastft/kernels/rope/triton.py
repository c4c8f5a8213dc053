"""Rotary position embedding in Triton: one launch reads queries and keys where they lie and writes them rotated."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft.kernels.dispatch import launch_on
from fastft.kernels.rope.launch import FP_FUSION, launch
from fastft.kernels.rows import MAX_INT32
from fastft.kernels.rows_triton import block_rows


@triton.jit
def _round(x, like_ptr, ROUND: tl.constexpr):
    """Round fp32 `x` to the pointer's dtype and back where the rotation is computed in that dtype."""
    if ROUND:
        x = x.to(like_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def _turn(a, b, cos, sin, like_ptr, ROUND: tl.constexpr):
    """(a cos - b sin, b cos + a sin), each product and sum rounded as separate torch calls would."""
    first = _round(a * cos, like_ptr, ROUND) - _round(b * sin, like_ptr, ROUND)
    second = _round(b * cos, like_ptr, ROUND) + _round(a * sin, like_ptr, ROUND)
    return first.to(like_ptr.dtype.element_ty), second.to(like_ptr.dtype.element_ty)


@triton.jit
def _rotate_tile(
    index, x_ptr, y_ptr, cos_ptr, sin_ptr, batch, tokens, x_sb, x_sh, x_st,
    cos_sb, cos_st, cos_sd, sin_sb, sin_st, sin_sd,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, PASS: tl.constexpr, PAIRS_BLOCK: tl.constexpr, PASS_BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, ROUND: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # Rows run over (batch, token, head), heads fastest: neighbours share angles, and lie together in a projection.
    row = block_rows(index, ROWS, WIDE)
    head, token, b = (row % HEADS).to(tl.int64), row // HEADS % tokens, row // HEADS // tokens
    inside = (b < batch)[:, None]
    b, token = b.to(tl.int64), token.to(tl.int64)
    x_row = x_ptr + (b * x_sb + head * x_sh + token * x_st)[:, None]
    y_row = y_ptr + (((b * HEADS + head) * tokens + token) * (2 * PAIRS + PASS))[:, None]
    pair = tl.arange(0, PAIRS_BLOCK)[None, :]
    mask = inside & (pair < PAIRS)
    cos = tl.load(cos_ptr + (b * cos_sb + token * cos_st)[:, None] + pair * cos_sd, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + (b * sin_sb + token * sin_st)[:, None] + pair * sin_sd, mask=mask, other=0.0).to(tl.float32)
    if INVERSE:
        sin = -sin
    if INTERLEAVED:
        feature = tl.arange(0, 2 * PAIRS_BLOCK)[None, :]
        both = inside & (feature < 2 * PAIRS)
        x = tl.load(x_row + feature, mask=both, other=0.0).to(tl.float32)
        a, c = tl.split(tl.reshape(x, (ROWS, PAIRS_BLOCK, 2)))
        first, second = _turn(a, c, cos, sin, x_ptr, ROUND)
        tl.store(y_row + feature, tl.reshape(tl.join(first, second), (ROWS, 2 * PAIRS_BLOCK)), mask=both)
    else:
        a = tl.load(x_row + pair, mask=mask, other=0.0).to(tl.float32)
        c = tl.load(x_row + PAIRS + pair, mask=mask, other=0.0).to(tl.float32)
        first, second = _turn(a, c, cos, sin, x_ptr, ROUND)
        tl.store(y_row + pair, first, mask=mask)
        tl.store(y_row + PAIRS + pair, second, mask=mask)
    if PASS > 0:
        feature = tl.arange(0, PASS_BLOCK)[None, :]
        kept = inside & (feature < PASS)
        tl.store(y_row + 2 * PAIRS + feature, tl.load(x_row + 2 * PAIRS + feature, mask=kept, other=0.0), mask=kept)


@triton.jit
def rope_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, batch, tokens, q_programs,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, cos_sb, cos_st, cos_sd, sin_sb, sin_st, sin_sd,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr,
    PAIRS: tl.constexpr, PASS: tl.constexpr, PAIRS_BLOCK: tl.constexpr, PASS_BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, ROUND: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """ROWS heads of queries in the first `q_programs` programs, of keys in the others."""
    program = tl.program_id(0)
    if program < q_programs:
        _rotate_tile(
            program, q_ptr, q_out_ptr, cos_ptr, sin_ptr, batch, tokens, q_sb, q_sh, q_st,
            cos_sb, cos_st, cos_sd, sin_sb, sin_st, sin_sd,
            Q_HEADS, PAIRS, PASS, PAIRS_BLOCK, PASS_BLOCK, INTERLEAVED, INVERSE, ROUND, ROWS, WIDE,
        )  # fmt: skip
    else:
        _rotate_tile(
            program - q_programs, k_ptr, k_out_ptr, cos_ptr, sin_ptr, batch, tokens, k_sb, k_sh, k_st,
            cos_sb, cos_st, cos_sd, sin_sb, sin_st, sin_sd,
            K_HEADS, PAIRS, PASS, PAIRS_BLOCK, PASS_BLOCK, INTERLEAVED, INVERSE, ROUND, ROWS, WIDE,
        )  # fmt: skip


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, layout: str, inverse: bool) -> tuple[Tensor, Tensor]:
    """Launch the kernel; returns contiguous (q, k). Strided inputs are read in place if their last stride is 1."""
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    if q.numel() + k.numel() == 0:
        return q_out, k_out
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    (batch, q_heads, tokens, width), k_heads, pairs = q.shape, k.shape[1], cos.shape[-1]
    q_count, k_count = batch * tokens * q_heads, batch * tokens * k_heads
    cfg = launch(q_count, k_count, pairs, width - 2 * pairs)
    # A table of one batch entry serves all.
    cos_batch, sin_batch = (table.stride(0) if table.shape[0] > 1 else 0 for table in (cos, sin))
    with launch_on(q):
        rope_kernel[(cfg.q_programs + cfg.k_programs,)](
            q, k, q_out, k_out, cos, sin, batch, tokens, cfg.q_programs,
            *q.stride()[:3], *k.stride()[:3], cos_batch, *cos.stride()[1:], sin_batch, *sin.stride()[1:],
            Q_HEADS=max(q_heads, 1), K_HEADS=max(k_heads, 1), PAIRS=pairs, PASS=width - 2 * pairs,
            PAIRS_BLOCK=cfg.pairs_block, PASS_BLOCK=cfg.pass_block,
            INTERLEAVED=layout == "interleaved", INVERSE=inverse,
            ROUND=torch.promote_types(q.dtype, cos.dtype) == q.dtype,
            ROWS=cfg.rows, WIDE=max(q_count, k_count) > MAX_INT32 - 2**16, num_warps=cfg.warps,
            enable_fp_fusion=FP_FUSION,
        )  # fmt: skip
    return q_out, k_out
