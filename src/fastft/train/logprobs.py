"""Log-probabilities of completions: the backbone, then the head on completion tokens alone, chunk by chunk.

A batch is laid out as TRL lays it out: prompts padded on the left, completions on the right. The log-probability of a
token is that of the tempered distribution, softmax(logits / temperature), logits with the head's scale and soft cap.
"""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from attrs import frozen
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastft.errors import Problem, UsageError
from fastft.graph.head import Head, find_head, head_check, head_in_fp8, linear_operands, plain_linear, unwrapped
from fastft.state import base_model
from fastft.train import step
from fastft.train.layout import lay_out


@frozen(eq=False)
class CompletionLogprobs:
    """What `completion_logprobs` returns.

    logprobs: fp32 `[B, keep]`, 0 where the completion is padded. entropies: likewise, or None where not asked for.
    layout: "shared" if every distinct prompt was computed once, else "packed" (rows end to end, without padding) or
    "padded"; reason: why not "shared". computed: tokens that the backbone took, padding among them.
    """

    logprobs: Tensor
    entropies: Tensor | None
    layout: str
    reason: str
    computed: int


def completion_logprobs(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    keep: int,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    entropy_gradient: bool = True,
    share_prompts: bool = True,
) -> CompletionLogprobs:
    """Return the log-probability of every token of `input_ids[:, -keep:]` given the tokens before it.

    input_ids, attention_mask: int64 `[B, T]`, prompts padded on the left, completions (the last `keep` columns) on the
    right. temperature divides the logits. entropy: also that of each distribution the tokens were drawn from, in nats.
    entropy_gradient: False if nothing is to be learnt from the entropies, which saves a third of the head's time.
    share_prompts: compute a prompt that several rows have only once, where that is exact; the result says where it is
    not, and why. Layers that fastft compiles run without padding.

    Differentiable with respect to the model's parameters in gradient mode. Positions count from a row's first token
    that is not padding. A model whose head no spec describes, or whose spec does not hold, goes through its own
    forward, and a warning says why. Raises UsageError.
    """
    _check(input_ids, attention_mask, keep, temperature)
    check = head_check(model)
    if not check.fused:
        return _from_own_logits(model, input_ids, attention_mask, keep, temperature, entropy, check.reason)
    layout = lay_out(model, input_ids, attention_mask, keep, share_prompts)
    hidden = step.hidden_states(model, layout.inputs).flatten(0, 1).index_select(0, layout.before)
    head_in_fp8(model, lambda: "log-probabilities are computed in the model's own dtype")
    found = head_logprobs(
        find_head(model),
        hidden,
        input_ids[:, -keep:].flatten()[layout.places],
        temperature=temperature,
        entropy=entropy,
        entropy_gradient=entropy_gradient,
    )
    values = [None if value is None else _spread(value, layout.places, len(input_ids), keep) for value in found]
    return CompletionLogprobs(*values, layout.kind, layout.reason, layout.inputs["input_ids"].numel())


def head_logprobs(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    entropy_gradient: bool = True,
    valid_rows: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the log-probabilities of `targets` under `head` of `hidden`, and the entropies or None; both fp32 `[...]`.

    hidden: `[..., D]`. targets: int64 `[...]`, -100 where there is none; the results are 0 there. entropy_gradient:
    False if the entropies need none, which saves time. valid_rows: the number of targets, if the caller knows it.
    """
    plain = plain_linear(head.module)
    if plain is None:
        values, entropies = _chunked(head.logits, hidden, targets, temperature, entropy)
        return values, entropies if entropies is None or entropy_gradient else entropies.detach()
    from fastft.kernels.linear_logprob import linear_logprob

    hidden, weight, bias = linear_operands(plain, hidden)
    return linear_logprob(
        hidden,
        weight,
        targets.to(hidden.device),
        bias,
        scale=head.scale,
        softcap=head.softcap,
        temperature=temperature,
        entropy=entropy,
        entropy_gradient=entropy_gradient,
        ignore_index=step.IGNORE,
        valid_rows=valid_rows,
    )


def _check(input_ids: Tensor, attention_mask: Tensor, keep: int, temperature: float) -> None:
    problems = []
    if input_ids.dim() != 2:
        problems.append(Problem("input_ids", tuple(input_ids.shape), "shape (B, T)"))
    elif not 1 <= keep < input_ids.shape[1]:
        problems.append(
            Problem("keep", keep, f"1 to {input_ids.shape[1] - 1}: a token needs one before it to be predicted from")
        )
    if attention_mask.shape != input_ids.shape:
        problems.append(Problem("attention_mask", tuple(attention_mask.shape), f"shape {tuple(input_ids.shape)}"))
    if not temperature > 0:
        problems.append(Problem("temperature", temperature, "a positive number"))
    if problems:
        raise UsageError(*problems)


def _spread(values: Tensor, places: Tensor, rows: int, keep: int) -> Tensor:
    """Return `values` at their places among zeros, [rows, keep]."""
    return values.new_zeros(rows * keep).index_copy(0, places.to(values.device), values).view(rows, keep)


def _from_own_logits(
    model: Any, input_ids: Tensor, attention_mask: Tensor, keep: int, temperature: float, entropy: bool, why: str
) -> CompletionLogprobs:
    """Return the log-probabilities from all logits of the model's own forward, and warn."""
    why = f"log-probabilities from all logits: {why.split(': the loss')[0]}"
    warnings.warn(why, stacklevel=3)
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    forward = base_model(unwrapped(model)).forward
    if _accepts(forward, "position_ids"):
        batch["position_ids"] = (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)
    if _accepts(forward, "logits_to_keep"):
        logits = model(**batch, logits_to_keep=keep + 1).logits[:, :-1]
    else:
        logits = model(**batch).logits[:, -keep - 1 : -1]
    targets = input_ids[:, -keep:].masked_fill(attention_mask[:, -keep:] == 0, step.IGNORE)
    values = _chunked(lambda part: part.float(), logits, targets, temperature, entropy)
    return CompletionLogprobs(*values, "padded", why, input_ids.numel())


def _accepts(function: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(function).parameters


def _chunked(
    logits_of: Callable[[Tensor], Tensor], rows: Tensor, targets: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Return log-probabilities and entropies; chunks of logits are made again in the backward pass.

    Padded rows are left out of the logits; their results are zeros.
    """
    rows, wanted = rows.flatten(0, -2), targets.flatten().to(rows.device)
    kept = wanted.ne(step.IGNORE).nonzero().squeeze(1)

    def piece(part: Tensor, ids: Tensor) -> Tensor:
        log_p = torch.log_softmax(logits_of(part) / temperature, dim=-1)
        found = log_p.gather(1, ids[:, None])
        if not entropy:
            return found
        finite = log_p.masked_fill(log_p == -float("inf"), 0)  # a forbidden token adds 0, not 0 times infinity
        return torch.cat([found, -(log_p.exp() * finite).sum(-1, keepdim=True)], dim=1)

    pairs = zip(rows[kept].split(512), wanted[kept].split(512), strict=True)
    pieces = torch.cat([checkpoint(piece, part, ids, use_reentrant=False) for part, ids in pairs])
    out = pieces.new_zeros(wanted.numel(), pieces.shape[1]).index_copy(0, kept, pieces)
    columns = [column.view(targets.shape) for column in out.unbind(1)]
    return columns[0], columns[1] if entropy else None
