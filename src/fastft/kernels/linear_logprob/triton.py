"""Log-probability and entropy of a chunk of logits, and the gradient of both over the logits, which it overwrites."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft.kernels.linear_logprob.launch import LogprobLaunch, heuristic
from fastft.kernels.logits_triton import exp, tanh


@triton.jit
def logprob_fwd_kernel(
    logits,
    targets,
    logprobs,
    entropies,
    largest_ptr,
    log_total_ptr,
    row_stride,
    scale,
    softcap,
    cooling,
    ignore_index,
    VOCAB: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write log-probability, entropy, the largest u and log t (see below) of one row a program.

    logits: [rows, VOCAB] in 16 or 32 bits, before scale, soft cap and temperature. targets: [rows] int64. The others:
    [rows] fp32. cooling: 1 / temperature.
    With u = tanh(scale * logits / softcap) and a = cooling * softcap, or u = logits and a = cooling * scale without a
    soft cap, m = max(u), d = a (u - m), t = sum exp(d):
    logprob = d_y - log t;  entropy = log t - sum(exp(d) d) / t.
    The largest u is subtracted before anything is multiplied: of a u - a m the compiler makes a multiply-add, in which
    a m alone is rounded, and that error, up to half an ulp of the largest logit, stays in all probabilities.
    The sums run online (Milakov and Gimelshein, 2018): when a m grows by g, t becomes t exp(-g), and the sum of
    exp(d) d becomes exp(-g) (sum - g t). A target that is neither ignore_index nor in [0, VOCAB) reads nothing outside
    the row and makes the log-probability NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    row_logits = logits + row * row_stride
    target = tl.load(targets + row)
    b_column = tl.arange(0, BLOCK)
    if target == ignore_index:
        tl.store(logprobs + row, 0.0)
        tl.store(largest_ptr + row, 0.0)
        tl.store(log_total_ptr + row, 0.0)
        if ENTROPY:
            tl.store(entropies + row, 0.0)
    else:
        in_range = (target >= 0) & (target < VOCAB)
        u_target = tl.load(row_logits + target, mask=in_range, other=0.0).to(tl.float32)
        slope = scale * cooling
        if SOFTCAP:
            u_target = tanh(scale * u_target / softcap)
            slope = softcap * cooling
        largest = -3.0e38  # finite, so that a block of -inf logits adds exp(-inf) = 0 rather than NaN
        total = 0.0
        moment = 0.0
        for start in range(0, VOCAB, BLOCK):
            b_mask = start + b_column < VOCAB
            b_u = tl.load(row_logits + start + b_column, mask=b_mask, other=0.0).to(tl.float32)
            if SOFTCAP:
                b_u = tanh(scale * b_u / softcap)
            b_u = tl.where(b_mask, b_u, -float("inf"))
            larger = tl.maximum(largest, tl.max(b_u))
            growth = (largest - larger) * slope
            shrink = exp(growth)
            b_d = (b_u - larger) * slope
            b_exp = exp(b_d)
            if ENTROPY:
                grown = tl.where(total > 0, growth * total, 0.0)
                moment = shrink * (moment + grown) + tl.sum(tl.where(b_exp > 0, b_exp * b_d, 0.0))
            total = total * shrink + tl.sum(b_exp)
            largest = larger
        log_total = tl.log(total)
        poison = tl.where(in_range, 0.0, float("nan"))
        tl.store(logprobs + row, (u_target - largest) * slope - log_total + poison)
        tl.store(largest_ptr + row, largest)
        tl.store(log_total_ptr + row, log_total)
        if ENTROPY:
            tl.store(entropies + row, log_total - moment / total)


@triton.jit
def logprob_bwd_kernel(
    logits,
    targets,
    entropies,
    largest_ptr,
    log_total_ptr,
    d_logprobs,
    d_entropies,
    row_stride,
    scale,
    softcap,
    cooling,
    ignore_index,
    VOCAB: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Overwrite the logits of one row a program with the gradient over them; arguments as `logprob_fwd_kernel`'s.

    With log p = d - log t, g and h the gradients of log-probability and entropy H:
    dz = g ([j = y] - p) - h p (log p + H);  dlogits = dz * cooling * scale * (1 - tanh^2).
    """
    row = tl.program_id(0).to(tl.int64)
    row_logits = logits + row * row_stride
    target = tl.load(targets + row)
    b_column = tl.arange(0, BLOCK)
    if target == ignore_index:
        for start in range(0, VOCAB, BLOCK):
            b_zero = tl.zeros((BLOCK,), dtype=tl.float32).to(logits.dtype.element_ty)
            tl.store(row_logits + start + b_column, b_zero, mask=start + b_column < VOCAB)
    else:
        in_range = (target >= 0) & (target < VOCAB)
        poison = tl.where(in_range, 0.0, float("nan"))
        largest = tl.load(largest_ptr + row)
        log_total = tl.load(log_total_ptr + row)
        slope = (softcap if SOFTCAP else scale) * cooling
        d_logprob = tl.load(d_logprobs + row).to(tl.float32) + poison
        d_entropy = 0.0
        entropy = 0.0
        if ENTROPY:
            d_entropy = tl.load(d_entropies + row).to(tl.float32)
            entropy = tl.load(entropies + row)
        for start in range(0, VOCAB, BLOCK):
            b_mask = start + b_column < VOCAB
            b_u = tl.load(row_logits + start + b_column, mask=b_mask, other=0.0).to(tl.float32)
            b_factor = tl.zeros((BLOCK,), dtype=tl.float32) + scale * cooling
            if SOFTCAP:
                b_u = tanh(scale * b_u / softcap)
                b_factor = scale * cooling * (1.0 - b_u * b_u)
            b_log_p = (b_u - largest) * slope - log_total
            b_p = exp(b_log_p)
            b_grad = d_logprob * (tl.where(start + b_column == target, 1.0, 0.0) - b_p)
            if ENTROPY:
                b_grad -= tl.where(b_p > 0, d_entropy * b_p * (b_log_p + entropy), 0.0)
            b_grad = (b_grad * b_factor).to(logits.dtype.element_ty)
            tl.store(row_logits + start + b_column, b_grad, mask=b_mask)


