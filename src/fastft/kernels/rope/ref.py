"""Rotary position embedding in plain torch: the oracle, and what a graph gets where no opaque kernel is wanted.

Only torch functions and operators, so that it can be emitted into an FX graph as `call_function` nodes.
Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
"""

import torch
from torch import Tensor

LAYOUTS = ("half", "interleaved")

aten = torch.ops.aten


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    pairs = cos.shape[-1]
    if layout == "half":
        first, second = x[..., :pairs], x[..., pairs : 2 * pairs]
    else:
        first, second = x[..., 0 : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2]
    turned = aten.type_as(first * cos - second * sin, x), aten.type_as(second * cos + first * sin, x)
    rest = x[..., 2 * pairs :]
    if layout == "half":
        return torch.cat([*turned, rest], -1)
    return torch.cat([torch.flatten(torch.stack(turned, -1), -2), rest], -1)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Rotate pairs of features by their angles: (a, b) becomes (a cos - b sin, b cos + a sin).

    q [B, H, T, D], k [B, Hk, T, D], cos and sin [B or 1, T, R/2]. Pairs are features (i, i + R/2) for layout "half",
    (2i, 2i + 1) for "interleaved"; features from R on pass unchanged. Products and sums are rounded to the promoted
    dtype of x and cos, the result to x's: hand over fp32 tables where a model rotates in fp32.

    The results lie in memory as [B, T, H, D] do, as what a projection gives does. Attention kernels write their outputs
    and gradients as their inputs lie: so nothing is copied between the projections and them.
    """
    cos, sin = torch.unsqueeze(cos, 2), torch.unsqueeze(sin, 2)
    q, k = (_rotate(torch.transpose(x, 1, 2), cos, sin, layout) for x in (q, k))
    return torch.transpose(q, 1, 2), torch.transpose(k, 1, 2)
