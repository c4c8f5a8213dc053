"""The loss of one batch: the backbone, then head and cross entropy in one op that never holds all logits.

Position t predicts token t + 1. In packed rows (`position_ids` that start again at 0) the first token of a document is
no target, since nothing of its document stands before it.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastft.graph import attention
from fastft.graph.head import (
    Head,
    find_head,
    head_check,
    head_in_fp8,
    kept_factors,
    linear_operands,
    plain_linear,
    unwrapped,
)
from fastft.state import base_model

IGNORE = -100
# What the loss and the counts take from a batch, and the backbone does not. `valid_rows`: the number of targets, and
# `right_padded`: that no token stands behind padding, both known to the host. `filler`: how many tokens fill it up.
LABEL_KEYS = ("labels", "shift_labels", "num_items_in_batch", "valid_rows", "right_padded", "filler")
CHUNK_ELEMENTS = 2**26


def loss(
    model: Any,
    batch: Mapping[str, Any],
    num_items: Tensor | int | None = None,
    *,
    label_smoothing: float = 0.0,
    loss_type: str = "nll",
    router_share: float = 1.0,
) -> Tensor:
    """Return the training loss of `batch` as an fp32 scalar.

    `batch` holds `input_ids` and `labels` (int64 `[B, T]`, -100 where nothing is learnt) and whatever else the model's
    forward takes. The sum over targets is divided by `num_items` (the targets of the whole accumulated batch), or by
    this batch's own count. `loss_type` is "nll", or "dft" (each token's loss weighted by its own probability, without
    gradient through the weight; arXiv 2508.05629). A mixture of experts adds the loss of its router, if its config has
    `output_router_logits`, by its coefficient times `router_share`: it is a mean over this batch alone, and 1 / the
    number of micro-batches makes it one over all of them. A model whose head no spec describes, or whose spec does not
    hold, goes through its own forward; `head_check` says why.
    """
    targets = shifted_labels(batch)
    items = targets.ne(IGNORE).sum() if num_items is None else torch.as_tensor(num_items, device=targets.device)
    items = items.clamp(min=1)
    if not head_check(model).fused:
        return _own_loss(model, batch, targets, items, label_smoothing, loss_type, router_share)
    hidden = hidden_states(model, batch)
    head = find_head(model)
    hidden, targets = hidden.flatten(0, -2), targets.flatten().to(hidden.device)
    items = items.to(hidden.device)
    plain = plain_linear(head.module)
    if plain is None or loss_type == "dft":
        why = "its module is more than a linear layer" if plain is None else f"loss_type={loss_type!r} needs each loss"
        head_in_fp8(model, lambda: why)
        nll = _chunked_nll(head, hidden, targets, label_smoothing)
        return _weighted(nll, loss_type).sum() / items
    from fastft.kernels.linear_ce import fp8_factors, fp8_obstacle, linear_cross_entropy

    hidden, weight, bias = linear_operands(plain, hidden)
    fp8 = head_in_fp8(model, lambda: fp8_obstacle(hidden, weight, bias))
    return linear_cross_entropy(
        hidden,
        weight,
        targets,
        bias,
        scale=head.scale,
        softcap=head.softcap,
        label_smoothing=label_smoothing,
        ignore_index=IGNORE,
        num_items=items,
        valid_rows=batch.get("valid_rows"),
        fp8=fp8,
        factors=kept_factors(model, plain.weight, weight, lambda: fp8_factors(weight)) if fp8 else (),
    )


def token_statistics(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Return, for every row, the summed loss, the targets whose most likely token is right, and the targets.

    fp64 `[B, 3]`, without gradient and without holding all logits at once.
    """
    with torch.no_grad():
        targets = shifted_labels(batch)
        if head_check(model).fused:
            head, hidden = find_head(model), hidden_states(model, batch)
            rows = _chunked_statistics(head.logits, hidden.flatten(0, -2), targets.flatten().to(hidden.device))
        else:
            logits = model(**without_labels(batch), use_cache=False).logits
            rows = _chunked_statistics(lambda part: part.float(), logits.flatten(0, -2), targets.flatten())
        return rows.view(*targets.shape, 3).sum(dim=-2)


