"""A gated feed-forward of three LoRA linears in plain torch, traceable with proxies: the oracle of the fused ops."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastft.kernels.glu import ref as glu_ref
from fastft.kernels.nf4 import nf4_dequantize


def feed_forward(
    x: Tensor,
    weights: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    scales: list[float],
    quant_states: list[list[Tensor]],
    activation: str,
) -> Tensor:
    """Return down(activation(gate(x)) * up(x)) of LoRA linears; see `fastft.kernels.lora_glu.op.feed_forward`."""

    def linear(value: Tensor, i: int, out: int, into: int) -> Tensor:
        weight, state = weights[i], quant_states[i]
        if state:
            absmax, code2, absmax2, offset = state if len(state) == 4 else (state[0], None, None, None)
            weight = nf4_dequantize(weight, absmax, code2, absmax2, offset, out, into, value.dtype)
        low = F.linear(F.linear(value, a[i].to(value.dtype)), b[i].to(value.dtype))
        return torch.add(F.linear(value, weight.to(value.dtype)), low, alpha=scales[i])

    narrow, wide = a[0].shape[1], a[-1].shape[1]
    if len(weights) == 2:
        gate, up = linear(x, 0, 2 * wide, narrow).chunk(2, dim=-1)
    else:
        gate, up = linear(x, 0, wide, narrow), linear(x, 1, wide, narrow)
    return linear(glu_ref.glu(gate, up, activation), len(weights) - 1, narrow, wide)
