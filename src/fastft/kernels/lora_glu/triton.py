"""The gated activation between LoRA linears in Triton: the adapters' low-rank products are made on tiles in passing.

The large matrices gate0, up0, h and their gradients [M, N] are read or written once each. What is summed over columns
([M, rank]) each program writes for its share of them, and the shares are added up afterwards; what is summed over rows
([rank, N]) is added in place by atomics, in fp32.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft.kernels.dispatch import launch_on, processors
from fastft.kernels.lora.casts import transposed
from fastft.kernels.lora_glu.eight_bits import BLOCK, LEAST, MOST, ZERO, shapes
from fastft.kernels.lora_glu.launch import Launch, launch
from fastft.kernels.rows import ceil_div, next_power_of_2

EIGHT_BITS = tl.constexpr(BLOCK)
LARGEST, SMALLEST = tl.constexpr(MOST), tl.constexpr(LEAST)
# Added to a number below 2^22, it rounds it to a whole one and leaves that, as q + ZERO, in the low byte.
ROUNDING = tl.constexpr(1.5 * 2**23 + ZERO)
# As a whole number and as fp32: 2^23, whose low byte is free for q + ZERO.
WHOLE, AS_FLOAT = tl.constexpr(0x4B000000), tl.constexpr(float(2**23 + ZERO))


@triton.jit
def _logistic(x):
    """1 / (1 + exp(-x)) in six instructions, as exp2 and a squared rsqrt: a few ulp of fp32, of results in 16 bits.

    tl.exp and a division take sixteen, for what is below fp32's normal numbers; the kernels are short of instructions.
    """
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return root * root


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """(activation(x), activation'(x)) in fp32."""
    if ACTIVATION == "silu":
        p = _logistic(x)
        y = x * p
        return y, p + y * (1.0 - p)
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) is the logistic function of 2u, with u = sqrt(2 / pi) * (x + 0.044715 x^3).
        p = _logistic(1.5957691216057308 * (x + 0.044715 * x * x * x))
        q = p * (1.0 - p)
        # Where q is 0 the product is 0, though its other factor may overflow.
        return x * p, p + tl.where(q == 0.0, 0.0, x * q * 1.5957691216057308 * (1.0 + 0.134145 * x * x))
    else:
        p = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return x * p, p + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def _place_of(program, splits, ROWS: tl.constexpr):
    """(this program's share of the columns, its rows): those of the same rows are next to each other in the grid.

    The grid has one axis: along its second CUDA allows 65,535 programs, which is 4 million rows.
    """
    return program % splits, (program // splits).to(tl.int64) * ROWS + tl.arange(0, ROWS)


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
def _quantized(b_x):
    """(q, scale) of the rows of a tile [rows, 64] in fp32."""
    b_largest = tl.max(tl.abs(b_x), 1)
    b_inverse = tl.where(b_largest > SMALLEST, LARGEST / b_largest, 0.0)
    return (b_x * b_inverse[:, None] + ROUNDING).to(tl.int32, bitcast=True).to(tl.uint8), b_largest * (1.0 / LARGEST)


@triton.jit
def _in_eight_bits(q_ptr, scale_ptr, b_gate, b_up, row, count, start, in_rows, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Write the tiles of gate and up [ROWS, 64] that begin at column `start` in 8 bits, the one's numbers in turn."""
    b_q_gate, b_scale_gate = _quantized(b_gate)
    b_q_up, b_scale_up = _quantized(b_up)
    b_q = tl.reshape(tl.join(b_q_gate, b_q_up), (ROWS, 2 * EIGHT_BITS))
    place = (row * tl.cdiv(WIDTH, EIGHT_BITS) + start // EIGHT_BITS) * (2 * EIGHT_BITS)
    tl.store(q_ptr + place[:, None] + tl.arange(0, 2 * EIGHT_BITS)[None, :], b_q, mask=in_rows[:, None])
    at = row + (row * 0 + start // EIGHT_BITS * 2) * count  # in 64 bits, as rows are
    tl.store(scale_ptr + at, b_scale_gate, mask=in_rows)
    tl.store(scale_ptr + at + count, b_scale_up, mask=in_rows)


@triton.jit
def _of_eight_bits(q_ptr, scale_ptr, row, count, start, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Load the tiles of gate and up [ROWS, 64] that begin at column `start`, in fp32."""
    place = (row * tl.cdiv(WIDTH, EIGHT_BITS) + start // EIGHT_BITS) * (2 * EIGHT_BITS)
    b_q = tl.load(q_ptr + place[:, None] + tl.arange(0, 2 * EIGHT_BITS)[None, :])
    b_q_gate, b_q_up = tl.split(tl.reshape(b_q, (ROWS, EIGHT_BITS, 2)))
    at = row + (row * 0 + start // EIGHT_BITS * 2) * count
    b_gate = _whole(b_q_gate) * tl.load(scale_ptr + at)[:, None]
    return b_gate, _whole(b_q_up) * tl.load(scale_ptr + at + count)[:, None]


@triton.jit
def _whole(b_q):
    """q - ZERO in fp32."""
    return (b_q.to(tl.int32) | WHOLE).to(tl.float32, bitcast=True) - AS_FLOAT


@triton.jit(do_not_specialize=["splits"])
def lora_glu_fwd_kernel(
    gate_ptr, up_ptr, xa_ptr, b_gate_ptr, b_up_ptr, a_down_ptr, h_ptr, ha_ptr, q_ptr, scale_ptr,
    count, gate_stride, up_stride, xa_stride, scale_gate, scale_up, splits,
    ACTIVATION: tl.constexpr, WIDTH: tl.constexpr, R_GATE: tl.constexpr, R_UP: tl.constexpr, R_DOWN: tl.constexpr,
    P_GATE: tl.constexpr, P_UP: tl.constexpr, P_DOWN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr, EIGHT: tl.constexpr,
):  # fmt: skip
    """h = activation(gate) * up with gate = gate0 + scale_gate xa_gate B_gate^T, and this program's share of h A^T.

    gate_ptr, up_ptr: [count, WIDTH] with row strides. xa_ptr: [count, R_GATE + R_UP], row stride xa_stride.
    b_gate_ptr: [WIDTH, R_GATE]; b_up_ptr: [WIDTH, R_UP]; a_down_ptr: [WIDTH, R_DOWN]. h_ptr: [count, WIDTH].
    ha_ptr: [splits, count, R_DOWN] fp32. P_*: the ranks rounded up to a power of two of at least 16.
    EVEN: WIDTH is a multiple of COLUMNS. EIGHT: gate and up also go to q_ptr and scale_ptr in 8 bits, a tile of 64
    COLUMNS a block (`eight_bits.compress`).
    """
    tl.static_assert(COLUMNS == EIGHT_BITS or not EIGHT)
    split, given = _place_of(tl.program_id(0), splits, ROWS)
    in_rows = given < count
    row = tl.minimum(given, count - 1)  # rows beyond the last read the last, and write nothing
    r_gate, r_up, r_down = tl.arange(0, P_GATE), tl.arange(0, P_UP), tl.arange(0, P_DOWN)
    b_xa_gate = _of_rank(xa_ptr, row, xa_stride, in_rows, r_gate, R_GATE)
    b_xa_up = _of_rank(xa_ptr + R_GATE, row, xa_stride, in_rows, r_up, R_UP)
    b_ha = tl.zeros((ROWS, P_DOWN), dtype=tl.float32)
    for start in tl.range(split * COLUMNS, WIDTH, splits * COLUMNS, num_stages=STAGES):
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
        if EIGHT:
            _in_eight_bits(q_ptr, scale_ptr, b_gate, b_up, row, count, start, in_rows, WIDTH, ROWS)
        b_ha += tl.dot(b_h, b_ad)
    ha_row = ha_ptr + (split.to(tl.int64) * count + row)[:, None] * R_DOWN
    tl.store(ha_row + r_down[None, :], b_ha, mask=in_rows[:, None] & (r_down < R_DOWN)[None, :])


@triton.jit(do_not_specialize=["splits"])
def lora_glu_bwd_kernel(
    dh_ptr, gate_ptr, up_ptr, xa_ptr, g_ptr, b_gate_ptr, b_up_ptr, a_down_ptr,
    dgate_ptr, dup_ptr, dxa_ptr, db_gate_ptr, db_up_ptr, da_down_ptr,
    count, gate_stride, up_stride, xa_stride, scale_gate, scale_up, splits,
    ACTIVATION: tl.constexpr, WIDTH: tl.constexpr, R_GATE: tl.constexpr, R_UP: tl.constexpr, R_DOWN: tl.constexpr,
    P_GATE: tl.constexpr, P_UP: tl.constexpr, P_DOWN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr, EIGHT: tl.constexpr,
):  # fmt: skip
    """Gradients over gate0 and up0, and those of the adapters, from dh0 = dy W_down and g = scale_down dy B_down.

    gate, up and h are computed anew, of what is in 8 bits h alone. dh = dh0 + g A_down. dgate_ptr may be dh_ptr: a
    tile is read before it is written. dxa_ptr: [splits, count, R_GATE + R_UP] fp32, this program's share. db_gate_ptr
    [R_GATE, WIDTH], db_up_ptr [R_UP, WIDTH], da_down_ptr [R_DOWN, WIDTH], fp32, zero before: sums over rows are added
    to them; those of B are still without their scale. EIGHT: gate_ptr and up_ptr are q and scale of the forward kernel.
    The rest as there.
    """
    tl.static_assert(COLUMNS == EIGHT_BITS or not EIGHT)
    split, given = _place_of(tl.program_id(0), splits, ROWS)
    in_rows = given < count
    row = tl.minimum(given, count - 1)  # rows beyond the last read the last, have zeros in xa and g, and write nothing
    r_gate, r_up, r_down = tl.arange(0, P_GATE), tl.arange(0, P_UP), tl.arange(0, P_DOWN)
    b_xa_gate = _of_rank(xa_ptr, row, xa_stride, in_rows, r_gate, R_GATE)
    b_xa_up = _of_rank(xa_ptr + R_GATE, row, xa_stride, in_rows, r_up, R_UP)
    b_g = _of_rank(g_ptr, row, R_DOWN, in_rows, r_down, R_DOWN)
    b_dxa_gate = tl.zeros((ROWS, P_GATE), dtype=tl.float32)
    b_dxa_up = tl.zeros((ROWS, P_UP), dtype=tl.float32)
    dtype = dgate_ptr.dtype.element_ty
    for start in tl.range(split * COLUMNS, WIDTH, splits * COLUMNS, num_stages=STAGES):
        col = start + tl.arange(0, COLUMNS)
        in_cols = col < WIDTH
        if EIGHT:
            b_gate, b_up = _of_eight_bits(gate_ptr, up_ptr, row, count, start, WIDTH, ROWS)
        else:
            b_gate = _columns(gate_ptr, row, gate_stride, col, in_cols, EVEN).to(tl.float32)
            b_up = _columns(up_ptr, row, up_stride, col, in_cols, EVEN).to(tl.float32)
        b_dh = _columns(dh_ptr, row, WIDTH, col, in_cols, EVEN).to(tl.float32)
        b_bg = _of_rank(b_gate_ptr, col, R_GATE, in_cols, r_gate, R_GATE)
        b_bu = _of_rank(b_up_ptr, col, R_UP, in_cols, r_up, R_UP)
        b_ad = _of_rank(a_down_ptr, col, R_DOWN, in_cols, r_down, R_DOWN)
        if not EIGHT:
            b_gate += scale_gate * tl.dot(b_xa_gate, tl.trans(b_bg))
            b_up += scale_up * tl.dot(b_xa_up, tl.trans(b_bu))
        b_dh += tl.dot(b_g, tl.trans(b_ad))
        if EIGHT:
            # Adds nothing, but has the three in one layout: without, each goes through shared memory. Where dh is not
            # finite, h becomes NaN by it, and so dA_down, as dgate and dup, dB_gate and dB_up are not finite anyway.
            b_gate, b_up = b_gate + 0.0 * b_dh, b_up + 0.0 * b_dh
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


def _constants(
    width: int, ranks: tuple[int, int, int], activation: str, cfg: Launch, eight_bits: bool
) -> dict[str, object]:
    padded = [max(16, next_power_of_2(rank)) for rank in ranks]
    return {
        "ACTIVATION": activation, "WIDTH": width, "R_GATE": ranks[0], "R_UP": ranks[1], "R_DOWN": ranks[2],
        "P_GATE": padded[0], "P_UP": padded[1], "P_DOWN": padded[2],
        "ROWS": cfg.rows, "COLUMNS": cfg.columns, "STAGES": cfg.stages,
        "EVEN": width % cfg.columns == 0, "EIGHT": eight_bits, "num_warps": cfg.warps,
        **({"maxnreg": cfg.registers} if cfg.registers else {}),
    }  # fmt: skip


def forward(
    gate0: Tensor, up0: Tensor, xa: Tensor, b_gate: Tensor, b_up: Tensor, a_down: Tensor,
    scales: tuple[float, float], activation: str, eight_bits: bool = False, cfg: Launch | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return (h [M, N], h A_down^T [M, r]) in gate0's 16-bit dtype; with eight_bits also q and scale of gate and up.

    gate0, up0: [M, N], last stride 1. xa: [M, r + r]. b_gate, b_up: [N, r], in gate0's dtype. a_down: [r, N], in any.
    M at least 1.
    """
    (count, width), r_down = gate0.shape, a_down.shape[0]
    dtype, ranks = gate0.dtype, (b_gate.shape[1], b_up.shape[1], r_down)
    cfg = cfg or launch(count, width, processors(gate0.device), max(ranks))
    h = torch.empty(count, width, dtype=dtype, device=gate0.device)
    shares = torch.empty(cfg.splits, count, r_down, dtype=torch.float32, device=gate0.device)
    kept = ()
    if eight_bits:
        of_q, of_scale = shapes(count, width)
        kept = torch.empty(of_q, dtype=torch.uint8, device=h.device), torch.empty(of_scale, device=h.device)
    with launch_on(gate0):
        lora_glu_fwd_kernel[(cfg.splits * ceil_div(count, cfg.rows),)](
            gate0, up0, xa, b_gate.contiguous(), b_up.contiguous(), transposed(a_down, dtype), h, shares,
            *(kept or (h, h)), count, gate0.stride(0), up0.stride(0), xa.stride(0), *scales, cfg.splits,
            **_constants(width, ranks, activation, cfg, eight_bits),
        )  # fmt: skip
    return h, shares.sum(0).to(dtype), *kept


def backward(
    dh: Tensor, gate0: Tensor, up0: Tensor, xa: Tensor, g: Tensor, b_gate: Tensor, b_up: Tensor, a_down: Tensor,
    scales: tuple[float, float], activation: str,
    own_dtypes: Sequence[torch.dtype] = (torch.float32,) * 3, cfg: Launch | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (dgate0, dup0 [M, N], dxa [M, r + r], dB_gate, dB_up [N, r], dA_down [r, N]); dgate0 takes dh's memory.

    dh, g: [M, N] and [M, r], contiguous. gate0, up0: as `forward` takes them, or the q and scale that it made. The rest
    as there. dxa has dh's dtype; the gradients of the adapters, contiguous, have `own_dtypes`.
    """
    (count, width), r_down = dh.shape, a_down.shape[0]
    dtype, ranks = dh.dtype, (b_gate.shape[1], b_up.shape[1], r_down)
    cfg = cfg or launch(count, width, processors(dh.device), max(ranks), backward=True)
    dup = torch.empty(count, width, dtype=dtype, device=dh.device)
    shares = torch.empty(cfg.splits, count, ranks[0] + ranks[1], dtype=torch.float32, device=dh.device)
    sums = torch.zeros(sum(ranks), width, dtype=torch.float32, device=dh.device)
    db_gate, db_up, da_down = sums.split(ranks)
    with launch_on(dh):
        lora_glu_bwd_kernel[(cfg.splits * ceil_div(count, cfg.rows),)](
            dh, gate0, up0, xa, g, b_gate.contiguous(), b_up.contiguous(), transposed(a_down, dtype),
            dh, dup, shares, db_gate, db_up, da_down,
            count, gate0.stride(0), up0.stride(0), xa.stride(0), *scales, cfg.splits,
            **_constants(width, ranks, activation, cfg, gate0.dtype == torch.uint8),
        )  # fmt: skip
    dbs = [_turned(*given) for given in zip((db_gate, db_up), scales, own_dtypes)]
    return dh, dup, shares.sum(0).to(dtype), *dbs, da_down.to(own_dtypes[2])


def _turned(sums: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Return scale times the transpose of `sums`, contiguous and rounded once, in one launch."""
    out = torch.empty(sums.shape[1], sums.shape[0], dtype=dtype, device=sums.device)
    return torch.mul(sums.t(), scale, out=out)
