"""The output head as the spec states it, and the proof that the model's own logits agree."""

from collections.abc import Callable
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn

from fastft.registry.resolve import find
from fastft.registry.spec import ModelSpec
from fastft.state import base_model, get_state

NOT_FP8_HEAD = "the loss head is not in fp8: {}"
CHECK_ATTRIBUTE = "fastft_head_check"
# Logits of the probe are blown up to this size, so that a forgotten soft cap (30 or 50) shows.
PROBE_LOGIT = 60.0
PROBE_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8, torch.bfloat16: 2e-2, torch.float16: 5e-3}


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


def unwrapped(model: Any) -> Any:
    """Return the transformers or PEFT model inside a data-parallel wrapper."""
    while not hasattr(model, "get_decoder") and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model


def head_check(model: Any) -> HeadCheck:
    """Say whether the spec's head is the model's, once a model: the spec's logits are compared with the model's own."""
    inner = unwrapped(model)
    base = base_model(inner)
    own = _own_forward(inner)
    if own:
        return HeadCheck(False, own)
    spec = find_spec(base)
    if spec is None:
        kind = getattr(base.config, "model_type", type(base).__name__)
        return HeadCheck(
            False, f"no spec describes the head of {kind!r}: the loss is transformers' own, from all logits"
        )
    missing = _missing(base, spec)
    if missing:
        return HeadCheck(False, f"{missing}: the loss is transformers' own, from all logits")
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
    return find(base.config)


def find_head(model: Any) -> Head:
    """Return the output head of a model whose family has a spec."""
    base = base_model(unwrapped(model))
    spec = find_spec(base)
    return Head(_active(base.get_submodule(spec.head.module)), *_constants(base, spec))


def head_in_fp8(model: Any, obstacle: Callable[[], str]) -> bool:
    """Say whether this training step's loss head has fp8 factors, as `fastft.compile` was asked.

    `obstacle` says why it cannot, "" if it can; that is remembered for the report.
    """
    inner = unwrapped(model)
    compiled = get_state(inner).compiled
    if compiled is None or not compiled.fp8_head or not compiled.enabled:
        return False
    if not (inner.training and torch.is_grad_enabled()):
        return False
    why = obstacle()
    remark = NOT_FP8_HEAD.format(why)
    if why and remark not in compiled.remarks:
        compiled.remarks.append(remark)
    return not why


def kept_factors(model: Any, own: Tensor, weight: Tensor, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Return what `make` makes of a head's weight for products in fp8, if the plan keeps that; else ().

    `own`: the module's weight, of which `weight` is made in the dtype of computation. One that is gathered from shards
    is another each time.
    """
    planned = get_state(unwrapped(model)).compiled.planned
    if planned is None or not planned.keeps_head or hasattr(own, "full_tensor"):
        return ()
    return planned.weights.of_head(own, weight.dtype, make)


def plain_linear(module: nn.Module) -> nn.Linear | None:
    """Return `module` if its output is nothing but `x W^T + b` of floating-point weights, else None."""
    if type(module).forward is not nn.Linear.forward or "forward" in module.__dict__ or hasattr(module, "_hf_hook"):
        return None
    hooked = module._forward_hooks or module._forward_pre_hooks
    return module if module.weight.is_floating_point() and not hooked else None


def linear_operands(linear: nn.Linear, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (hidden, weight, bias) on the head's device and in the dtype that it computes in, under autocast too.

    A sharded parameter is gathered; gradients flow back to its shards.
    """
    weight, bias = _whole(linear.weight), _whole(linear.bias)
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    hidden = hidden.to(device=weight.device, dtype=dtype)
    return hidden, weight.to(dtype), None if bias is None else bias.to(dtype)


def _whole(tensor: Tensor | None) -> Tensor | None:
    return tensor.full_tensor() if tensor is not None and hasattr(tensor, "full_tensor") else tensor


def _missing(base: Any, spec: ModelSpec) -> str:
    """Say which of the names in the spec's head the model does not have."""
    config, head = base.config.get_text_config(), spec.head
    unknown = [name for name in (head.scale, head.softcap) if name and not hasattr(config, name)]
    if unknown:
        return f"the config has no {' or '.join(map(repr, unknown))}, which the spec's head names"
    if head.module not in dict(base.named_modules()):
        return f"the model has no module {head.module!r}, which the spec calls its head"
    return ""


def _constants(base: Any, spec: ModelSpec) -> tuple[float, float]:
    config, head = base.config.get_text_config(), spec.head
    scale = float(getattr(config, head.scale)) if head.scale else 1.0
    softcap = float(getattr(config, head.softcap) or 0.0) if head.softcap else 0.0
    return (1.0 / scale if head.scale_inverse else scale), softcap


def _active(module: nn.Module) -> nn.Module:
    """Look through PEFT's wrapper of a module that is trained as a whole."""
    if not (hasattr(module, "modules_to_save") and hasattr(module, "original_module")):
        return module
    active = [name for name in module.active_adapters if name in module.modules_to_save]
    return module.original_module if module.disable_adapters or not active else module.modules_to_save[active[0]]


def _own_forward(model: Any) -> str:
    """Return why the loss is what the adapter's own forward makes of it, "" where it adds nothing of its own."""
    configs = getattr(model, "peft_config", None) or {}
    for name, config in configs.items():
        if getattr(config, "is_prompt_learning", False):
            return f"adapter {name!r} ({config.peft_type}) puts virtual tokens before the input: own forward"
        if getattr(config, "orth_reg_weight", None):
            return f"adapter {name!r} ({config.peft_type}) adds a term to the loss: own forward"
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
