"""The loss of one batch: the backbone, then head and cross entropy in one op that never holds all logits.

Position t predicts token t + 1. In packed rows (`position_ids` that start again at 0) the first token of a document is
no target, since nothing of its document stands before it.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastft.registry.spec import ModelSpec
from fastft.state import base_model, get_state

IGNORE = -100
# What the loss takes from a batch, and the backbone does not. `valid_rows`: the number of targets, known to the host.
LABEL_KEYS = ("labels", "shift_labels", "num_items_in_batch", "valid_rows")
CHECK_ATTRIBUTE = "fastft_head_check"
# Logits of the probe are blown up to this size, so that a forgotten soft cap (30 or 50) shows.
PROBE_LOGIT = 60.0
PROBE_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8, torch.bfloat16: 2e-2, torch.float16: 5e-3}
CHUNK_ELEMENTS = 2**26


@frozen
class HeadCheck:
    """Whether the head may be computed from the spec's constants, and if not, why."""

    fused: bool
    reason: str = ""


@frozen(eq=False)
class Head:
    """An output head: `logits = softcap(scale * module(hidden))`; `softcap` 0 means none."""

    module: nn.Module
    scale: float
    softcap: float

    def logits(self, hidden: Tensor) -> Tensor:
        """Return fp32 logits `[..., V]` of `hidden` `[..., D]`."""
        logits = self.module(hidden) * self.scale
        if self.softcap:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits.float()


def loss(
    model: Any,
    batch: Mapping[str, Any],
    num_items: Tensor | int | None = None,
    *,
    label_smoothing: float = 0.0,
    loss_type: str = "nll",
) -> Tensor:
    """Return the training loss of `batch` as an fp32 scalar.

    `batch` holds `input_ids` and `labels` (int64 `[B, T]`, -100 where nothing is learnt) and whatever else the model's
    forward takes. The sum over targets is divided by `num_items` (the targets of the whole accumulated batch), or by
    this batch's own count. `loss_type` is "nll", or "dft" (each token's loss weighted by its own probability, without
    gradient through the weight; arXiv 2508.05629). A model whose head no spec describes, or whose spec does not hold,
    goes through its own forward; `head_check` says why.
    """
    targets = shifted_labels(batch)
    items = targets.ne(IGNORE).sum() if num_items is None else torch.as_tensor(num_items, device=targets.device)
    items = items.clamp(min=1)
    if not head_check(model).fused:
        return _own_loss(model, batch, targets, items, label_smoothing, loss_type)
    hidden = hidden_states(model, batch)
    head = find_head(model)
    hidden, targets = hidden.flatten(0, -2), targets.flatten().to(hidden.device)
    items = items.to(hidden.device)
    plain = plain_linear(head.module)
    if plain is None or loss_type == "dft":
        nll = _chunked_nll(head, hidden, targets, label_smoothing)
        return _weighted(nll, loss_type).sum() / items
    from fastft.kernels.linear_ce import linear_cross_entropy

    hidden, weight, bias = _same_dtype(hidden, _whole(plain.weight), _whole(plain.bias))
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
    backbone = base_model(inner).get_decoder()
    if inner is model and not _sharded(model):
        return backbone(**without_labels(batch), use_cache=False).last_hidden_state
    found: list[Tensor] = []
    handle = backbone.register_forward_hook(lambda module, args, output: found.append(output.last_hidden_state))
    try:
        model(**without_labels(batch), use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
    return found[0]


def unwrapped(model: Any) -> Any:
    """Return the transformers or PEFT model inside a data-parallel wrapper."""
    while not hasattr(model, "get_decoder") and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model


def _sharded(model: Any) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule) or isinstance(base_model(model), FSDPModule)


def head_check(model: Any) -> HeadCheck:
    """Say whether the spec's head is the model's, once a model: the spec's logits are compared with the model's own."""
    inner = unwrapped(model)
    base = base_model(inner)
    prompt = _prompt_learning(inner)
    if prompt:
        return HeadCheck(False, prompt)
    spec = find_spec(base)
    if spec is None:
        kind = getattr(base.config, "model_type", type(base).__name__)
        return HeadCheck(
            False, f"no spec describes the head of {kind!r}: the loss is transformers' own, from all logits"
        )
    key = (spec.head, *_constants(base, spec), id(base))
    known = base.__dict__.get(CHECK_ATTRIBUTE)
    if known is None or known[0] != key:
        known = (key, _probe(base, find_head(inner)))
        object.__setattr__(base, CHECK_ATTRIBUTE, known)
    return known[1]


def find_spec(base: Any) -> ModelSpec | None:
    """Return the spec kept on the model, or the registered one of its config."""
    spec = get_state(base).spec
    if spec is not None:
        return spec
    from fastft.registry.resolve import find

    return find(base.config)


