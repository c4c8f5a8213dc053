"""Cross entropy of a chunk of logits, which the gradient overwrites; and an exact scaling by a scalar on the device."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft.kernels.linear_ce.launch import CrossEntropyLaunch, heuristic, scale_launch


@triton.jit
def tanh(x):
    """Return tanh by exp of a negative number, which cannot overflow."""
    b_exp = tl.exp(-2.0 * tl.abs(x))
    b_tanh = (1.0 - b_exp) / (1.0 + b_exp)
    return tl.where(x < 0, -b_tanh, b_tanh)


@triton.jit
def cross_entropy_kernel(
    logits,
    labels,
    losses,
    factor,
    row_stride,
    scale,
    softcap,
    smoothing,
    ignore_index,
    VOCAB: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the loss of one row a program, and with GRADIENT its gradient over the logits.

    logits: [rows, VOCAB] in 16 or 32 bits, before scale and soft cap. labels: [rows] int64. losses: [rows] fp32.
    factor: a scalar on the device by which the gradient is multiplied.
    With z = softcap * tanh(scale * logits / softcap), e = smoothing, y the label:
    loss = logsumexp(z) - (1 - e) z_y - e mean(z);  dz = softmax(z) - e / VOCAB - (1 - e) [j = y].
    The sum of exponentials runs online (Milakov and Gimelshein, 2018). A label that is neither ignore_index nor in
    [0, VOCAB) reads nothing outside the row and makes loss and gradient NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    row_logits = logits + row * row_stride
    label = tl.load(labels + row)
    b_column = tl.arange(0, BLOCK)
    if label == ignore_index:
        tl.store(losses + row, 0.0)
        if GRADIENT:
            for start in range(0, VOCAB, BLOCK):
                b_zero = tl.zeros((BLOCK,), dtype=tl.float32).to(logits.dtype.element_ty)
                tl.store(row_logits + start + b_column, b_zero, mask=start + b_column < VOCAB)
    else:
        in_range = (label >= 0) & (label < VOCAB)
        poison = tl.where(in_range, 0.0, float("nan"))
        # Read before the loop, whose reductions synchronise the warps: later one warp may overwrite it first.
        z_label = tl.load(row_logits + label, mask=in_range, other=0.0).to(tl.float32) * scale
        if SOFTCAP:
            z_label = softcap * tanh(z_label / softcap)
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
            b_z = tl.where(b_mask, b_z, -float("inf"))
            larger = tl.maximum(largest, tl.max(b_z))
            total = total * tl.exp(largest - larger) + tl.sum(tl.exp(b_z - larger))
            largest = larger
        # Differences to the largest logit before anything else: a confident row has a loss far below its logits.
        loss = tl.log(total) + (1.0 - smoothing) * (largest - z_label) + poison
        if SMOOTHING:
            loss += smoothing * (largest - z_sum / VOCAB)
        tl.store(losses + row, loss)
        if GRADIENT:
            slope = scale * tl.load(factor).to(tl.float32)
            for start in range(0, VOCAB, BLOCK):
                b_mask = start + b_column < VOCAB
                b_z = tl.load(row_logits + start + b_column, mask=b_mask, other=0.0).to(tl.float32) * scale
                b_factor = tl.zeros((BLOCK,), dtype=tl.float32) + slope
                if SOFTCAP:
                    b_tanh = tanh(b_z / softcap)
                    b_factor = slope * (1.0 - b_tanh * b_tanh)
                    b_z = softcap * b_tanh
                b_grad = tl.exp(b_z - largest) / total + poison
                if SMOOTHING:
                    b_grad -= smoothing / VOCAB
                b_grad -= tl.where(start + b_column == label, 1.0 - smoothing, 0.0)
                b_grad = (b_grad * b_factor).to(logits.dtype.element_ty)
                tl.store(row_logits + start + b_column, b_grad, mask=b_mask)


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
    launch: CrossEntropyLaunch | None = None,
) -> Tensor:
    """Return the losses [rows] fp32 of logits [rows, V]; with `gradient` their gradient overwrites the logits.

    factor: a scalar tensor that multiplies the gradient but not the losses.
    """
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    launch = launch or heuristic(logits.shape[1])
    cross_entropy_kernel[(logits.shape[0],)](
        logits, labels, losses, factor, logits.stride(0), scale, softcap, label_smoothing, ignore_index,
        VOCAB=logits.shape[1], SOFTCAP=softcap != 0, SMOOTHING=label_smoothing != 0, GRADIENT=gradient,
        BLOCK=launch.block, num_warps=launch.num_warps,
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
