"""The registered op `fastft::linear_cross_entropy`: loss and gradients made together in the forward, chunk by chunk.

The logits of a chunk of rows are one GEMM; a kernel turns them into the gradient over the logits in place; two more
GEMMs turn that into the gradients of hidden states and, where it is trained, of the weight. The backward multiplies
them by the gradient that arrives. A gradient in 16 bits must not be rounded once more by that, nor underflow: with
1 / num_items = m * 2^k, m in [0.5, 1), the forward multiplies by m in fp32, and the backward by 2^k times the arriving
gradient, which is exact whenever that is a power of two, as it is 1 or a loss scale.

Rows without a label. On a CPU they are dropped before the first GEMM. On a GPU their number is known only to the
device, and asking for it would stall the queue of launches: all rows are kept and the kernel writes zeros for them;
a caller that knows a bound on the host (a collator does) says `valid_rows`, and the rows beyond it are dropped.
"""

from contextlib import nullcontext

import torch
from torch import Tensor

from fastft.errors import Problem, UsageError
from fastft.kernels.dispatch import use_triton
from fastft.kernels.linear_ce.launch import chunk_rows as heuristic_rows


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
) -> Tensor:
    """Return the sum of the cross entropies of softcap * tanh(scale * (hidden W^T + bias) / softcap), per item.

    hidden: [..., D] in fp32, bf16 or fp16 (fp64 too, by the reference). weight: [V, D] and bias: [V], cast to the
    dtype of hidden. labels: [...] integers, already aligned with hidden; rows that have ignore_index count for
    nothing. softcap 0.0 is none. num_items: what the sum is divided by, a number or a scalar tensor, a constant to
    autograd; None is the number of labelled rows, and then the mean of none is NaN, as torch has it, whereas with
    num_items given it is 0; the gradients are zero either way. Returns an fp32 scalar (fp64 for fp64).

    valid_rows: an upper bound on the number of labelled rows that the caller knows without asking the device; a bound
    that is too low makes the loss NaN. chunk_rows: rows whose logits are held at once, by default a heuristic.

    A label outside [0, V) raises UsageError on a CPU, and makes loss and gradients NaN on a GPU, where nothing can be
    raised without waiting for the device; nothing is read out of bounds. Without gradient mode no gradient is made.
    """
    _check(hidden, weight, labels, bias, label_smoothing, valid_rows, chunk_rows)
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    needs = [
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)
    ]
    if num_items is not None and not isinstance(num_items, Tensor):
        num_items = hidden.new_full((), float(num_items), dtype=_work_dtype(hidden.dtype))  # a fill: no copy, no wait
    return torch.ops.fastft.linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1), bias, num_items,
        float(scale), float(softcap), float(label_smoothing), ignore_index,
        -1 if valid_rows is None else valid_rows, chunk_rows or 0, *needs,
    )[0]  # fmt: skip


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    label_smoothing: float,
    valid_rows: int | None,
    chunk_rows: int | None,
) -> None:
    problems = []
    if weight.dim() != 2 or weight.shape[-1] != hidden.shape[-1]:
        problems.append(Problem("weight", tuple(weight.shape), f"shape (V, {hidden.shape[-1]})"))
    if labels.shape != hidden.shape[:-1]:
        problems.append(Problem("labels", tuple(labels.shape), f"shape {tuple(hidden.shape[:-1])}, one for each row"))
    if labels.is_floating_point():
        problems.append(Problem("labels", labels.dtype, "integers"))
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        problems.append(Problem("bias", tuple(bias.shape), f"shape {(weight.shape[0],)}"))
    if not 0.0 <= label_smoothing <= 1.0:
        problems.append(Problem("label_smoothing", label_smoothing, "a number from 0 to 1"))
    for name, value in (("valid_rows", valid_rows), ("chunk_rows", chunk_rows)):
        if value is not None and value < (name == "chunk_rows"):
            problems.append(Problem(name, value, "None or a positive number"))
    if problems:
        raise UsageError(*problems)


def _work_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


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
    z = logits.to(_work_dtype(logits.dtype)) * scale
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


def _keep_labelled(labels: Tensor, ignore_index: int, valid_rows: int) -> Tensor | None:
    """Return the rows to compute, labelled ones first, or None for all of them."""
    if labels.device.type == "cpu" and valid_rows < 0:
        kept = (labels != ignore_index).nonzero().squeeze(1)
        return None if kept.shape[0] == labels.shape[0] else kept
    if valid_rows < 0 or valid_rows >= labels.shape[0]:
        return None
    return torch.argsort((labels == ignore_index).to(torch.uint8), stable=True)[:valid_rows]


def _check_range(labels: Tensor, ignore_index: int, vocab: int) -> None:
    wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= vocab))]
    if wrong.numel():
        raise UsageError(
            Problem(
                "labels", wrong[0].item(), f"0 to {vocab - 1}, or {ignore_index} for none", f"{wrong.numel()} like it"
            )
        )


def _accumulate(into: Tensor, dlogits: Tensor, hidden: Tensor) -> None:
    """Add dlogits^T hidden to `into`, which has at least fp32, without rounding the sum to 16 bits in between."""
    if into.dtype == dlogits.dtype:
        into.addmm_(dlogits.t(), hidden)
    elif into.is_cuda:
        torch.ops.aten.addmm.dtype_out(into, dlogits.t(), hidden, into.dtype, out=into)
    else:
        into.addmm_(dlogits.t().to(into.dtype), hidden.to(into.dtype))


