"""The gated activation between LoRA linears in Triton: the adapters' low-rank products are made on tiles in passing.

The large matrices gate0, up0, h and their gradients [M, N] are read or written once each. What is summed over columns
([M, rank]) each program writes for its share of them, and the shares are added up afterwards; what is summed over rows
([rank, N]) is added in place by atomics, in fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft.kernels.dispatch import launch_on, processors
from fastft.kernels.lora_glu.launch import Launch, launch
from fastft.kernels.rows import ceil_div, next_power_of_2


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """(activation(x), activation'(x)) in fp32, with one exponential (or erf) and one division."""
    if ACTIVATION == "silu":
        p = 1.0 / (1.0 + tl.exp(-x))
        return x * p, p + x * p * (1.0 - p)
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) is the logistic function of 2u, with u = sqrt(2 / pi) * (x + 0.044715 x^3).
        p = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
        q = p * (1.0 - p)
        # Where q is 0 the product is 0, though its other factor may overflow.
        return x * p, p + tl.where(q == 0.0, 0.0, x * q * 1.5957691216057308 * (1.0 + 0.134145 * x * x))
    else:
        p = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return x * p, p + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def _columns(ptr, outer, stride, col, in_cols, EVEN: tl.constexpr):
    """Load the tile [outer, col] of a matrix whose rows lie `stride` apart; EVEN: no column is beyond the last."""
    if EVEN:
        return tl.load(ptr + outer[:, None] * stride + col[None, :])
    return tl.load(ptr + outer[:, None] * stride + col[None, :], mask=in_cols[None, :], other=0.0)


@triton.jit
def _of_rank(ptr, outer, stride, keep, r, R: tl.constexpr):
    """Load the tile [outer, r] of a matrix of R columns, zero where `keep` is false or beyond the rank."""
    return tl.load(ptr + outer[:, None] * stride + r[None, :], mask=keep[:, None] & (r < R)[None, :], other=0.0)


@triton.jit
def lora_glu_fwd_kernel(
    gate_ptr, up_ptr, xa_ptr, b_gate_ptr, b_up_ptr, a_down_ptr, h_ptr, ha_ptr,
    count, gate_stride, up_stride, xa_stride, scale_gate, scale_up,
    ACTIVATION: tl.constexpr, WIDTH: tl.constexpr, R_GATE: tl.constexpr, R_UP: tl.constexpr, R_DOWN: tl.constexpr,
    P_GATE: tl.constexpr, P_UP: tl.constexpr, P_DOWN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """h = activation(gate) * up with gate = gate0 + scale_gate xa_gate B_gate^T, and this program's share of h A^T.

    gate_ptr, up_ptr: [count, WIDTH] with row strides. xa_ptr: [count, R_GATE + R_UP], row stride xa_stride.
    b_gate_ptr: [WIDTH, R_GATE]; b_up_ptr: [WIDTH, R_UP]; a_down_ptr: [WIDTH, R_DOWN]. h_ptr: [count, WIDTH].
    ha_ptr: [SPLITS, count, R_DOWN] fp32. P_*: the ranks rounded up to a power of two of at least 16.
    EVEN: WIDTH is a multiple of COLUMNS.
    """
    split = tl.program_id(1)
    given = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = given < count
    row = tl.minimum(given, count - 1)  # rows beyond the last read the last, and write nothing
    r_gate, r_up, r_down = tl.arange(0, P_GATE), tl.arange(0, P_UP), tl.arange(0, P_DOWN)
    b_xa_gate = _of_rank(xa_ptr, row, xa_stride, in_rows, r_gate, R_GATE)
    b_xa_up = _of_rank(xa_ptr + R_GATE, row, xa_stride, in_rows, r_up, R_UP)
    b_ha = tl.zeros((ROWS, P_DOWN), dtype=tl.float32)
    for start in tl.range(split * COLUMNS, WIDTH, SPLITS * COLUMNS, num_stages=STAGES):
        col = start + tl.arange(0, COLUMNS)
        in_cols = col < WIDTH
        b_gate = _columns(gate_ptr, row, gate_stride, col, in_cols, EVEN).to(tl.float32)
        b_up = _columns(up_ptr, row, up_stride, col, in_cols, EVEN).to(tl.float32)
        b_bg = _of_rank(b_gate_ptr, col, R_GATE, in_cols, r_gate, R_GATE)
        b_bu = _of_rank(b_up_ptr, col, R_UP, in_cols, r_up, R_UP)
        b_ad = _of_rank(a_down_ptr, col, R_DOWN, in_cols, r_down, R_DOWN)
        b_gate += scale_gate * tl.dot(b_xa_gate, tl.trans(b_bg))
        b_up += scale_up * tl.dot(b_xa_up, tl.trans(b_bu))
        activated, _ = _activate(b_gate, ACTIVATION)
        b_h = (activated * b_up).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + row[:, None] * WIDTH + col[None, :], b_h, mask=in_rows[:, None] & in_cols[None, :])
        b_ha += tl.dot(b_h, b_ad)
    ha_row = ha_ptr + (split.to(tl.int64) * count + row)[:, None] * R_DOWN
    tl.store(ha_row + r_down[None, :], b_ha, mask=in_rows[:, None] & (r_down < R_DOWN)[None, :])


