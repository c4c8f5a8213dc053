"""The registered op `fastft::linear_logprob`: log-probabilities and entropies, chunk by chunk, and their gradients.

Under a frozen head the gradient of log-probability i over the hidden states is a multiple of one row that depends on
row i alone: its slope, ([j = y_i] - p_ij) W in terms of the logits. The forward makes the slopes right after the
logits, in fp32 so that nothing is rounded twice, and the backward multiplies each by the gradient that arrives: two
GEMMs over the head in all. What cannot be had that way, gradients of a trained head and of entropies, makes the logits
again in the backward pass, which takes a third.
"""

import torch
from torch import Tensor

from fastft.errors import Problem, UsageError
from fastft.kernels.dispatch import launch_on, use_triton
from fastft.kernels.linear_logprob.launch import GPU_LOGITS_BYTES
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

SCALED_ROWS = 4096


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
    temperature: float = 1.0,
    entropy: bool = False,
    entropy_gradient: bool = True,
    ignore_index: int = -100,
    valid_rows: int | None = None,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return log softmax(z)[targets] and the entropy of softmax(z), z = softcap tanh(scale (hidden W^T + bias) /
    softcap) / temperature.

    hidden: [..., D] in fp32, bf16 or fp16 (fp64 too, by the reference). weight: [V, D] and bias: [V], cast to the
    dtype of hidden. targets: [...] integers; where they are ignore_index both results are 0. softcap 0.0 is none.
    Returns (logprobs, entropies), [...] fp32 (fp64 for fp64), in nats; entropies is None unless `entropy`, and a
    constant to autograd without `entropy_gradient`, which under a frozen head saves a third of the time.

    valid_rows: an upper bound on the number of targets that the caller knows without asking the device; a bound that is
    too low makes all results NaN. chunk_rows: rows whose logits are held at once, by default a heuristic.

    A target outside [0, V) raises UsageError on a CPU, and makes its log-probability and gradient NaN on a GPU, where
    nothing can be raised without waiting for the device. Without gradient mode nothing is kept for a backward pass.
    """
    problems = head_problems(hidden, weight, bias, "targets", targets, valid_rows=valid_rows, chunk_rows=chunk_rows)
    positive = {"temperature": temperature, "scale": scale}
    problems += [Problem(name, value, "a positive number") for name, value in positive.items() if not value > 0]
    if not softcap >= 0:
        problems.append(Problem("softcap", softcap, "a positive number, or 0 for none"))
    if problems:
        raise UsageError(*problems)
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    needs = [
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)
    ]
    logprobs, entropies, *_ = torch.ops.fastft.linear_logprob(
        hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1), bias,
        float(scale), float(softcap), float(temperature), entropy, ignore_index,
        -1 if valid_rows is None else valid_rows, chunk_rows or 0,
        needs == [True, False, False] and not (entropy and entropy_gradient),
    )  # fmt: skip
    if not entropy:
        return logprobs.view(targets.shape), None
    return logprobs.view(targets.shape), (entropies if entropy_gradient else entropies.detach()).view(targets.shape)


def _bounded(logits: Tensor, scale: float, softcap: float, temperature: float) -> tuple[Tensor, float]:
    """Return (u, a) with z = a u: the tanh where there is a soft cap, else a copy of the logits, in fp32 or more."""
    u = logits.to(work_dtype(logits.dtype), copy=True)
    return (u.mul_(scale).div_(softcap).tanh_(), softcap / temperature) if softcap else (u, scale / temperature)


def _torch_statistics(
    logits: Tensor,
    targets: Tensor,
    *,
    scale: float,
    softcap: float,
    temperature: float,
    entropy: bool,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Do what `triton.statistics` does in plain torch; targets must be in range or ignore_index."""
    u, slope = _bounded(logits, scale, softcap, temperature)
    largest = u.amax(-1)
    z = u.sub_(largest[:, None]).mul_(slope)
    ignored = targets == ignore_index
    chosen = z.gather(1, targets.masked_fill(ignored, 0)[:, None]).squeeze(1)
    p = z.exp()
    total = p.sum(-1)
    log_total = total.log()
    entropies = z.new_empty(0)
    if entropy:
        moment = p.mul_(z.masked_fill_(p == 0, 0)).sum(-1)  # a forbidden token adds 0, not 0 times infinity
        entropies = (log_total - moment / total).masked_fill_(ignored, 0)
    return (chosen - log_total).masked_fill_(ignored, 0), entropies, largest, log_total


