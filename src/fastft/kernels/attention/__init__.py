"""Causal attention: dense, packed, sliding-window and soft-capped."""

from fastft.kernels.attention.op import attention
from fastft.kernels.attention.ref import masked_attention

__all__ = ["attention", "masked_attention"]