def statistics(
    logits: Tensor,
    targets: Tensor,
    *,
    scale: float,
    softcap: float,
    temperature: float,
    entropy: bool,
    ignore_index: int,
    launch: LogprobLaunch | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (logprobs, entropies, largest u, log t), fp32 [rows], of logits [rows, V]; no entropies if unasked.

    u and t: as in `logprob_fwd_kernel`.
    """
    rows, vocab = logits.shape
    logprobs, largest, log_total = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(3))
    entropies = torch.empty(rows if entropy else 0, dtype=torch.float32, device=logits.device)
    launch = launch or heuristic(vocab)
    logprob_fwd_kernel[(rows,)](
        logits, targets, logprobs, entropies, largest, log_total, logits.stride(0), scale, softcap, 1.0 / temperature,
        ignore_index, VOCAB=vocab, SOFTCAP=softcap != 0, ENTROPY=entropy, BLOCK=launch.block,
        num_warps=launch.num_warps,
    )  # fmt: skip
    return logprobs, entropies, largest, log_total


def gradient_(
    logits: Tensor,
    targets: Tensor,
    entropies: Tensor,
    largest: Tensor,
    log_total: Tensor,
    d_logprobs: Tensor,
    d_entropies: Tensor | None,
    *,
    scale: float,
    softcap: float,
    temperature: float,
    ignore_index: int,
    launch: LogprobLaunch | None = None,
) -> None:
    """Overwrite logits [rows, V] with their gradient; the other tensors are [rows] and contiguous."""
    rows, vocab = logits.shape
    launch = launch or heuristic(vocab)
    logprob_bwd_kernel[(rows,)](
        logits, targets, entropies, largest, log_total, d_logprobs, d_logprobs if d_entropies is None else d_entropies,
        logits.stride(0), scale, softcap, 1.0 / temperature, ignore_index,
        VOCAB=vocab, SOFTCAP=softcap != 0, ENTROPY=d_entropies is not None, BLOCK=launch.block,
        num_warps=launch.num_warps,
    )  # fmt: skip
