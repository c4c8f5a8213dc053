import pytest
import torch

from fastft.kernels.glu import glu
from fastft.kernels.layer_norm import layer_norm
from fastft.kernels.rms_norm import rms_norm
from fastft.kernels.rope import rope


def _attention_inputs(x, q_weight, k_weight, head_weight, up, cos, sin):
    """All four ops with the strides they meet in a model: transposed heads, halves of a packed projection."""
    batch, tokens, _ = x.shape
    x = rms_norm(x, q_weight, 1e-6, 0.0, "before_weight")
    q = rms_norm(x.view(batch, tokens, 4, 16).transpose(1, 2), k_weight, 1e-6, 1.0, "after_weight")
    k = layer_norm(x.view(batch, tokens, 4, 16), head_weight, None, 1e-5).transpose(1, 2)
    q, k = rope(q, k, cos, sin, "half")
    mixed = (q * k).transpose(1, 2).reshape(batch, tokens, 64)
    return glu(*(mixed @ up).chunk(2, dim=-1), "gelu_tanh")


@pytest.mark.inductor
def test_strides_agree_under_inductor(strided, device):
    shapes = [(2, 7, 64), (64,), (16,), (4, 16), (64, 96), (1, 7, 8), (1, 7, 8)]
    args = [strided(shape, "contiguous", torch.float32, device, seed=seed) for seed, shape in enumerate(shapes)]
    trained = [arg.requires_grad_() for arg in args[:5]]
    results = []
    for fn in (_attention_inputs, torch.compile(_attention_inputs, fullgraph=True)):
        out = fn(*args)
        results.append((out, *torch.autograd.grad(out.square().sum(), trained)))
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
