"""Causal attention: dense, packed, sliding-window and soft-capped, and of completions that share prompts."""

from fastft.kernels.attention.op import attention
from fastft.kernels.attention.ref import masked_attention
from fastft.kernels.attention.shared import Numbers, SharedPrompts, shared_attention, shared_pairs

__all__ = ["Numbers", "SharedPrompts", "attention", "masked_attention", "shared_attention", "shared_pairs"]