@torch.library.custom_op("fastft::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    num_items: Tensor | None,
    scale: float,
    softcap: float,
    label_smoothing: float,
    ignore_index: int,
    valid_rows: int,
    chunk_rows: int,
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
        _check_range(labels, ignore_index, weight.shape[0])
    settings = {"scale": scale, "softcap": softcap, "label_smoothing": label_smoothing, "ignore_index": ignore_index}
    weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    kept = _keep_labelled(labels, ignore_index, valid_rows)
    rows, targets = (hidden, labels) if kept is None else (hidden[kept], labels[kept])
    if num_items is None:
        num_items = (labels != ignore_index).sum()
    num_items = num_items.to(hidden.device, _work_dtype(hidden.dtype)).reshape(())
    factor, unit = _split_power_of_two(1 / num_items)
    with torch.autocast(hidden.device.type, enabled=False):
        losses, dhidden, dweight, dbias = _chunks(
            rows.contiguous(), weight, targets.long(), bias, factor, settings, chunk_rows, fused,
            (needs_hidden, needs_weight, needs_bias),
        )  # fmt: skip
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
    (n, _), vocab, work = hidden.shape, weight.shape[0], _work_dtype(hidden.dtype)
    height = min(n, chunk_rows or heuristic_rows(n, vocab, hidden.element_size(), cuda=hidden.is_cuda)) or 1
    logits = torch.empty(min(height, n), vocab, dtype=hidden.dtype, device=hidden.device)
    losses = torch.empty(n, dtype=work, device=hidden.device)
    dhidden = torch.empty(hidden.shape if needs[0] else 0, dtype=hidden.dtype, device=hidden.device)
    dweight = torch.zeros(weight.shape if needs[1] else 0, dtype=work, device=hidden.device)
    dbias = torch.zeros(vocab if needs[2] else 0, dtype=work, device=hidden.device)
    with torch.cuda.device(hidden.device) if hidden.is_cuda else nullcontext():
        for start in range(0, n, height):
            part = slice(start, min(start + height, n))
            chunk = logits[: part.stop - start]
            if bias is None:
                torch.mm(hidden[part], weight.t(), out=chunk)
            else:
                torch.addmm(bias, hidden[part], weight.t(), out=chunk)
            losses[part] = cross_entropy_(chunk, labels[part], factor, gradient=any(needs), **settings)
            if needs[0]:
                torch.mm(chunk, weight, out=dhidden[part])
            if needs[1]:
                _accumulate(dweight, chunk, hidden[part])
            if needs[2]:
                dbias += chunk.sum(0, dtype=work)
    return losses, dhidden, dweight, dbias


@_linear_cross_entropy.register_fake
def _(
    hidden, weight, labels, bias, num_items, scale, softcap, label_smoothing, ignore_index, valid_rows, chunk_rows,
    needs_hidden, needs_weight, needs_bias,
):  # fmt: skip
    work = _work_dtype(hidden.dtype)
    return (
        hidden.new_empty((), dtype=work),
        hidden.new_empty(hidden.shape if needs_hidden else (0,)),
        hidden.new_empty(weight.shape if needs_weight else (0,), dtype=work),
        hidden.new_empty(weight.shape[:1] if needs_bias else (0,), dtype=work),
        hidden.new_empty((), dtype=work),
    )


@torch.library.custom_op("fastft::scale_gradient", mutates_args=())
def _scale_gradient(value: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return value * factor in `dtype`, multiplied in fp32 or more, by a scalar not rounded to 16 bits first."""
    if use_triton(value, factor):
        from fastft.kernels.linear_ce.triton import scaled

        with torch.cuda.device(value.device) if value.is_cuda else nullcontext():
            return scaled(value.contiguous(), factor, dtype)
    out = torch.empty(value.shape, dtype=dtype, device=value.device)
    return out.copy_(value.to(_work_dtype(value.dtype)) * factor)


@_scale_gradient.register_fake
def _(value, factor, dtype):
    return value.new_empty(value.shape, dtype=dtype)


def _setup_context(ctx, inputs, output):
    weight, bias = inputs[1], inputs[3]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    ctx.made = inputs[-3:]
    ctx.dtypes = (inputs[0].dtype, weight.dtype, None if bias is None else bias.dtype)


def _backward(ctx, d_loss, *_):
    needed = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    if any(need and not made for need, made in zip(needed, ctx.made)):
        raise RuntimeError(
            f"fastft::linear_cross_entropy makes its gradients in the forward: (hidden, weight, bias) need {needed}, "
            f"but it was called with {list(ctx.made)}"
        )
    if d_loss is None:
        return (None,) * 14
    *made, unit = ctx.saved_tensors
    factor = d_loss * unit
    dh, dw, db = (
        torch.ops.fastft.scale_gradient(value, factor, dtype) if need else None
        for value, dtype, need in zip(made, ctx.dtypes, needed)
    )
    return (dh, dw, None, db, *(None for _ in range(10)))


_linear_cross_entropy.register_autograd(_backward, setup_context=_setup_context)
