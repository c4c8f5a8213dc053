"""The output head as the spec states it, and the proof that the model's own logits agree."""

from collections.abc import Callable

import torch
from attrs import frozen
from torch import nn

from fastft.graph.verify import FLOOR, SAME_MATHEMATICS, relative_difference
from fastft.registry.spec import HeadPoint
from fastft.state import base_model

PROBE_TOKENS = 8


@frozen
class HeadConstants:
    """`logits = softcap * tanh(scale * head(hidden) / softcap)`; no cap where `softcap` is 0."""

    scale: float = 1.0
    softcap: float = 0.0

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Scale and cap `logits` [..., V], in their dtype."""
        logits = logits * self.scale if self.scale != 1.0 else logits
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits


def head_constants(config: object, point: HeadPoint) -> HeadConstants:
    """Read the head's scale and soft cap from a model's config by the attributes that the spec names."""
    scale = getattr(config, point.scale, None) if point.scale else None
    scale = 1.0 if scale is None else float(scale)
    softcap = getattr(config, point.softcap, None) if point.softcap else None
    return HeadConstants(1.0 / scale if point.scale_inverse else scale, float(softcap or 0.0))


def backbone(model: nn.Module) -> nn.Module:
    """Return the part of a causal language model that gives the last hidden states."""
    return base_model(model).get_decoder()


def prove_head(model: nn.Module, point: HeadPoint) -> str:
    """Compare the model's own logits with those the spec's head gives; return "" if they agree, else the reason.

    A few tokens go through the whole model twice, without gradients and in eval mode, which is restored.
    """
    base = base_model(model)
    head = base.get_output_embeddings()
    if head is None:
        return "the model has no output embeddings"
    constants = head_constants(base.config.get_text_config(), point)
    logits, hidden = _in_eval_mode(base, lambda: _probe(base))
    with torch.no_grad():
        ours = constants.apply(head(hidden))
    error = relative_difference(logits, ours)
    allowed = FLOOR + SAME_MATHEMATICS * torch.finfo(hidden.dtype).eps
    if error <= allowed:
        return ""
    return f"the spec's head gives other logits than the model: difference {error:.1e} (allowed {allowed:.1e})"


def _probe(base: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    vocabulary = base.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(PROBE_TOKENS, device=base.get_input_embeddings().weight.device) * 7 + 1) % vocabulary
    with torch.no_grad():
        logits = base(input_ids=ids[None], use_cache=False).logits
        hidden = base.get_decoder()(input_ids=ids[None], use_cache=False).last_hidden_state
    return logits, hidden


def _in_eval_mode(model: nn.Module, function: Callable[[], tuple[torch.Tensor, torch.Tensor]]):
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        return function()
    finally:
        for module in training:
            module.training = True
