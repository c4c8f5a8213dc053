"""Log-probabilities of whole sequences of a batch that is padded on the right, and what else losses ask of the head.

A `HeadOfModel` stands where a TRL trainer calls its model for log-probabilities: it runs the backbone, and the head on
those positions alone whose next token has a label, a few rows of logits at a time.
"""

from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor

from fastft.errors import Problem, UsageError
from fastft.graph.head import Head, find_head, head_check
from fastft.kernels.logits import chunk_rows
from fastft.train import step
from fastft.train.layout import lay_out
from fastft.train.logprobs import head_logprobs

GPU_LOGITS_BYTES = 128 << 20


@frozen(eq=False)
class SequenceLogprobs:
    """What there is of every predicted token, `[B, T - 1]`, 0 where the label is -100.

    log_probs: fp32, with gradient. The others have none, and are None unless asked for. entropy: of the distribution,
    in nats. mean_logits: over the vocabulary. is_top1: whether the label is the most likely token. log_sum_sq_probs:
    log(sum p^2). aux_loss: always None.
    """

    log_probs: Tensor
    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    aux_loss: None = None


def sequence_logprobs(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    statistics: bool = False,
    share_prompts: bool = True,
) -> SequenceLogprobs:
    """Return the log-probability of every token that has a label, given the tokens before it.

    input_ids, attention_mask, labels: int64 `[B, T]`, padded on the right; labels are -100 where nothing is asked for.
    statistics: also the other fields, which costs the head's forward pass once more. share_prompts: compute what rows
    have in common before their labels once, where that is exact (`layout.lay_out`).

    Raises `UsageError` for a model whose head no spec describes: its log-probabilities would need all logits; and for
    rows that are padded elsewhere than on the right.
    """
    check = head_check(model)
    if not check.fused:
        remedy = "Add a spec of the model's family (fastft registry), or train it with TRL's own trainer."
        raise UsageError(
            Problem("model", check.reason.split(": the loss")[0], "a head whose family has a spec that holds", remedy)
        )
    head = find_head(model)
    inputs, before, places = _placed(model, input_ids, attention_mask, labels, share_prompts)
    hidden = step.hidden_states(model, inputs).flatten(0, 1).index_select(0, before)
    targets = labels[:, 1:].flatten()[places].to(hidden.device)
    log_probs, entropy = head_logprobs(head, hidden, targets, entropy=statistics, entropy_gradient=False)
    places = places.to(hidden.device)

    def spread(values: Tensor) -> Tensor:
        rows, columns = labels.shape
        return values.new_zeros(rows * (columns - 1)).index_copy(0, places, values).view(rows, columns - 1)

    if not statistics:
        return SequenceLogprobs(spread(log_probs))
    mean, top, squares = _statistics(head, hidden.detach(), targets).unbind(1)
    return SequenceLogprobs(spread(log_probs), spread(entropy), spread(mean), spread(top).bool(), spread(squares))


def _placed(
    model: Any, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, share_prompts: bool
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Return the backbone's inputs, and of each token with a label where the token before it stands in them, flat,
    and where its result belongs in `[B, T - 1]`, flat.
    """
    present = labels[:, 1:].cpu().ne(step.IGNORE)
    row, column = present.nonzero(as_tuple=True)
    mask = attention_mask.cpu() != 0
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        remedy = "Padding on the right is not attended to; any other would be."
        raise UsageError(Problem("attention_mask", "tokens behind padding", "padding on the right alone", remedy))
    lengths, counts = mask.sum(1), present.sum(1)
    starts = lengths - counts  # of the answers, if these are all at the end of their rows
    device, width = input_ids.device, labels.shape[1]
    at_end = torch.arange(1, width) >= starts[:, None]
    keep = int(counts.max()) if len(counts) else 0
    if keep and torch.equal(present, at_end & (torch.arange(1, width) < lengths[:, None])) and bool((starts > 0).all()):
        ids, mask = _prompts_left(input_ids, starts, counts, keep)
        layout = lay_out(model, ids, mask, keep, share_prompts)
        if layout.kind != "padded":
            places = layout.places
            own = starts.to(device)[places // keep] + places % keep - 1
            return layout.inputs, layout.before, places // keep * (width - 1) + own
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "right_padded": True}
    return inputs, (row * width + column).to(device), (row * (width - 1) + column).to(device)


def _prompts_left(ids: Tensor, starts: Tensor, counts: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Return ids and mask `[B, P + keep]` with prompts, the tokens before `starts`, padded on the left."""
    longest = int(starts.max())
    prompt = torch.arange(longest) - (longest - starts[:, None])
    answer = starts[:, None] + torch.arange(keep)
    mask = torch.cat([prompt >= 0, torch.arange(keep) < counts[:, None]], dim=1)
    source = torch.cat([prompt, answer], dim=1).clamp(0, ids.shape[1] - 1).to(ids.device)
    mask = mask.to(ids.device, torch.int64)
    return ids.gather(1, source) * mask, mask


@torch.no_grad()
def _statistics(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    """Return mean logit, whether the target is the largest, and log(sum p^2) of every row, fp32 `[N, 3]`."""
    vocabulary = head.module(hidden[:1]).shape[-1]
    on_gpu = hidden.device.type == "cuda"
    size = chunk_rows(len(hidden), vocabulary, 4, cuda=on_gpu, gpu_bytes=GPU_LOGITS_BYTES)
    pieces = [hidden.new_zeros(0, 3, dtype=torch.float32)]
    for part, wanted in zip(hidden.split(size), targets.split(size), strict=True):
        pieces.append(_row_statistics(head.logits(part), wanted))  # no name keeps logits while the next are made
    return torch.cat(pieces)


def _row_statistics(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the same of one chunk of logits, which are overwritten, so that nothing of their size stands beside."""
    mean = logits.mean(-1)
    largest, likeliest = logits.max(-1)
    exps = logits.sub_(largest[:, None]).exp_()
    total = exps.sum(-1)
    squares = exps.square_().sum(-1).log() - 2 * total.log()
    return torch.stack([mean, likeliest.eq(targets).float(), squares], dim=1)


class HeadOfModel:
    """Called as TRL calls a model with a fused head, and computes what that would by `sequence_logprobs`.

    autocast: a context manager's maker, in which the model computes. statistics: whether to compute more than
    `log_probs`; if not, the rest is zeros, and so is what TRL makes of it. A call for anything else is the model's own.
    """

    def __init__(self, model: Any, autocast: Any, statistics: bool) -> None:
        self.model, self.autocast, self.statistics = model, autocast, statistics

    def __call__(self, *args: Any, fused_lm_head: bool = False, **inputs: Any) -> Any:
        """Return `SequenceLogprobs` of `input_ids`, `attention_mask` and `labels`, or the model's own output."""
        with self.autocast():
            if not fused_lm_head:
                return self.model(*args, **inputs)
            ids, mask, labels = (inputs.pop(name) for name in ("input_ids", "attention_mask", "labels"))
            inputs.pop("use_cache", None)
            if inputs:
                raise UsageError(Problem("inputs of the batch", sorted(inputs), "input_ids and attention_mask alone"))
            found = sequence_logprobs(self.model, ids, mask, labels, self.statistics)
        if self.statistics:
            return found
        nothing = torch.zeros_like(found.log_probs, requires_grad=False)
        return evolve(found, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
