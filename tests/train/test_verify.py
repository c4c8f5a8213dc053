"""`verify` tells a right model from a wrong one, and leaves it as it was. The layers are compiled with aot_eager."""

import math

import pytest
import torch

from fastft.data.collate import collate
from fastft.errors import DataError, UsageError
from fastft.train import step
from fastft.train.verify import Comparison, _report, verify


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
    assert "agrees with transformers" in str(found) and found.budgets == (0.0, 0.0, 0.0, 0.0)
    assert torch.equal(torch.get_rng_state(), state) and not model.training
    assert torch.equal(parameter.grad, torch.ones_like(parameter))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_wrong_loss_is_found(factor, build_model, build_rows, monkeypatch):
    own = step.loss
    monkeypatch.setattr(step, "loss", lambda model, batch: own(model, batch) * factor)
    found = verify(build_model(), [collate(build_rows(3))])
    assert not found.ok and "DIFFERS from transformers" in str(found)
    if factor == factor:
        assert found.mean_loss_residual == pytest.approx(1e-3, rel=1e-2)  # signed: the bias shows


def test_what_rounding_allows_of_a_mean_is_that_of_independent_errors(build_model):
    """Of four batches of one budget half of it, whatever the signs; NaN is a failure."""
    model = build_model()

    def found(loss=(0.0,) * 4, norm=(0.0,) * 4, budgets=(0.0, 0.0)):
        pairs = [Comparison(1 + a, 1.0, 2 * (1 + b), 2.0, *budgets) for a, b in zip(loss, norm, strict=True)]
        return _report(model, tuple(pairs))

    allowed = (1e-3, 4e-2)  # of losses and gradient norms: of their means 5e-4 and 2e-2
    assert found(budgets=allowed).budgets == pytest.approx((*allowed, 5e-4, 2e-2))
    unequal = [Comparison(1.0, 1.0, 1.0, 1.0, loss, 2 * loss) for loss in (3e-3, 4e-3)]
    assert _report(model, tuple(unequal)).budgets == pytest.approx((4e-3, 8e-3, 2.5e-3, 5e-3))
    for part, (within, beyond) in {"loss": (4.9e-4, 5.1e-4), "norm": (1.9e-2, 2.1e-2)}.items():
        for sign in (1, -1):
            assert found(**{part: (sign * within,) * 4}, budgets=allowed).ok
            assert not found(**{part: (sign * beyond,) * 4}, budgets=allowed).ok
        # noise: as far off, and no bias
        assert found(**{part: (beyond, -beyond) * 2}, budgets=allowed).ok
        assert not found(**{part: (0.0, 0.0, 0.0, math.nan)}, budgets=allowed).ok
    # without budgets: the thresholds of fp32, 1e-5 of losses and 1e-4 of norms, half of it of their mean
    for part, mean in (("loss", 1e-5), ("norm", 5e-5)):
        assert found(**{part: (0.98 * mean,) * 4}).ok and not found(**{part: (1.02 * mean,) * 4}).ok
    assert found(norm=(9e-5, -9e-5) * 2).ok and not found(norm=(1.1e-4, -1.1e-4) * 2).ok
    assert not found(loss=(1.1e-5, -1.1e-5) * 2).ok


def test_no_batches(build_model):
    with pytest.raises(DataError, match="at least one batch"):
        verify(build_model(), [])


@pytest.fixture
def learnt(build_model, build_rows):
    """A model in bf16 that knows two batches by heart, with the adapter to be trained, and the batches."""
    from fastft.graph.compile import compile

    model = build_model(seed=1).requires_grad_(True)
    batches = [collate(build_rows(4, seed=seed)) for seed in (1, 2)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, parameter in model.bfloat16().named_parameters():
        parameter.requires_grad_("lora" in name)
    return compile(model, backend="aot_eager"), batches


def test_near_a_loss_of_zero_what_rounding_does_to_transformers_itself_is_allowed(learnt, monkeypatch):
    model, batches = learnt
    found = verify(model, batches)
    assert max(pair.reference_loss for pair in found.comparisons) < 0.003
    assert found.largest_grad_norm_difference > found.thresholds[1]  # that alone would be called a difference
    assert found.ok and " by rounding here" in str(found), str(found)
    assert 0.01 < found.budgets[0] < 0.05
    own = step.loss
    monkeypatch.setattr(step, "loss", lambda model, batch: own(model, batch) * 1.1)
    wrong = verify(model, batches)
    assert not wrong.ok and wrong.budgets == found.budgets  # the same numbers are drawn


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        ({"input_ids": [1, 2], "labels": [1, 2]}, "input_ids and labels as a tensor of [rows, tokens]"),
        ({"prompt": "w1", "completion": "w2"}, "got {'prompt': 'str', 'completion': 'str'}"),
        ({"input_ids": torch.ones(1, 2, dtype=torch.long)}, "expected labels as a tensor"),
        ([1, 2], "expected a mapping with the tensors input_ids and labels, got 'list'"),
    ],
)
def test_rows_are_no_batches(batch, text, build_model):
    with pytest.raises(UsageError, match=r"verify batches\[0\]: ") as caught:
        verify(build_model(), [batch])
    assert text in str(caught.value) and "fastft.data.collate.collate([rows[0], rows[1]])" in str(caught.value)


def test_what_rounding_allows_is_of_the_size_of_the_error_of_bf16(learnt):
    model, batches = learnt
    budgets = [(pair.loss_budget, pair.grad_norm_budget) for pair in verify(model, batches).comparisons]
    narrow = [_reference_of(model, batch) for batch in batches]
    model.float()
    exact = [_reference_of(model, batch) for batch in batches]
    for part in (0, 1):
        errors = [abs(a[part] - b[part]) / b[part] for a, b in zip(narrow, exact, strict=True)]
        allowed = [budget[part] for budget in budgets]
        assert all(error <= limit for error, limit in zip(errors, allowed, strict=True))
        assert max(allowed) < 10 * max(errors), (allowed, errors)  # three deviations, of few samples


def _reference_of(model, batch):
    from fastft.graph.compile import uncompiled

    model.zero_grad()
    with uncompiled(model):
        loss = model(**batch).loss
        loss.backward()
    gradients = [p.grad.float().norm() for p in model.parameters() if p.grad is not None]
    return loss.item(), torch.stack(gradients).norm().item()