def _torch_gradient_(
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
) -> None:
    """Do what `triton.gradient_` does in plain torch."""
    u, slope = _bounded(logits, scale, softcap, temperature)
    tanh = u.clone() if softcap else None
    log_p = u.sub_(largest[:, None]).mul_(slope).sub_(log_total[:, None])
    ignored = targets == ignore_index
    dz = log_p.exp()
    if d_entropies is None:
        dz.mul_(-d_logprobs[:, None])
    else:
        log_p.masked_fill_(dz == 0, 0).add_(entropies[:, None]).mul_(d_entropies[:, None])
        dz.mul_(log_p.add_(d_logprobs[:, None]).neg_())
    dz.scatter_add_(1, targets.masked_fill(ignored, 0)[:, None], d_logprobs.to(dz.dtype)[:, None])
    dz.mul_(scale / temperature)
    if tanh is not None:
        dz.mul_(tanh.square_().neg_().add_(1))
    logits.copy_(dz.masked_fill_(ignored[:, None], 0))


def _prepared(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, ignore_index: int, valid_rows: int
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor | None]:
    """Return (kept, hidden, weight, targets, bias) of the rows to compute; kept is None for all."""
    kept = rows_to_compute(targets, ignore_index, valid_rows)
    rows, wanted = (hidden, targets) if kept is None else (hidden[kept], targets[kept])
    bias = None if bias is None else bias.to(hidden.dtype)
    return kept, rows.contiguous(), weight.to(hidden.dtype), wanted.long(), bias


def _height(hidden: Tensor, weight: Tensor, chunk_rows: int) -> int:
    n, size = hidden.shape[0], hidden.element_size()
    return chunk_rows or heuristic_rows(n, weight.shape[0], size, cuda=hidden.is_cuda, gpu_bytes=GPU_LOGITS_BYTES)


def _spread(kept: Tensor | None, values: Tensor, rows: int) -> Tensor:
    """Return `values` of the kept rows among zeros for the others."""
    return values if kept is None else values.new_zeros(rows, *values.shape[1:]).index_copy_(0, kept, values)


