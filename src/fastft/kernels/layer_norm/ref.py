"""LayerNorm in plain torch: the oracle, and what a graph gets where no opaque kernel is wanted.

`layer_norm` uses only torch functions and operators, so that it can be emitted into an FX graph as `call_function`
nodes. Ba, Kiros and Hinton, "Layer Normalization", 2016.
"""

import torch
from torch import Tensor

aten = torch.ops.aten


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, compute: torch.dtype = torch.float32
) -> Tensor:
    """Return x_hat * weight + bias, x_hat = (x - mean) / sqrt(var + eps) over the last dimension, rounded at the end.

    x [..., D]; weight and bias [D], or [H, D] for x [..., H, D]. All inside in `compute`; returns x's dtype.
    """
    wide = aten.to(x, compute)
    centred = wide - torch.mean(wide, -1, keepdim=True)
    y = centred * torch.rsqrt(torch.mean(torch.pow(centred, 2), -1, keepdim=True) + eps)
    if weight is not None:
        y = aten.to(weight, compute) * y
    if bias is not None:
        y = y + aten.to(bias, compute)
    return aten.type_as(y, x)


def layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, eps: float, affine: torch.Size, compute: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx in x's dtype, dweight and dbias of shape `affine` in `compute`).

    With g = dy * weight: dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat)); dweight and dbias sum dy * x_hat and dy.
    """
    dy, wide = aten.to(dy, compute), aten.to(x, compute)
    centred = wide - torch.mean(wide, -1, keepdim=True)
    rstd = torch.rsqrt(torch.mean(torch.pow(centred, 2), -1, keepdim=True) + eps)
    x_hat = centred * rstd
    g = dy if weight is None else dy * aten.to(weight, compute)
    dx = rstd * (g - torch.mean(g, -1, keepdim=True) - x_hat * torch.mean(g * x_hat, -1, keepdim=True))
    return aten.type_as(dx, x), (dy * x_hat).sum_to_size(affine), dy.sum_to_size(affine)