def find_head(model: Any) -> Head:
    """Return the output head of a model whose family has a spec."""
    base = base_model(unwrapped(model))
    spec = find_spec(base)
    return Head(_active(base.get_submodule(spec.head.module)), *_constants(base, spec))


def plain_linear(module: nn.Module) -> nn.Linear | None:
    """Return `module` if its output is nothing but `x W^T + b` of floating-point weights, else None."""
    if type(module).forward is not nn.Linear.forward or "forward" in module.__dict__ or hasattr(module, "_hf_hook"):
        return None
    hooked = module._forward_hooks or module._forward_pre_hooks
    return module if module.weight.is_floating_point() and not hooked else None


def _constants(base: Any, spec: ModelSpec) -> tuple[float, float]:
    config, head = base.config.get_text_config(), spec.head
    scale = float(getattr(config, head.scale)) if head.scale else 1.0
    softcap = float(getattr(config, head.softcap) or 0.0) if head.softcap else 0.0
    return (1.0 / scale if head.scale_inverse else scale), softcap


def _active(module: nn.Module) -> nn.Module:
    """Look through PEFT's wrapper of a module that is trained as a whole."""
    from peft.utils.other import ModulesToSaveWrapper

    if not isinstance(module, ModulesToSaveWrapper):
        return module
    active = [name for name in module.active_adapters if name in module.modules_to_save]
    return module.original_module if module.disable_adapters or not active else module.modules_to_save[active[0]]


def _prompt_learning(model: Any) -> str:
    configs = getattr(model, "peft_config", None) or {}
    for name, config in configs.items():
        if getattr(config, "is_prompt_learning", False):
            return f"adapter {name!r} ({config.peft_type}) puts virtual tokens before the input: own forward"
    return ""


def _probe(base: Any, head: Head) -> HeadCheck:
    """Compare the spec's logits with the model's own, both from the same hidden states blown up to `PROBE_LOGIT`."""
    kept: list[Tensor] = []

    def amplify(module: nn.Module, args: Any, output: Any) -> Any:
        size = head.module(output.last_hidden_state).float().abs().max() * abs(head.scale)
        output.last_hidden_state = output.last_hidden_state * (PROBE_LOGIT / size.clamp(min=1e-6))
        kept.append(output.last_hidden_state)
        return output

    device = base.get_input_embeddings().weight.device
    ids = (torch.arange(16, device=device) * 7919 + 11) % base.config.get_text_config().vocab_size
    modes = [(module, module.training) for module in head.module.modules()]
    handle = base.get_decoder().register_forward_hook(amplify)
    try:
        head.module.eval()
        with torch.no_grad(), torch.random.fork_rng():  # dropout in the layers must not move the run's random state
            theirs = base(input_ids=ids[None], use_cache=False).logits.float()
            ours = head.logits(kept[0])
    finally:
        handle.remove()
        for module, mode in modes:
            module.training = mode
    error = ((ours - theirs).norm() / theirs.norm()).item()
    allowed = PROBE_TOLERANCE.get(kept[0].dtype, 2e-2)
    if error <= allowed:
        return HeadCheck(True)
    reason = f"the spec's head gives other logits than the model (relative error {error:.2g}, allowed {allowed:g})"
    return HeadCheck(False, f"{reason}: the loss is transformers' own, from all logits")


def _own_loss(
    model: Any, batch: Mapping[str, Any], targets: Tensor, items: Tensor, label_smoothing: float, loss_type: str
) -> Tensor:
    """Return the loss of the model's own forward (auxiliary losses included), over all its logits."""
    inputs = {**without_labels(batch), "use_cache": False}
    if label_smoothing or loss_type == "dft":
        logits = model(**inputs).logits.float()
        nll = F.cross_entropy(
            logits.flatten(0, -2),
            targets.flatten(),
            ignore_index=IGNORE,
            reduction="none",
            label_smoothing=label_smoothing,
        )
        return _weighted(nll, loss_type).sum() / items
    labels = document_labels(batch)
    forward = inspect.signature(base_model(unwrapped(model)).forward)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in forward.parameters.values()):
        return model(**inputs, labels=labels, num_items_in_batch=items).loss
    return model(**inputs, labels=labels).loss * targets.ne(IGNORE).sum() / items


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


def _whole(tensor: Tensor | None) -> Tensor | None:
    """Gather a sharded parameter; gradients flow back to its shards."""
    return tensor.full_tensor() if tensor is not None and hasattr(tensor, "full_tensor") else tensor


def _same_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast as the head's own linear would under autocast; else to the weight's dtype. Device: the head's."""
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    hidden = hidden.to(device=weight.device, dtype=dtype)
    return hidden, weight.to(dtype), None if bias is None else bias.to(dtype)
