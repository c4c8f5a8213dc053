"""`verify` tells a right model from a wrong one, and leaves it as it was. The layers are compiled with aot_eager."""

import pytest
import torch

from fastft.data.collate import collate
from fastft.errors import DataError
from fastft.train import step
from fastft.train.verify import verify


def test_compiled_model_agrees_and_is_left_alone(build_model, build_rows):
    from fastft.graph.compile import compile

    model = compile(build_model(dropout=0.1), backend="aot_eager")
    batches = [collate(build_rows(3, seed=seed), packed=packed) for seed, packed in [(1, False), (2, True), (3, False)]]
    parameter = next(p for p in model.parameters() if p.requires_grad)
    parameter.grad = torch.ones_like(parameter)
    model.eval()
    state, before = torch.get_rng_state(), {n: p.detach().clone() for n, p in model.named_parameters()}
    found = verify(model, iter(batches), steps=2)
    assert found.ok and found.compiled and found.head == "fused" and len(found.comparisons) == 2, str(found)
    assert found.comparisons[0].grad_norm > 0 and found.largest_loss_difference < 1e-5
    assert "agrees" in str(found)
    assert torch.equal(torch.get_rng_state(), state) and not model.training
    assert torch.equal(parameter.grad, torch.ones_like(parameter))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_wrong_loss_is_found(factor, build_model, build_rows, monkeypatch):
    own = step.loss
    monkeypatch.setattr(step, "loss", lambda model, batch: own(model, batch) * factor)
    found = verify(build_model(), [collate(build_rows(3))])
    assert not found.ok and "DIFFERS" in str(found)
    if factor == factor:
        assert found.mean_loss_residual == pytest.approx(1e-3, rel=1e-2)  # signed: the bias shows


def test_no_batches(build_model):
    with pytest.raises(DataError, match="at least one batch"):
        verify(build_model(), [])
