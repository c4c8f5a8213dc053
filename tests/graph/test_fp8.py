"""Layers and loss head with fp8 factors, end to end: what they cost in numbers, what is refused, and what is told."""

import pytest
import torch
from tiny import batch, flat, make, relative, with_lora

import fastft
from fastft.errors import UsageError
from fastft.graph.compile import uncompiled
from fastft.graph.twin import tiny_model
from fastft.kernels import fp8
from fastft.train import step

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


def run(model, inputs):
    """Return loss and gradients of one step through fastft's own loss head, in fp64."""
    model.zero_grad()
    loss = step.loss(model, inputs)
    loss.backward()
    return loss.detach().double(), {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


def compiled(compute, lora=True, **changes):
    model = make("llama", torch.float32, lora, **{**SIZES, **changes})
    return fastft.compile(model, backend="eager", compute=compute)


@pytest.fixture(scope="module")
def exact():
    return run(compiled("exact"), batch(0))


@pytest.mark.parametrize(("compute", "least"), [("fp8", 5e-3), ("fp8+head", 5e-3)])
def test_a_step_is_near_the_exact_one(compute, least, exact):
    model = compiled(compute)
    loss, gradients = run(model, batch(0))
    assert abs(loss - exact[0]) < 0.01 * exact[0]
    assert least < relative(flat(exact[1]), flat(gradients)) < 0.2  # it is not exact, and not far off
    report = fastft.report(model)
    assert report.compute == compute and f"compute: {compute} (not exact) in 14 linears" in str(report)
    assert len(report.in_fp8()) == 14 and report.not_in_fp8() == ()
    assert ("with fp8 factors" in report.head) is (compute == "fp8+head")
    with uncompiled(model):
        plain, same = run(model, batch(0))
    assert abs(plain - exact[0]) < 1e-6 and relative(flat(exact[1]), flat(same)) < 1e-5


def test_the_head_alone_makes_a_difference(exact):
    inputs, (layers, head) = batch(0), (compiled("fp8"), compiled("fp8+head"))
    losses = [run(model, inputs)[0] for model in (layers, head)]
    assert losses[0] != losses[1] and abs(losses[0] - losses[1]) < 0.01 * exact[0]
    for model in (layers, head):  # without gradients nothing has fp8 factors
        with torch.no_grad():
            assert abs(step.loss(model, inputs) - exact[0]) < 1e-6


def test_a_trained_head_stays_exact_and_says_so(exact):
    model = compiled("fp8+head")
    model.get_base_model().lm_head.weight.requires_grad_()
    run(model, batch(0))
    run(model, batch(1))
    notes = fastft.report(model).notes
    assert notes == ("the loss head is not in fp8: its weight is trained",)
    assert "factors" not in fastft.report(model).head


def test_another_loss_stays_exact_and_says_so():
    model = compiled("fp8+head")
    step.loss(model, batch(0), loss_type="dft").backward()
    assert "loss head is not in fp8: loss_type='dft' needs each loss" in str(fastft.report(model))


def test_sizes_that_have_no_fp8_product_stay_exact():
    changes = {"hidden_size": 72, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    want = run(compiled("exact", **changes), batch(0))
    model = compiled("fp8+head", **changes)
    got = run(model, batch(0))
    assert abs(got[0] - want[0]) < 1e-6 and relative(flat(want[1]), flat(got[1])) < 1e-5
    report = fastft.report(model)
    assert report.in_fp8() == () and len(report.not_in_fp8()) == 14
    assert all("fp8 products need multiples of 16" in r.not_fp8 for r in report.not_in_fp8())
    assert "the loss head is not in fp8: its weight is 16 x 72; fp8 products need multiples of 16" in report.notes


@pytest.mark.parametrize(
    ("hidden", "why"), [(72, "fp8 products need multiples of 16"), (64, "only the fused operation")]
)
def test_plain_code_stays_exact_and_says_the_same_of_every_linear(hidden, why):
    changes = {**SIZES, "hidden_size": hidden, "num_hidden_layers": 1}
    plain = {"lora": "torch", "feed_forward": "torch"}
    model = make("llama", torch.float32, True, **changes)
    model = fastft.compile(model, backend="eager", compute="fp8", implementations=plain)
    run(model, batch(0))
    report = fastft.report(model)
    assert report.in_fp8() == () and len(report.not_in_fp8()) == 7
    assert all(why in r.not_fp8 for r in report.not_in_fp8())


def test_linears_without_an_adapter_are_told():
    base = tiny_model("llama", dtype=torch.float32, **SIZES)
    base.set_attn_implementation("eager")
    model = fastft.compile(
        with_lora(base, torch.float32, target_modules=["q_proj", "o_proj"]).train(), backend="aot_eager", compute="fp8"
    )
    run(model, batch(0))
    left = {r.module.rpartition(".")[2]: r.not_fp8 for r in fastft.report(model).not_in_fp8()}
    assert set(left) == {"k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(left.values()) == {"it has no LoRA adapter, and runs as it was"}
    assert {name.rpartition(".")[2] for name in fastft.report(model).in_fp8()} == {"q_proj", "o_proj"}


def test_full_fine_tuning_stays_exact_and_says_so():
    want = run(compiled("exact", lora=False), batch(0))
    model = compiled("fp8+head", lora=False)
    got = run(model, batch(0))
    assert relative(flat(want[1]), flat(got[1])) < 1e-6
    assert fastft.report(model).in_fp8() == () and len(fastft.report(model).not_in_fp8()) == 7


def test_what_is_refused(monkeypatch):
    model = make("llama", torch.float32, True)
    with pytest.raises(UsageError, match=r"compute: expected one of .*'fp8\+head'.*, got 'fp8-head'.*did you mean"):
        fastft.compile(model, compute="fp8-head")
    monkeypatch.setattr(fp8, "device_obstacle", lambda device: "Old GPU has compute capability 8.0")
    with pytest.raises(UsageError, match=r"compute: expected 'exact' here: Old GPU has .* 8\.0, got 'fp8\+head'"):
        fastft.compile(model, compute="fp8+head")
