"""The attention that suits the device, the mask and the data type; exact in each case."""

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from fastft.kernels.attention.packed import packed_attention
from fastft.kernels.attention.parts import autocast, flash_refusal
from fastft.kernels.attention.ref import allowed_pairs, masked_attention


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_length: int | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Return causal self-attention.

    q [B, H, T, D], k and v [B, Hk, T, D] -> [B, H, T, D]. `window` is the number of tokens a query sees, itself
    included. `cu_seqlens` [documents + 1] int32 are the document offsets within the batch laid out as one row of B * T
    tokens, `max_length` the longest document; no attention crosses documents.
    """
    batch, _, length, _ = q.shape
    if window is not None and cu_seqlens is None and length <= window:
        window = None
    if window is None and softcap is None and cu_seqlens is None:
        grouped = k.shape[1] != q.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=grouped, dropout_p=dropout
        )
    if cu_seqlens is not None and batch > 1:
        q, k, v = (_one_row(t) for t in (q, k, v))
    q, k, v = autocast(q, k, v)
    out = _special(q, k, v, scale, window, softcap, cu_seqlens, max_length, dropout)
    if cu_seqlens is not None and batch > 1:
        out = out.view(out.shape[1], batch, length, out.shape[-1]).transpose(0, 1)
    return out


def _one_row(t: torch.Tensor) -> torch.Tensor:
    """[B, H, T, D] -> [1, H, B * T, D]."""
    return t.transpose(0, 1).reshape(1, t.shape[1], t.shape[0] * t.shape[2], t.shape[3])


def _special(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    cu_seqlens: torch.Tensor | None,
    max_length: int | None,
    dropout: float,
) -> torch.Tensor:
    flash = dropout == 0.0 and not flash_refusal(q.device, q.dtype, q.shape[-1])
    if flash and softcap is None:
        return _packed(q, k, v, scale, window, cu_seqlens, max_length)
    if q.is_cuda and dropout == 0.0 and softcap is not None:
        return _flex(q, k, v, scale, window, softcap, cu_seqlens)
    mask = allowed_pairs(q.shape[2], window, cu_seqlens, q.device)
    return masked_attention(q, k, v, mask, scale, softcap, dropout)


def _packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int | None,
    cu_seqlens: torch.Tensor | None,
    max_length: int | None,
) -> torch.Tensor:
    batch, heads, length, size = q.shape
    if cu_seqlens is None:
        cu_seqlens = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=q.device)
        max_length = length
    if max_length is None:
        max_length = batch * length
    q, k, v = (t.transpose(1, 2).reshape(batch * length, t.shape[1], size) for t in (q, k, v))
    out = packed_attention(q, k, v, scale, cu_seqlens, max_length, window)
    return out.view(batch, length, heads, size).transpose(1, 2)


def _flex(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float,
    cu_seqlens: torch.Tensor | None,
) -> torch.Tensor:
    length = q.shape[2]
    position = torch.arange(length, device=q.device)
    bounds = position.new_full((1,), length) if cu_seqlens is None else cu_seqlens.to(position.dtype)
    document = torch.bucketize(position, bounds, right=True)
    reach = length if window is None else window

    def visible(_batch, _head, query, key):
        return (key <= query) & (query - key < reach) & (document[query] == document[key])

    def capped(score, _batch, _head, _query, _key):
        return softcap * torch.tanh(score / softcap)

    blocks = create_block_mask(visible, None, None, length, length, device=q.device)
    return flex_attention(
        q, k, v, score_mod=capped, block_mask=blocks, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
    )
