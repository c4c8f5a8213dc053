"""fastft's attention behind transformers' public registrations: an attention function and the mask function beside it.

Both are needed. Without a mask function transformers makes no mask at all for an attention it does not know, and a
padding mask would be dropped in silence.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from fastft.kernels.attention import SharedPrompts, attention, masked_attention, shared_attention, shared_pairs

NAME = "fastft"


def register() -> None:
    """Register the attention with transformers under the name "fastft"; safe to call again."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask_for)


def implementations(model: Any) -> dict[str, str | None]:
    """Return the attention implementations of a transformers model: its own under "", and those of its sub-configs."""
    config = model.config
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    own = {name: part._attn_implementation for name, part in parts.items() if part is not None}
    return {"": config._attn_implementation, **own}


def put_back(model: Any, earlier: Mapping[str, str]) -> None:
    """Give a transformers model the `implementations` it had wherever it has fastft's; others were set since."""
    now = implementations(model)
    if NAME in now.values():
        model.set_attn_implementation({name: earlier[name] if given == NAME else given for name, given in now.items()})


def only_causal(device: torch.device) -> torch.Tensor:
    """Return the mask [1, 1, 0, 0] that says: causality, and what the layer itself adds to it, is the whole mask.

    transformers hands a 4-D mask on as it is. Without one it looks for packing in the position ids, and waits for the
    device to see what it finds.
    """
    return torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device)


def told_elsewhere(device: torch.device) -> torch.Tensor:
    """Return the mask [1, 1, 0, 1] that stands for what `cu_seq_lens_q` or `shared_prompts` tell.

    Where a model does not hand those on, no attention takes this mask for another.
    """
    return torch.empty(1, 1, 0, 1, dtype=torch.bool, device=device)


def attention_mask_for(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Return None where causality (and a window) is the whole mask, else transformers' 4-D bool mask.

    None lets `attention_forward` take a kernel that needs no mask. A padding mask, a cache, or packing that
    transformers found in the position ids by itself give the explicit mask.
    """
    fresh = q_length == kv_length and allow_is_causal_skip
    if fresh and (attention_mask is None or bool(attention_mask.all())):
        return None
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        **kwargs,
    )


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    shared_prompts: SharedPrompts | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it: query [B, H, T, D], key and value [B, Hk, S, D] -> ([B, T, H, D], None).

    `cu_seq_lens_q` [documents + 1] are the offsets of packed documents; it takes precedence over a mask, which for
    packed rows says the same. So does `shared_prompts`, with which rows must be within the window. A mask of
    `only_causal` is none.
    """
    if attention_mask is not None and attention_mask.shape[-1] == 0:
        attention_mask = None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    dropout = dropout if module.training else 0.0
    if shared_prompts is not None:
        out = _shared(query, key, value, scale, shared_prompts, sliding_window, softcap, dropout)
    elif cu_seq_lens_q is None and (attention_mask is not None or query.shape[2] != key.shape[2]):
        out = masked_attention(query, key, value, attention_mask, scale, softcap, dropout)
    else:
        out = attention(
            query,
            key,
            value,
            scale,
            window=sliding_window,
            softcap=softcap,
            cu_seqlens=cu_seq_lens_q,
            max_length=max_length_q,
            dropout=dropout,
        )
    return out.transpose(1, 2).contiguous(), None


def _shared(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    shared: SharedPrompts,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> torch.Tensor:
    if softcap is None and dropout == 0.0:
        return shared_attention(query, key, value, scale, shared, window)
    return masked_attention(query, key, value, shared_pairs(query.shape[2], shared), scale, softcap, dropout)
