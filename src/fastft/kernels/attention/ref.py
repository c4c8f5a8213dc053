"""Attention in plain torch: the oracle, and what runs on a CPU."""

import torch
import torch.nn.functional as F


def allowed_pairs(
    length: int, window: int | None, cu_seqlens: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """Return the bool mask [T, T] of causal pairs (query, key).

    A query sees itself and at most `window` - 1 tokens before it. `cu_seqlens` [documents + 1] holds the offsets at
    which packed documents begin; no pair crosses one.
    """
    position = torch.arange(length, device=device)
    mask = position[None, :] <= position[:, None]
    if window is not None:
        mask = mask & (position[:, None] - position[None, :] < window)
    if cu_seqlens is not None:
        # All offsets: without the first there may be one, and Dynamo takes a length of one for another graph's.
        document = torch.bucketize(position, cu_seqlens.to(position.dtype), right=True)
        mask = mask & (document[:, None] == document[None, :])
    return mask


def masked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Return softmax(softcap(scale q k^T) + mask) v.

    q [B, H, T, D], k and v [B, Hk, S, D] with Hk a divisor of H; mask [.., T, S] bool (True attends) or additive, None
    lets every query see every key. With a soft cap c the scores become c tanh(s / c) (Gemma 2) and are fp32.
    """
    if softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
        )
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = torch.matmul(q, k.transpose(-1, -2)) * scale
    scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    weights = F.dropout(torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), dropout)
    return torch.matmul(weights, v)
