"""RMSNorm in plain torch: the oracle, and what a graph gets where no opaque kernel is wanted.

Only torch functions and operators, no tensor methods and no look at values or shapes, so that it can be emitted into
an FX graph as `call_function` nodes. Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
"""

import torch
from torch import Tensor

aten = torch.ops.aten


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, offset: float, cast: str, compute: torch.dtype = torch.float32
) -> Tensor:
    """Return x_hat * (offset + weight), x_hat = x / sqrt(mean(x^2) + eps) over the last dimension, inside in `compute`.

    x [..., D], weight [D]. cast="before_weight": x_hat is rounded to x's dtype, then multiplied with torch's usual type
    promotion (Llama). cast="after_weight": all in `compute`, rounded to x's dtype at the end (Gemma, OLMo 2).
    """
    wide = aten.to(x, compute)
    x_hat = wide * torch.rsqrt(torch.mean(torch.pow(wide, 2), -1, keepdim=True) + eps)
    if cast == "before_weight":
        return (offset + weight if offset else weight) * aten.type_as(x_hat, x)
    scale = aten.to(weight, compute)
    return aten.type_as(x_hat * (offset + scale if offset else scale), x)


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float, compute: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return (dx [..., D] in x's dtype, dweight [D] in weight's dtype); rounding inside the forward passes gradients.

    With g = dy * (offset + weight): dx = rstd * (g - x_hat * mean(g * x_hat)), dweight = sum over rows of dy * x_hat.
    """
    dy, wide = aten.to(dy, compute), aten.to(x, compute)
    rstd = torch.rsqrt(torch.mean(torch.pow(wide, 2), -1, keepdim=True) + eps)
    x_hat = wide * rstd
    g = dy * (offset + aten.to(weight, compute))
    dx = rstd * (g - x_hat * torch.mean(g * x_hat, -1, keepdim=True))
    dweight = (dy * x_hat).sum_to_size(weight.shape)
    return aten.type_as(dx, x), aten.type_as(dweight, weight)
