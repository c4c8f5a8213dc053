"""The registered op `fastft::linear_cross_entropy`: loss and gradients made together in the forward, chunk by chunk.

The logits of a chunk of rows are one GEMM; a kernel turns them into the gradient over the logits in place; two more
GEMMs turn that into the gradients of hidden states and, where it is trained, of the weight. The backward multiplies
them by the gradient that arrives. A gradient in 16 bits must not be rounded once more by that, nor underflow: with
1 / num_items = m * 2^k, m in [0.5, 1), the forward multiplies by m in fp32, and the backward by 2^k times the arriving
gradient, which is exact whenever that is a power of two, as it is 1 or a loss scale.

Rows without a label are dropped before the first GEMM where their number is known without asking a GPU for it
(`rows_to_compute`): a caller that knows a bound on the host (a collator does) says `valid_rows`. Where all rows are
kept, the kernel writes zeros for those.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastft.errors import Problem, UsageError
from fastft.kernels.dispatch import launch_on, use_triton
from fastft.kernels.fp8 import MULTIPLE as FP8_MULTIPLE
from fastft.kernels.fp8 import obstacle as kernels_obstacle
from fastft.kernels.linear_ce.launch import GPU_LOGITS_BYTES
from fastft.kernels.linear_ce.quantized import Fp8Head, Quantized, quantize_
from fastft.kernels.logits import (
    HeadGradients,
    check_range,
    fake_gradients,
    head_problems,
    logits_chunks,
    rows_to_compute,
    work_dtype,
)
from fastft.kernels.logits import chunk_rows as heuristic_rows


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    num_items: Tensor | float | None = None,
    valid_rows: int | None = None,
    chunk_rows: int | None = None,
    fp8: bool = False,
    factors: Sequence[Tensor] = (),
) -> Tensor:
    """Return the sum of the cross entropies of softcap * tanh(scale * (hidden W^T + bias) / softcap), per item.

    hidden: [..., D] in fp32, bf16 or fp16 (fp64 too, by the reference). weight: [V, D] and bias: [V], cast to the
    dtype of hidden. labels: [...] integers, already aligned with hidden; rows that have ignore_index count for
    nothing. softcap 0.0 is none. num_items: what the sum is divided by, a number or a scalar tensor, a constant to
    autograd; None is the number of labelled rows, and then the mean of none is NaN, as torch has it, whereas with
    num_items given it is 0; the gradients are zero either way. Returns an fp32 scalar (fp64 for fp64).

    valid_rows: an upper bound on the number of labelled rows that the caller knows without asking the device; a bound
    that is too low makes the loss NaN. chunk_rows: rows whose logits are held at once, by default a heuristic.
    fp8: the two products with the weight have fp8 factors, but for each row's label (`linear_ce.quantized`); for a
    weight without gradient that `fp8_obstacle` lets pass, else UsageError. factors: what `fp8_factors` made of the
    weight in the dtype of hidden, where a caller has kept that; otherwise it is made here.

    A label outside [0, V) raises UsageError on a CPU, and makes loss and gradients NaN on a GPU, where nothing can be
    raised without waiting for the device; nothing is read out of bounds. Without gradient mode no gradient is made.
    """
    problems = head_problems(hidden, weight, bias, "labels", labels, valid_rows=valid_rows, chunk_rows=chunk_rows)
    if not 0.0 <= label_smoothing <= 1.0:
        problems.append(Problem("label_smoothing", label_smoothing, "a number from 0 to 1"))
    if problems:
        raise UsageError(*problems)
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    why = fp8_obstacle(hidden, weight, bias) if fp8 else ""
    if why:
        raise UsageError(Problem("fp8", fp8, f"False here: {why}"))
    needs = [
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)
    ]
    if num_items is not None and not isinstance(num_items, Tensor):
        num_items = hidden.new_full((), float(num_items), dtype=work_dtype(hidden.dtype))  # a fill: no copy, no wait
    return torch.ops.fastft.linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1), bias, num_items,
        list(factors) if fp8 else [], float(scale), float(softcap), float(label_smoothing), ignore_index,
        -1 if valid_rows is None else valid_rows, chunk_rows or 0, fp8, *needs,
    )[0]  # fmt: skip


def fp8_obstacle(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    """Return why the head's products cannot have fp8 factors, "" if they can; `hidden` in the dtype of computation."""
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return "its weight is trained"
    # Its rows are padded, so that any vocabulary will do.
    return kernels_obstacle(hidden.device, hidden.dtype, FP8_MULTIPLE, hidden.shape[-1], nf4=False)


