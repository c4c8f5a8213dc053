"""The model widened to fp32: what its arms would compute if nothing were rounded on the way."""

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
