"""Cross entropy of a chunk of logits, which the gradient overwrites; and an exact scaling by a scalar on the device."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft.kernels.fp8.triton import scale_of, to_fp8
from fastft.kernels.linear_ce.launch import CrossEntropyLaunch, heuristic, scale_launch
from fastft.kernels.linear_ce.quantized import Quantized
from fastft.kernels.logits_triton import exp, tanh


@triton.jit
def _zero(row_ptr, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Write zeros to a row of VOCAB entries."""
    b_column = tl.arange(0, BLOCK)
    b_zero = tl.zeros((BLOCK,), dtype=tl.float32).to(row_ptr.dtype.element_ty)
    for start in range(0, VOCAB, BLOCK):
        tl.store(row_ptr + start + b_column, b_zero, mask=start + b_column < VOCAB)


@triton.jit
def _sums(
    row_logits, label, z_label, scale, softcap,
    VOCAB: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return of a row's z the largest but the label's, the largest of all, the sum of exp(z - it), and the sum.

    The first is the largest of all without FP8, the last 0 without SMOOTHING. The sum of exponentials runs online
    (Milakov and Gimelshein, 2018).
    """
    b_column = tl.arange(0, BLOCK)
    largest = -3.0e38  # finite, so that a block of -inf logits adds exp(-inf) = 0 rather than NaN
    total = 0.0
    z_sum = 0.0
    for start in range(0, VOCAB, BLOCK):
        b_mask = start + b_column < VOCAB
        b_z = tl.load(row_logits + start + b_column, mask=b_mask, other=0.0).to(tl.float32) * scale
        if SOFTCAP:
            b_z = softcap * tanh(b_z / softcap)
        if SMOOTHING:
            z_sum += tl.sum(tl.where(b_mask, b_z, 0.0))
        if FP8:  # the others by themselves
            b_mask = b_mask & (start + b_column != label)
        b_z = tl.where(b_mask, b_z, -float("inf"))
        larger = tl.maximum(largest, tl.max(b_z))
        total = total * exp(largest - larger) + tl.sum(exp(b_z - larger))
        largest = larger
    others = largest
    if FP8:
        largest = tl.maximum(others, z_label)
        total = total * exp(others - largest) + exp(z_label - largest)
    return others, largest, total, z_sum


@triton.jit
def _write_gradient(
    row_logits, out, scale, softcap, largest, share, smoothed, inverse,
    VOCAB: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a row to `out`, as if no entry were the label's.

    share: what exp(z - largest) is multiplied by; smoothed: what label smoothing takes off. With FP8 times `inverse`,
    which is not in `share`: that would overflow beside a label that is all but certain.
    """
    b_column = tl.arange(0, BLOCK)
    for start in range(0, VOCAB, BLOCK):
        b_mask = start + b_column < VOCAB
        b_z = tl.load(row_logits + start + b_column, mask=b_mask, other=0.0).to(tl.float32) * scale
        if SOFTCAP:
            b_tanh = tanh(b_z / softcap)
            b_z = softcap * b_tanh
        b_grad = exp(b_z - largest) * share
        if SMOOTHING:
            b_grad -= smoothed
        if SOFTCAP:
            b_grad *= 1.0 - b_tanh * b_tanh
        if FP8:
            b_grad = to_fp8(b_grad * inverse)
        tl.store(out + start + b_column, b_grad.to(out.dtype.element_ty), mask=b_mask)


@triton.jit
def cross_entropy_kernel(
    logits,
    labels,
    losses,
    factor,
    quantized,
    quantized_scale,
    slopes,
    row_stride,
    quantized_stride,
    scale,
    softcap,
    smoothing,
    ignore_index,
    VOCAB: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    GRADIENT: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the loss of one row a program, and with GRADIENT its gradient over the logits, in their place.

    With FP8 that goes to quantized [rows, VOCAB] e4m3 instead, under the scale quantized_scale [rows] fp32, but for the
    label's own entry, which is zero there and goes to slopes [rows] fp32. The scale is that of a bound on the others,
    known before they are: none is larger than the likeliest of them.

    logits: [rows, VOCAB] in 16 or 32 bits, before scale and soft cap. labels: [rows] int64. losses: [rows] fp32.
    factor: a scalar on the device by which the gradient is multiplied.
    With z = softcap * tanh(scale * logits / softcap), e = smoothing, y the label:
    loss = logsumexp(z) - (1 - e) z_y - e mean(z);  dz = softmax(z) - e / VOCAB - (1 - e) [j = y].
    A label that is neither ignore_index nor in [0, VOCAB) reads nothing outside the row and makes loss and gradient
    NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    row_logits = logits + row * row_stride
    label = tl.load(labels + row)
    if label == ignore_index:
        tl.store(losses + row, 0.0)
        if GRADIENT:
            if FP8:
                tl.store(quantized_scale + row, scale_of(0.0))
                tl.store(slopes + row, 0.0)
                _zero(quantized + row * quantized_stride, VOCAB, BLOCK)
            else:
                _zero(row_logits, VOCAB, BLOCK)
    else:
        in_range = (label >= 0) & (label < VOCAB)
        poison = tl.where(in_range, 0.0, float("nan"))
        # Read before the loop, whose reductions synchronise the warps: later one warp may overwrite it first.
        z_label = tl.load(row_logits + label, mask=in_range, other=0.0).to(tl.float32) * scale
        bend = 1.0
        if SOFTCAP:
            tanh_label = tanh(z_label / softcap)
            bend = 1.0 - tanh_label * tanh_label
            z_label = softcap * tanh_label
        others, largest, total, z_sum = _sums(
            row_logits, label, z_label, scale, softcap, VOCAB, SOFTCAP, SMOOTHING, FP8, BLOCK
        )
        # Differences to the largest logit before anything else: a confident row has a loss far below its logits.
        loss = tl.log(total) + (1.0 - smoothing) * (largest - z_label) + poison
        if SMOOTHING:
            loss += smoothing * (largest - z_sum / VOCAB)
        tl.store(losses + row, loss)
        if GRADIENT:
            slope = scale * tl.load(factor).to(tl.float32)
            share = 1.0 / total + poison
            of_label = exp(z_label - largest) * share - smoothing / VOCAB - (1.0 - smoothing)
            of_label *= slope * bend
            out, inverse, own = row_logits, 1.0, of_label
            if FP8:
                bound = tl.maximum(exp(others - largest) * share, smoothing / VOCAB) * tl.abs(slope)
                row_scale = scale_of(bound)
                tl.store(quantized_scale + row, row_scale + poison)
                tl.store(slopes + row, of_label)
                out, inverse, own = quantized + row * quantized_stride, tl.div_rn(1.0, row_scale), 0.0
            _write_gradient(
                row_logits, out, scale, softcap, largest, share * slope, smoothing / VOCAB * slope, inverse,
                VOCAB, SOFTCAP, SMOOTHING, FP8, BLOCK,
            )  # fmt: skip
            # The label's own entry, which differs, once all threads have written theirs.
            tl.debug_barrier()
            tl.store(out + label, own, mask=in_range)


@triton.jit
def scale_kernel(value, factor, out, numel, BLOCK: tl.constexpr):
    """Write value * factor, multiplied in fp32 and rounded once; factor: a scalar on the device."""
    b_offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_mask = b_offset < numel
    b_value = tl.load(value + b_offset, mask=b_mask, other=0.0).to(tl.float32)
    b_value = b_value * tl.load(factor).to(tl.float32)
    tl.store(out + b_offset, b_value.to(out.dtype.element_ty), mask=b_mask)


def cross_entropy_(
    logits: Tensor,
    labels: Tensor,
    factor: Tensor,
    *,
    scale: float,
    softcap: float,
    label_smoothing: float,
    ignore_index: int,
    gradient: bool,
    quantized: Quantized | None = None,
    launch: CrossEntropyLaunch | None = None,
) -> Tensor:
    """Return the losses [rows] fp32 of logits [rows, V]; with `gradient` their gradient overwrites the logits.

    factor: a scalar tensor that multiplies the gradient but not the losses. quantized: takes the gradient instead.
    """
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    launch = launch or heuristic(logits.shape[1])
    place = (losses,) * 3 if quantized is None else (quantized.values, quantized.scale, quantized.slope)
    cross_entropy_kernel[(logits.shape[0],)](
        logits, labels, losses, factor, *place, logits.stride(0), place[0].stride(0), scale, softcap, label_smoothing,
        ignore_index, VOCAB=logits.shape[1], SOFTCAP=softcap != 0, SMOOTHING=label_smoothing != 0, GRADIENT=gradient,
        FP8=quantized is not None, BLOCK=launch.block, num_warps=launch.num_warps,
    )  # fmt: skip
    return losses


def scaled(value: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return value * factor in `dtype`, multiplied in fp32; value contiguous, factor a scalar tensor beside it."""
    out = torch.empty(value.shape, dtype=dtype, device=value.device)
    block, num_warps = scale_launch()
    programs = -(-value.numel() // block)
    if programs:
        scale_kernel[(programs,)](value, factor, out, value.numel(), BLOCK=block, num_warps=num_warps)
    return out
