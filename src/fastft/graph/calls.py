"""Calls of a decoder layer by kind: each kind is captured apart, with its recompilations counted apart."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from attrs import frozen
from torch import nn

# What says that a batch's rows lie end to end, and how.
ROWS = ("shared_prompts", "cu_seq_lens_q")
OFFSETS = ("cu_seq_lens_q", "cu_seq_lens_k")


@frozen
class Kind:
    """How a batch's rows lie (one of `ROWS`, "" as a rectangle), and whether gradients are wanted.

    `adapters`: where none are wanted, the adapters that compute in the layer: a reference is the model without them.
    """

    rows: str = ""
    gradients: bool = True
    adapters: tuple[str, ...] = ()


def kind_of(layer: nn.Module, kwargs: Mapping[str, Any]) -> Kind | None:
    """Return the kind of a call in training mode, None for one that is not to be compiled.

    Without gradients that is all but the batches that `fastft.train.layout` has laid end to end: the passes for
    log-probabilities that go with training. Probes, sampling and what users call for themselves are left alone.
    """
    rows = next((name for name in ROWS if kwargs.get(name) is not None), "")
    if torch.is_grad_enabled():
        return Kind(rows)
    if not kwargs.get("lengths_vary") or torch.is_inference_mode_enabled():
        return None
    return Kind(rows, False, active_adapters(layer))


def active_adapters(layer: nn.Module) -> tuple[str, ...]:
    """Return PEFT's adapters that compute in `layer`, none where they are switched off (PEFT is not imported)."""
    for module in layer.modules():
        if hasattr(module, "disable_adapters") and hasattr(module, "active_adapters"):
            return () if module.disable_adapters else tuple(module.active_adapters)
    return ()


def mark_lengths(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Say to Dynamo that the length of this batch's row is of this batch alone."""
    length = (args[0] if args else kwargs["hidden_states"]).shape[1]
    for leaf in torch.utils._pytree.tree_leaves((args, dict(kwargs))):
        if isinstance(leaf, torch.Tensor) and leaf.dim() > 1 and leaf.shape[1] == length:
            torch._dynamo.maybe_mark_dynamic(leaf, 1)


def mark_documents(kwargs: Mapping[str, Any]) -> None:
    """Say to Dynamo that the number of this batch's documents is of this batch alone."""
    for offsets in {id(one): one for name in OFFSETS if (one := kwargs.get(name)) is not None}.values():
        torch._dynamo.maybe_mark_dynamic(offsets, 0)