def _torch_cross_entropy_(
    logits: Tensor,
    labels: Tensor,
    factor: Tensor,
    *,
    scale: float,
    softcap: float,
    label_smoothing: float,
    ignore_index: int,
    gradient: bool,
) -> Tensor:
    """Do what `triton.cross_entropy_` does in plain torch; labels must be in range or ignore_index."""
    z = logits.to(work_dtype(logits.dtype)) * scale
    tanh = torch.tanh(z / softcap) if softcap else None
    log_p = torch.log_softmax(z if tanh is None else softcap * tanh, -1)
    valid = (labels != ignore_index)[:, None]
    target = labels[:, None].masked_fill(~valid, 0)
    losses = (label_smoothing - 1) * log_p.gather(1, target)
    if label_smoothing:
        losses = losses - label_smoothing * log_p.mean(-1, keepdim=True)
    if gradient:
        dz = log_p.exp_() - label_smoothing / logits.shape[1]
        dz.scatter_add_(1, target, torch.full_like(losses, label_smoothing - 1))
        dz = dz * (factor * scale)
        dz = dz if tanh is None else dz * (1 - tanh * tanh)
        logits.copy_(dz.masked_fill_(~valid, 0))
    return losses.masked_fill(~valid, 0).squeeze(1)


def _split_power_of_two(value: Tensor) -> tuple[Tensor, Tensor]:
    """Return (m, u) with value = m * u, m in [0.5, 1) and u a power of two; (1, 1) where value is not finite."""
    mantissa = torch.frexp(value).mantissa
    finite = value.isfinite()
    return torch.where(finite, mantissa, 1.0), torch.where(finite, value / mantissa, 1.0)  # the quotient is exact