@torch.library.custom_op("fastft::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float,
    temperature: float,
    entropy: bool,
    ignore_index: int,
    valid_rows: int,
    chunk_rows: int,
    slopes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (logprobs, entropies, largest, log_total, slopes) of hidden [n, D].

    largest and log_total are what `triton.statistics` returns. slopes [n, D] fp32 (fp64 for fp64) are the gradients of
    the log-probabilities over the hidden states; they, and entropies, are empty unless asked for.
    valid_rows: -1 for unknown. chunk_rows: 0 for the heuristic's.
    """
    fused = use_triton(hidden, weight)
    if fused:
        from fastft.kernels.linear_logprob.triton import gradient_, statistics
    else:
        statistics, gradient_ = _torch_statistics, _torch_gradient_
    if not fused and hidden.device.type == "cpu":
        check_range(targets, "targets", ignore_index, weight.shape[0])
    n = hidden.shape[0]
    settings = {"scale": scale, "softcap": softcap, "temperature": temperature, "ignore_index": ignore_index}
    kept, hidden, weight, wanted, bias = _prepared(hidden, weight, targets, bias, ignore_index, valid_rows)
    count, work = hidden.shape[0], work_dtype(hidden.dtype)
    found = [
        torch.empty(size, dtype=work, device=hidden.device) for size in (count, count if entropy else 0, count, count)
    ]
    made = HeadGradients.zero(hidden, weight, (slopes, False, False), work)
    with torch.autocast(hidden.device.type, enabled=False), launch_on(hidden):
        for part, chunk in logits_chunks(hidden, weight, bias, _height(hidden, weight, chunk_rows)):
            values = statistics(chunk, wanted[part], entropy=entropy, **settings)
            for whole, value in zip(found, values):
                whole[part] = value
            if slopes:
                logprobs, *rest = values
                gradient_(chunk, wanted[part], *rest, torch.ones_like(logprobs), None, **settings)
                made.add(part, chunk, hidden, weight, (True, False, False))
    asked = (True, entropy, True, True, slopes)
    found = [_spread(kept, v, n) if needed else v for v, needed in zip((*found, made.hidden), asked)]
    if kept is not None and valid_rows >= 0:  # a bound that drops targets must not pass for likely tokens
        lost = (targets != ignore_index).sum() > valid_rows
        found[:2] = [torch.where(lost, float("nan"), v) for v in found[:2]]
    return tuple(found)


@_linear_logprob.register_fake
def _(
    hidden, weight, targets, bias, scale, softcap, temperature, entropy, ignore_index, valid_rows, chunk_rows, slopes
):  # fmt: skip
    rows = [hidden.new_empty(hidden.shape[0], dtype=work_dtype(hidden.dtype)) for _ in range(3)]
    entropies = hidden.new_empty(hidden.shape[0] if entropy else 0, dtype=work_dtype(hidden.dtype))
    made = hidden.new_empty(hidden.shape if slopes else (0,), dtype=work_dtype(hidden.dtype))
    return rows[0], entropies, rows[1], rows[2], made


@torch.library.custom_op("fastft::linear_logprob_backward", mutates_args=())
def _linear_logprob_backward(
    d_logprobs: Tensor,
    d_entropies: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    entropies: Tensor,
    largest: Tensor,
    log_total: Tensor,
    scale: float,
    softcap: float,
    temperature: float,
    ignore_index: int,
    valid_rows: int,
    chunk_rows: int,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dhidden, dweight, dbias) from logits made again; dweight and dbias are fp32 (fp64 for fp64)."""
    if use_triton(hidden, weight):
        from fastft.kernels.linear_logprob.triton import gradient_
    else:
        gradient_ = _torch_gradient_
    n, needs = hidden.shape[0], (needs_hidden, needs_weight, needs_bias)
    settings = {"scale": scale, "softcap": softcap, "temperature": temperature, "ignore_index": ignore_index}
    kept, hidden, weight, wanted, bias = _prepared(hidden, weight, targets, bias, ignore_index, valid_rows)
    known = [entropies, largest, log_total, d_logprobs, d_entropies]
    known = [v if v is None or not v.numel() else (v if kept is None else v[kept]).contiguous() for v in known]
    made = HeadGradients.zero(hidden, weight, needs)
    with torch.autocast(hidden.device.type, enabled=False), launch_on(hidden):
        for part, chunk in logits_chunks(hidden, weight, bias, _height(hidden, weight, chunk_rows)):
            rows = [v if v is None or not v.numel() else v[part] for v in known]
            gradient_(chunk, wanted[part], *rows, **settings)
            made.add(part, chunk, hidden, weight, needs)
    return _spread(kept, made.hidden, n) if needs_hidden else made.hidden, made.weight, made.bias


@_linear_logprob_backward.register_fake
def _(
    d_logprobs, d_entropies, hidden, weight, targets, bias, entropies, largest, log_total, scale, softcap, temperature,
    ignore_index, valid_rows, chunk_rows, needs_hidden, needs_weight, needs_bias,
):  # fmt: skip
    return fake_gradients(hidden, weight, (needs_hidden, needs_weight, needs_bias))


@torch.library.custom_op("fastft::scale_rows", mutates_args=())
def _scale_rows(value: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return value [n, D] with row i multiplied by factor [n][i] in fp32 or more, rounded once to `dtype`."""
    out = torch.empty(value.shape, dtype=dtype, device=value.device)
    for start in range(0, value.shape[0], SCALED_ROWS):  # a CPU casts whole tensors before it multiplies
        part = slice(start, start + SCALED_ROWS)
        torch.mul(value[part], factor[part, None], out=out[part])
    return out


@_scale_rows.register_fake
def _(value, factor, dtype):
    return value.new_empty(value.shape, dtype=dtype)


def _setup_context(ctx, inputs, output):
    hidden, weight, targets, bias, *settings = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, targets, bias, *output[1:])
    scale, softcap, temperature, _, *rest = settings
    ctx.settings, ctx.slopes = (scale, softcap, temperature, *rest[:-1]), rest[-1]


def _backward(ctx, d_logprobs, d_entropies, *_):
    hidden, weight, targets, bias, entropies, largest, log_total, slopes = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    if d_logprobs is None and d_entropies is None:
        return (None,) * 12
    if d_entropies is not None and not entropies.numel():
        d_entropies = None
    if d_entropies is None and ctx.slopes and needs == [True, False, False]:
        return torch.ops.fastft.scale_rows(slopes, d_logprobs, hidden.dtype), *(None,) * 11
    if d_logprobs is None:
        d_logprobs = torch.zeros_like(largest)
    made = torch.ops.fastft.linear_logprob_backward(
        d_logprobs, d_entropies, hidden, weight, targets, bias, entropies, largest, log_total, *ctx.settings, *needs
    )
    dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
    dh, dw, db = (value.to(dtype) if need else None for value, dtype, need in zip(made, dtypes, needs))
    return dh, dw, None, db, *(None,) * 8


_linear_logprob.register_autograd(_backward, setup_context=_setup_context)
