"""LoRA linears in plain torch, differentiable by autograd and traceable with proxies."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastft.kernels.nf4 import nf4_dequantize


def lora_linears(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    a: list[Tensor],
    b: list[Tensor],
    scales: list[float],
    quant_states: list[list[Tensor]] | None = None,
    out_features: list[int] | None = None,
) -> list[Tensor]:
    """Return `x W_i^T + bias_i + s_i (x A_i^T) B_i^T` for every i; see `fastft.kernels.lora.op.lora_linears`."""
    dtype = x.dtype
    a = [matrix.to(dtype) for matrix in a]
    ranks = [matrix.shape[0] for matrix in a]
    xa = torch.split(F.linear(x, torch.cat(a)), ranks, -1) if len(a) > 1 else [F.linear(x, a[0])]
    outputs = []
    for i, weight in enumerate(weights):
        state = quant_states[i] if quant_states is not None else []
        if state:
            absmax, code2, absmax2, offset = state if len(state) == 4 else (state[0], None, None, None)
            rows = out_features[i] if out_features is not None else b[i].shape[0]
            weight = nf4_dequantize(weight, absmax, code2, absmax2, offset, rows, a[i].shape[1], dtype)
        bias = None if biases[i] is None else biases[i].to(dtype)
        base = F.linear(x, weight.to(dtype), bias)
        outputs.append(torch.add(base, F.linear(xa[i], b[i].to(dtype)), alpha=scales[i]))
    return outputs
