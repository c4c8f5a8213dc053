"""The model widened to fp32: what its arms would compute if nothing were rounded on the way.

And with the factors of its products with frozen weights rounded to fp8, the plain way: what that does to anybody's
numbers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Widened(nn.Module):
    """A frozen linear layer that computes in fp32 with the weights it has, widened in every call.

    4-bit weights are dequantised to the dtype the layer computes in first, since those are the weights that its arms
    multiply by. Between calls they take the memory they took before.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] in fp32 for x [..., in]."""
        bias = self.layer.bias
        return functional.linear(x.float(), weight_of(self.layer).float(), None if bias is None else bias.float())


def weight_of(layer: nn.Linear) -> Tensor:
    """Return the weight [out, in] that the layer multiplies by, in the dtype it computes in."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, state).to(layer.compute_dtype)


def widen(model: Any) -> None:
    """Make the model compute in fp32, in place: its values stay, all that it computes of them is fp32.

    Frozen linear layers are widened one at a time; embeddings, norms and all that is trained become fp32 where they
    are. Outside of autocast the trained weights, and so their gradients, are fp32 then. No gradient may be left over.
    """
    kept: set[int] = set()
    for prefix, module in list(model.named_modules()):
        scale = dict(module.named_buffers(recurse=False)).get("embed_scale")
        if scale is not None:  # Gemma's embedding rounds it to the dtype of the weights: a constant of the model
            module.embed_scale = scale.to(module.weight.dtype).float()
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            parent, _, child = prefix.rpartition(".")
            setattr(model.get_submodule(parent), child, Widened(module))
            kept |= {id(parameter) for parameter in module.parameters()}
    kept -= {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}  # tied heads
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.data = parameter.data.float()


def no_tf32() -> None:
    """Multiply fp32 matrices in fp32 from here on, in this process."""
    torch.set_float32_matmul_precision("highest")


class _Fp8Product(torch.autograd.Function):
    """x W^T with x and W rounded to fp8 by rows; in the gradient dy by rows, and W by columns."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return rounded_product(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return rounded_product(dy, weight.t()), None


def rounded_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T in the dtype of x, [..., N], for x [..., K] and W [N, K], whose rows are rounded to e4m3 (max 448).

    e4m3's numbers are bf16 numbers too: the products are exact, their sums are in fp32 and rounded to bf16.
    """

    def rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
        scale = matrix.float().abs().amax(-1, keepdim=True).clamp_min(1e-30) / 448
        return (matrix / scale).to(torch.float8_e4m3fn).to(torch.bfloat16), scale

    (q, scale), (w, own) = rows(x), rows(weight)
    return ((q @ w.t()).float() * scale * own.t()).to(x.dtype)


class _Rounding(nn.Module):
    """A frozen linear layer whose product has fp8 factors."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] in bf16 for x [..., in]."""
        weight = weight_of(self.layer).to(torch.bfloat16)
        with torch.autocast(x.device.type, enabled=False):
            made = _Fp8Product.apply(x.to(torch.bfloat16), weight)
        return made if self.layer.bias is None else made + self.layer.bias.to(made.dtype)


@contextmanager
def with_fp8_factors(model: Any) -> Iterator[None]:
    """Let frozen linear layers under an adapter multiply fp8 factors, in bf16 otherwise, as long as the context lasts.

    Each product by itself, by torch alone. The loss head is left as it is.
    """
    places = [
        (module, "base_layer", module.base_layer)
        for module in model.modules()
        if isinstance(getattr(module, "base_layer", None), nn.Linear)
    ]
    for module, name, layer in places:
        setattr(module, name, _Rounding(layer))
    try:
        yield
    finally:
        for module, name, layer in places:
            setattr(module, name, layer)
