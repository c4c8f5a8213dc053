"""Memory plans and dropout: what is computed again for the backward pass sees the mask of the forward pass."""

import pytest
import torch

import fastft
from fastft.graph.twin import tiny_model


@pytest.mark.parametrize("plan", ["keep", "min"])
def test_gradient_with_dropout_is_that_of_the_loss(plan):
    """The slope of the loss along the gradient, with the same random numbers, is the gradient's norm."""
    model = fastft.add_lora(tiny_model("llama", dtype=torch.float64), dropout=0.3, init=False).double()
    fastft.compile(model.train(), plan=plan, backend="aot_eager")
    ids = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(0))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def loss():
        torch.manual_seed(7)
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    loss().backward()
    norm = torch.stack([parameter.grad.norm() for parameter in trained]).norm()
    step, values = 2e-3 / norm, []
    for sign in (1, -2):  # to +step, then from there to -step
        with torch.no_grad():
            for parameter in trained:
                parameter.add_(parameter.grad, alpha=(sign * step).item())
        values.append(loss().item())
    slope = (values[0] - values[1]) / 4e-3
    assert slope == pytest.approx(norm.item(), rel=2e-3)
