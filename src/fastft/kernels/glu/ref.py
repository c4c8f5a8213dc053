"""The gated activation in plain torch: the oracle, and what a graph gets where no opaque kernel is wanted.

`glu` uses only torch functions and operators, so that it can be emitted into an FX graph as `call_function` nodes.
Shazeer, "GLU Variants Improve Transformer", 2020; Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


def _activate(gate: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(gate)
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")


def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return activation(gate) * up, the activation's result being rounded to gate's dtype first.

    gate and up have one shape [..., N]; activation is "silu", "gelu_tanh" or "gelu" (with erf).
    """
    return _activate(gate, activation) * up


def glu_backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return (dgate, dup) in the dtypes of gate and up.

    dgate = dy * up * activation'(gate), dup = dy * activation(gate).
    """
    dactivated = (dy * up).to(gate.dtype)
    if activation == "silu":
        dgate = torch.ops.aten.silu_backward(dactivated, gate)
    else:
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        dgate = torch.ops.aten.gelu_backward(dactivated, gate, approximate=approximate)
    return dgate, (dy * _activate(gate, activation)).to(up.dtype)