@triton.jit
def lora_glu_bwd_kernel(
    dh_ptr, gate_ptr, up_ptr, xa_ptr, g_ptr, b_gate_ptr, b_up_ptr, a_down_ptr,
    dgate_ptr, dup_ptr, dxa_ptr, db_gate_ptr, db_up_ptr, da_down_ptr,
    count, gate_stride, up_stride, xa_stride, scale_gate, scale_up,
    ACTIVATION: tl.constexpr, WIDTH: tl.constexpr, R_GATE: tl.constexpr, R_UP: tl.constexpr, R_DOWN: tl.constexpr,
    P_GATE: tl.constexpr, P_UP: tl.constexpr, P_DOWN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Gradients over gate0 and up0, and those of the adapters, from dh0 = dy W_down and g = scale_down dy B_down.

    gate, up and h are computed anew. dh = dh0 + g A_down. dgate_ptr may be dh_ptr: a tile is read before it is written.
    dxa_ptr: [SPLITS, count, R_GATE + R_UP] fp32, this program's share. db_gate_ptr [R_GATE, WIDTH], db_up_ptr
    [R_UP, WIDTH], da_down_ptr [R_DOWN, WIDTH], fp32, zero before: sums over rows are added to them; those of B are
    still without their scale. The rest as in the forward kernel.
    """
    split = tl.program_id(1)
    given = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = given < count
    row = tl.minimum(given, count - 1)  # rows beyond the last read the last, have zeros in xa and g, and write nothing
    r_gate, r_up, r_down = tl.arange(0, P_GATE), tl.arange(0, P_UP), tl.arange(0, P_DOWN)
    b_xa_gate = _of_rank(xa_ptr, row, xa_stride, in_rows, r_gate, R_GATE)
    b_xa_up = _of_rank(xa_ptr + R_GATE, row, xa_stride, in_rows, r_up, R_UP)
    b_g = _of_rank(g_ptr, row, R_DOWN, in_rows, r_down, R_DOWN)
    b_dxa_gate = tl.zeros((ROWS, P_GATE), dtype=tl.float32)
    b_dxa_up = tl.zeros((ROWS, P_UP), dtype=tl.float32)
    dtype = dgate_ptr.dtype.element_ty
    for start in tl.range(split * COLUMNS, WIDTH, SPLITS * COLUMNS, num_stages=STAGES):
        col = start + tl.arange(0, COLUMNS)
        in_cols = col < WIDTH
        b_gate = _columns(gate_ptr, row, gate_stride, col, in_cols, EVEN).to(tl.float32)
        b_up = _columns(up_ptr, row, up_stride, col, in_cols, EVEN).to(tl.float32)
        b_dh = _columns(dh_ptr, row, WIDTH, col, in_cols, EVEN).to(tl.float32)
        b_bg = _of_rank(b_gate_ptr, col, R_GATE, in_cols, r_gate, R_GATE)
        b_bu = _of_rank(b_up_ptr, col, R_UP, in_cols, r_up, R_UP)
        b_ad = _of_rank(a_down_ptr, col, R_DOWN, in_cols, r_down, R_DOWN)
        b_gate += scale_gate * tl.dot(b_xa_gate, tl.trans(b_bg))
        b_up += scale_up * tl.dot(b_xa_up, tl.trans(b_bu))
        b_dh += tl.dot(b_g, tl.trans(b_ad))
        activated, slope = _activate(b_gate, ACTIVATION)
        b_h = (activated * b_up).to(dtype)
        b_dgate = (b_dh * b_up * slope).to(dtype)
        b_dup = (b_dh * activated).to(dtype)
        place, mask = row[:, None] * WIDTH + col[None, :], in_rows[:, None] & in_cols[None, :]
        tl.store(dgate_ptr + place, b_dgate, mask=mask)
        tl.store(dup_ptr + place, b_dup, mask=mask)
        b_dxa_gate += tl.dot(b_dgate, b_bg)
        b_dxa_up += tl.dot(b_dup, b_bu)
        _add_to_rows(da_down_ptr, tl.dot(tl.trans(b_g), b_h), r_down, col, in_cols, R_DOWN, WIDTH)
        _add_to_rows(db_gate_ptr, tl.dot(tl.trans(b_xa_gate), b_dgate), r_gate, col, in_cols, R_GATE, WIDTH)
        _add_to_rows(db_up_ptr, tl.dot(tl.trans(b_xa_up), b_dup), r_up, col, in_cols, R_UP, WIDTH)
    dxa_row = dxa_ptr + (split.to(tl.int64) * count + row)[:, None] * (R_GATE + R_UP)
    tl.store(dxa_row + r_gate[None, :], scale_gate * b_dxa_gate, mask=in_rows[:, None] & (r_gate < R_GATE)[None, :])
    tl.store(dxa_row + R_GATE + r_up[None, :], scale_up * b_dxa_up, mask=in_rows[:, None] & (r_up < R_UP)[None, :])


@triton.jit
def _add_to_rows(ptr, b_sum, r, col, in_cols, R: tl.constexpr, WIDTH: tl.constexpr):
    """Add the tile [r, col] to a matrix [R, WIDTH] that other programs add to as well."""
    mask = (r < R)[:, None] & in_cols[None, :]
    tl.atomic_add(ptr + r[:, None] * WIDTH + col[None, :], b_sum, mask=mask, sem="relaxed")


def _constants(width: int, ranks: tuple[int, int, int], activation: str, cfg: Launch) -> dict[str, object]:
    padded = [max(16, next_power_of_2(rank)) for rank in ranks]
    return {
        "ACTIVATION": activation, "WIDTH": width, "R_GATE": ranks[0], "R_UP": ranks[1], "R_DOWN": ranks[2],
        "P_GATE": padded[0], "P_UP": padded[1], "P_DOWN": padded[2],
        "ROWS": cfg.rows, "COLUMNS": cfg.columns, "SPLITS": cfg.splits, "STAGES": cfg.stages,
        "EVEN": width % cfg.columns == 0, "num_warps": cfg.warps,
    }  # fmt: skip


def forward(
    gate0: Tensor, up0: Tensor, xa: Tensor, b_gate: Tensor, b_up: Tensor, a_down: Tensor,
    scales: tuple[float, float], activation: str, cfg: Launch | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (h [M, N], h A_down^T [M, r]) in gate0's 16-bit dtype.

    gate0, up0: [M, N], last stride 1. xa: [M, r + r]. b_gate, b_up: [N, r]. a_down: [r, N]. M at least 1.
    """
    (count, width), r_down = gate0.shape, a_down.shape[0]
    cfg = cfg or launch(count, width, processors(gate0.device))
    dtype, ranks = gate0.dtype, (b_gate.shape[1], b_up.shape[1], r_down)
    h = torch.empty(count, width, dtype=dtype, device=gate0.device)
    shares = torch.empty(cfg.splits, count, r_down, dtype=torch.float32, device=gate0.device)
    with launch_on(gate0):
        lora_glu_fwd_kernel[(ceil_div(count, cfg.rows), cfg.splits)](
            gate0, up0, xa, _in(b_gate, dtype), _in(b_up, dtype), _in(a_down.t(), dtype), h, shares,
            count, gate0.stride(0), up0.stride(0), xa.stride(0), *scales,
            **_constants(width, ranks, activation, cfg),
        )  # fmt: skip
    return h, shares.sum(0).to(dtype)


def backward(
    dh: Tensor, gate0: Tensor, up0: Tensor, xa: Tensor, g: Tensor, b_gate: Tensor, b_up: Tensor, a_down: Tensor,
    scales: tuple[float, float], activation: str, cfg: Launch | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (dgate0, dup0 [M, N], dxa [M, r + r], dB_gate, dB_up [N, r], dA_down [r, N]); dgate0 takes dh's memory.

    dh, g: [M, N] and [M, r], contiguous. dxa has gate0's dtype; the gradients of the adapters are fp32.
    """
    (count, width), r_down = gate0.shape, a_down.shape[0]
    cfg = cfg or launch(count, width, processors(gate0.device))
    dtype, ranks = gate0.dtype, (b_gate.shape[1], b_up.shape[1], r_down)
    dup = torch.empty(count, width, dtype=dtype, device=gate0.device)
    shares = torch.empty(cfg.splits, count, ranks[0] + ranks[1], dtype=torch.float32, device=gate0.device)
    sums = torch.zeros(sum(ranks), width, dtype=torch.float32, device=gate0.device)
    db_gate, db_up, da_down = sums.split(ranks)
    with launch_on(gate0):
        lora_glu_bwd_kernel[(ceil_div(count, cfg.rows), cfg.splits)](
            dh, gate0, up0, xa, g, _in(b_gate, dtype), _in(b_up, dtype), _in(a_down.t(), dtype),
            dh, dup, shares, db_gate, db_up, da_down,
            count, gate0.stride(0), up0.stride(0), xa.stride(0), *scales,
            **_constants(width, ranks, activation, cfg),
        )  # fmt: skip
    return dh, dup, shares.sum(0).to(dtype), scales[0] * db_gate.t(), scales[1] * db_up.t(), da_down


def _in(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    return matrix.to(dtype).contiguous()