def statistics_of_logits(logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Return `token_statistics` from logits `[B, T, V]` that are already there."""
    targets = shifted_labels(batch).to(logits.device)
    rows = _chunked_statistics(lambda part: part.float(), logits.flatten(0, -2), targets.flatten())
    return rows.view(*targets.shape, 3).sum(dim=-2)


def shifted_labels(batch: Mapping[str, Any]) -> Tensor:
    """Return the target of every position, `[B, T]`: the next token's label, -100 at the end of a document."""
    if batch.get("shift_labels") is not None:
        return batch["shift_labels"]
    return F.pad(document_labels(batch)[..., 1:], (0, 1), value=IGNORE)


def document_labels(batch: Mapping[str, Any]) -> Tensor:
    """Return the labels `[B, T]` with the first token of every packed document left out."""
    labels, positions = batch["labels"], batch.get("position_ids")
    if positions is None or positions.shape != labels.shape:
        return labels
    return labels.masked_fill(positions == 0, IGNORE)


def without_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of `batch` goes into the backbone."""
    return {key: value for key, value in batch.items() if key not in (*LABEL_KEYS, "use_cache")}


def hidden_states(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Return the backbone's last hidden state `[B, T, D]`.

    A model wrapped for several devices (DDP, FSDP) is called as a whole, so that its own hooks run; the head then sees
    one position a row only. An unwrapped one runs its backbone alone.
    """
    inner = unwrapped(model)
    inputs = without_labels(batch) | _mask(base_model(inner), batch)
    backbone = base_model(inner).get_decoder()
    if inner is model and not _sharded(model):
        return backbone(**inputs, use_cache=False).last_hidden_state
    found: list[Tensor] = []
    handle = backbone.register_forward_hook(lambda module, args, output: found.append(output.last_hidden_state))
    try:
        model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
    return found[0]


def _mask(base: Any, batch: Mapping[str, Any]) -> dict[str, Tensor | None]:
    """Return the mask to use instead of the batch's own, if it needs none: a mask of padding on the right is left out.

    No token sees what stands behind it, and what stands at padding is used by nobody. Packed rows need none if their
    offsets are told.
    """
    masked = batch.get("attention_mask") is not None and not batch.get("right_padded")
    packed = batch.get("position_ids") is not None and batch.get("cu_seq_lens_q") is None
    if masked or packed:
        return {}
    ours = base.config._attn_implementation == attention.NAME
    return {"attention_mask": attention.only_causal(batch["input_ids"].device) if ours else None}


def _sharded(model: Any) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule) or isinstance(base_model(model), FSDPModule)


def _own_loss(
    model: Any,
    batch: Mapping[str, Any],
    targets: Tensor,
    items: Tensor,
    label_smoothing: float,
    loss_type: str,
    router_share: float,
) -> Tensor:
    """Return the loss of the model's own forward, over all its logits, and that of its router."""
    inputs = {**without_labels(batch), "use_cache": False}
    if label_smoothing or loss_type == "dft" or batch.get("labels") is None:
        output = model(**inputs)
        logits = output.logits.float()
        nll = F.cross_entropy(
            logits.flatten(0, -2),
            targets.flatten(),
            ignore_index=IGNORE,
            reduction="none",
            label_smoothing=label_smoothing,
        )
        return _weighted(nll, loss_type).sum() / items + _router_loss(model, output, router_share)
    labels = F.pad(document_labels(batch)[..., 1:], (1, 0), value=IGNORE)  # virtual tokens would predict the first
    forward = inspect.signature(base_model(unwrapped(model)).forward)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in forward.parameters.values()):
        output = model(**inputs, labels=labels, num_items_in_batch=items)
        return output.loss + _router_loss(model, output, router_share - 1.0)  # once it is in it
    output = model(**inputs, labels=labels)
    loss = output.loss - _router_loss(model, output, 1.0)
    return loss * targets.ne(IGNORE).sum() / items + _router_loss(model, output, router_share)


def _router_loss(model: Any, output: Any, share: float) -> Tensor | float:
    """Return what a router's loss adds to that of the tokens, times `share`; 0 without one."""
    base = base_model(unwrapped(model))
    text, found = base.config.get_text_config(), getattr(output, "aux_loss", None)
    if not share or found is None or not getattr(text, "output_router_logits", False):
        return 0.0
    # models keep the coefficient of the config that they were made with
    return share * getattr(base, "router_aux_loss_coef", getattr(text, "router_aux_loss_coef", 0.0)) * found


def _weighted(nll: Tensor, loss_type: str) -> Tensor:
    return nll * torch.exp(-nll).detach() if loss_type == "dft" else nll


def _chunk_rows(vocabulary: int) -> int:
    return max(64, CHUNK_ELEMENTS // vocabulary)


def _chunked_nll(head: Head, hidden: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """Return each row's loss, fp32 `[N]`; chunks of logits are made again in the backward pass."""

    def piece(part: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(
            head.logits(part), wanted, ignore_index=IGNORE, reduction="none", label_smoothing=label_smoothing
        )

    rows = _chunk_rows(head.module(hidden[:1]).shape[-1])
    pairs = zip(hidden.split(rows), targets.split(rows), strict=True)
    return torch.cat([checkpoint(piece, part, wanted, use_reentrant=False) for part, wanted in pairs])


def _chunked_statistics(logits_of: Callable[[Tensor], Tensor], rows: Tensor, targets: Tensor) -> Tensor:
    """Return loss, rightness and presence of every target, fp64 `[N, 3]`."""
    pieces = []
    for part, wanted in zip(rows.split(4096), targets.split(4096), strict=True):
        logits = logits_of(part)
        present = wanted.ne(IGNORE)
        nll = F.cross_entropy(logits, wanted, ignore_index=IGNORE, reduction="none")
        right = logits.argmax(dim=-1).eq(wanted) & present
        pieces.append(torch.stack([nll.double(), right.double(), present.double()], dim=-1))
    return torch.cat(pieces)