@torch.library.custom_op("fastft::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    num_items: Tensor | None,
    factors: list[Tensor],
    scale: float,
    softcap: float,
    label_smoothing: float,
    ignore_index: int,
    valid_rows: int,
    chunk_rows: int,
    fp8: bool,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (loss, dhidden, dweight, dbias, unit) of hidden [n, D]; a gradient not needed is an empty tensor.

    valid_rows: -1 for unknown. chunk_rows: 0 for the heuristic's. dweight and dbias are fp32 (fp64 for fp64).
    The gradients of the loss are the returned ones times unit, a power of two.
    """
    fused = use_triton(hidden, weight)
    if not fused and hidden.device.type == "cpu":
        check_range(labels, "labels", ignore_index, weight.shape[0])
    settings = {"scale": scale, "softcap": softcap, "label_smoothing": label_smoothing, "ignore_index": ignore_index}
    weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    kept = rows_to_compute(labels, ignore_index, valid_rows)
    rows, targets = (hidden, labels) if kept is None else (hidden[kept], labels[kept])
    if num_items is None:
        num_items = (labels != ignore_index).sum()
    num_items = num_items.to(hidden.device, work_dtype(hidden.dtype)).reshape(())
    factor, unit = _split_power_of_two(1 / num_items)
    with torch.autocast(hidden.device.type, enabled=False):
        rows, given = rows.contiguous(), (targets.long(), bias, factor, settings, chunk_rows, fused)
        if fp8:
            head = Fp8Head.kept(weight, factors) if factors else Fp8Head.of(weight)
            losses, dhidden = _fp8_chunks(rows, head, *given, needs_hidden)
            dweight, dbias = (torch.empty(0, dtype=losses.dtype, device=hidden.device) for _ in range(2))
        else:
            losses, dhidden, dweight, dbias = _chunks(rows, weight, *given, (needs_hidden, needs_weight, needs_bias))
    if needs_hidden and kept is not None:
        dhidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device).index_copy_(0, kept, dhidden)
    loss = losses.sum() / num_items
    if kept is not None and valid_rows >= 0:  # a bound that drops labelled rows must not pass for a smaller loss
        loss = torch.where((labels != ignore_index).sum() > valid_rows, float("nan"), loss)
    return loss, dhidden, dweight, dbias, unit


def _chunks(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    factor: Tensor,
    settings: dict[str, float | int],
    chunk_rows: int,
    fused: bool,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (losses [n], dhidden, dweight, dbias), a chunk of rows at a time in one buffer of logits."""
    if fused:
        from fastft.kernels.linear_ce.triton import cross_entropy_
    else:
        cross_entropy_ = _torch_cross_entropy_
    (n, _), vocab = hidden.shape, weight.shape[0]
    height = chunk_rows or heuristic_rows(
        n, vocab, hidden.element_size(), cuda=hidden.is_cuda, gpu_bytes=GPU_LOGITS_BYTES
    )
    losses = torch.empty(n, dtype=work_dtype(hidden.dtype), device=hidden.device)
    made = HeadGradients.zero(hidden, weight, needs)
    with launch_on(hidden):
        for part, chunk in logits_chunks(hidden, weight, bias, height):
            losses[part] = cross_entropy_(chunk, labels[part], factor, gradient=any(needs), **settings)
            made.add(part, chunk, hidden, weight, needs)
    return losses, made.hidden, made.weight, made.bias


def _fp8_chunks(
    hidden: Tensor,
    head: Fp8Head,
    labels: Tensor,
    bias: Tensor | None,
    factor: Tensor,
    settings: dict[str, float | int],
    chunk_rows: int,
    fused: bool,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Return (losses [n], dhidden) with fp8 factors, a chunk of rows at a time in buffers that all chunks use."""
    n, vocab = hidden.shape[0], head.weight.shape[0]
    height = chunk_rows or heuristic_rows(
        n, vocab, hidden.element_size(), cuda=hidden.is_cuda, gpu_bytes=GPU_LOGITS_BYTES
    )
    losses = torch.empty(n, dtype=work_dtype(hidden.dtype), device=hidden.device)
    dhidden = torch.empty(hidden.shape if gradient else 0, dtype=hidden.dtype, device=hidden.device)
    logits, made = head.buffers(min(height, n), hidden.dtype)
    with launch_on(hidden):
        for start in range(0, n, height):
            part = slice(start, min(start + height, n))
            rows = part.stop - start
            target = labels[part].clamp(0, vocab - 1)
            own = head.weight[target]
            chunk = head.logits(hidden[part], bias, target, own, logits[:rows])
            into = Quantized(made.values[:rows], made.scale[:rows], made.slope[:rows])
            if fused:
                from fastft.kernels.linear_ce.triton import cross_entropy_

                losses[part] = cross_entropy_(
                    chunk, labels[part], factor, gradient=gradient, quantized=into if gradient else None, **settings
                )
            else:
                losses[part] = _torch_cross_entropy_(chunk, labels[part], factor, gradient=gradient, **settings)
                if gradient:
                    quantize_(chunk, target, into)
            if gradient:
                dhidden[part] = head.input_gradient(into, own)
    return losses, dhidden


@_linear_cross_entropy.register_fake
def _(
    hidden, weight, labels, bias, num_items, factors, scale, softcap, label_smoothing, ignore_index, valid_rows,
    chunk_rows, fp8, needs_hidden, needs_weight, needs_bias,
):  # fmt: skip
    made = fake_gradients(hidden, weight, (needs_hidden, needs_weight, needs_bias))
    return (
        hidden.new_empty((), dtype=work_dtype(hidden.dtype)),
        *made,
        made[0].new_empty((), dtype=work_dtype(hidden.dtype)),
    )


@torch.library.custom_op("fastft::scale_gradient", mutates_args=())
def _scale_gradient(value: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return value * factor in `dtype`, multiplied in fp32 or more, by a scalar not rounded to 16 bits first."""
    if use_triton(value, factor):
        from fastft.kernels.linear_ce.triton import scaled

        with launch_on(value):
            return scaled(value.contiguous(), factor, dtype)
    out = torch.empty(value.shape, dtype=dtype, device=value.device)
    return out.copy_(value.to(work_dtype(value.dtype)) * factor)


@_scale_gradient.register_fake
def _(value, factor, dtype):
    return value.new_empty(value.shape, dtype=dtype)


def _setup_context(ctx, inputs, output):
    weight, bias = inputs[1], inputs[3]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    ctx.made, ctx.factors = inputs[-3:], len(inputs[5])
    ctx.dtypes = (inputs[0].dtype, weight.dtype, None if bias is None else bias.dtype)


def _backward(ctx, d_loss, *_):
    needed = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    if any(need and not made for need, made in zip(needed, ctx.made)):
        raise RuntimeError(
            f"fastft::linear_cross_entropy makes its gradients in the forward: (hidden, weight, bias) need {needed}, "
            f"but it was called with {list(ctx.made)}"
        )
    others = ([None] * ctx.factors, *(None for _ in range(10)))
    if d_loss is None:
        return *(None,) * 5, *others
    *made, unit = ctx.saved_tensors
    factor = d_loss * unit
    dh, dw, db = (
        torch.ops.fastft.scale_gradient(value, factor, dtype) if need else None
        for value, dtype, need in zip(made, ctx.dtypes, needed)
    )
    return dh, dw, None, db, None, *others


_linear_cross_entropy.register_autograd(_backward, setup_context=_setup_context)
