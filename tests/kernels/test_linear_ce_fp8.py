"""The loss head with fp8 factors: loss and gradient against fp64, for flat, spread and confident rows."""

import importlib.util
from pathlib import Path

import pytest
import torch

from fastft.environment import triton_interpreted
from fastft.errors import UsageError
from fastft.kernels import fp8, linear_ce
from fastft.kernels.fp8 import ref

_spec = importlib.util.spec_from_file_location("matrix_judge", Path(__file__).parent / "matrix_judge.py")
judge = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(judge)
DEVICE = judge.DEVICE
KERNEL = DEVICE == "cuda" or triton_interpreted()
DTYPES = [torch.bfloat16] if DEVICE == "cuda" else [torch.float32, torch.bfloat16]
VOCAB, WIDTH = 133, 64
SLACK = 8.0 if triton_interpreted() else 1.0
"""Triton's interpreter drops the carry of a rounding to a power of two, and halves 3 % of the values."""


def make(size=1.0, aligned=0.0, rows=40, dtype=DTYPES[0], masked=(3, 17)):
    """Return (hidden, weight, labels): logits of standard deviation `size`, the label's higher by `aligned`."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCAB, WIDTH, generator=g) * WIDTH**-0.5
    labels = torch.randint(0, VOCAB, (rows,), generator=g)
    hidden = torch.randn(rows, WIDTH, generator=g) * size + aligned * weight[labels]
    labels[list(masked)] = -100
    return hidden.to(DEVICE, dtype).requires_grad_(), weight.to(DEVICE, dtype), labels.to(DEVICE)


def run(function, hidden, weight, labels, **settings):
    loss = function(hidden, weight, labels, **settings)
    return loss, *torch.autograd.grad(loss, hidden)


def truth(hidden, weight, labels, **settings):
    wide = hidden.detach().double().requires_grad_()
    settings = {
        name: None if value is None else value.double() for name, value in settings.items() if name == "bias"
    } | {name: value for name, value in settings.items() if name not in ("bias", "chunk_rows")}
    return run(linear_ce.ref.linear_cross_entropy, wide, weight.double(), labels, **settings)


# (size of the logits, how far the label's is above, most that the loss and the gradient may be off)
ROWS = {
    "equal": (0.0, 0.0, 1e-6, 0.004),
    "flat": (1e-3, 0.0, 1e-5, 0.004),
    "spread": (1.0, 0.0, 2e-3, 0.012),
    "likely": (1.0, 6.0, 2e-3, 0.025),
    "confident": (1.0, 14.0, 5e-4, 0.05),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ROWS.values(), ids=ROWS)
def test_flat_and_confident_rows(case, dtype, poisoned_empty):
    size, aligned, most_loss, most_gradient = case
    inputs = make(size, aligned, dtype=dtype)
    exact = truth(*inputs)
    same = run(linear_ce.linear_cross_entropy, *inputs)
    got = run(linear_ce.linear_cross_entropy, *inputs, fp8=True, chunk_rows=16)
    budget = [judge.rms_ratio(value, want) for value, want in zip(same, exact)]
    assert got[0].dtype == torch.float32 and got[1].dtype == dtype
    assert abs(got[0].double() - exact[0]) < SLACK * most_loss + abs(same[0].double() - exact[0])
    assert judge.rms_ratio(got[1], exact[1]) < SLACK * most_gradient + 1.5 * budget[1]
    assert (got[1][[3, 17]] == 0).all()
    if size or aligned:
        assert not torch.equal(got[1], same[1])  # the products did have fp8 factors


def test_the_label_is_kept_out_of_the_rounding():
    """Its share is most of the gradient: fp8 values of it would be most of the error."""
    hidden, weight, labels = make(1.0, 4.0, masked=())
    exact = truth(hidden, weight, labels)[1]
    got = run(linear_ce.linear_cross_entropy, hidden, weight, labels, fp8=True)[1]
    by_rows = ref.weight_rows(weight, [], VOCAB, WIDTH)
    logits = ref.product(*ref.quantize_rows([hidden.detach()]), *by_rows, torch.float64)
    slope = logits.softmax(1) - torch.nn.functional.one_hot(labels, VOCAB)
    turned = ref.weight_rows(weight.t().contiguous(), [], WIDTH, VOCAB)
    plain = ref.product(*ref.quantize_rows([(slope / len(labels)).float()]), *turned, torch.float64)
    assert judge.rms_ratio(got, exact) < 0.5 * judge.rms_ratio(plain, exact)


SETTINGS = {
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 3.0},
    "smoothing": {"label_smoothing": 0.2},
    "all": {"scale": 0.5, "softcap": 2.0, "label_smoothing": 0.1, "num_items": 7},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_settings_of_a_head(settings, bias):
    inputs = make(2.0, 1.0)
    offset = torch.linspace(-1, 1, VOCAB).to(DEVICE, DTYPES[0]) if bias else None
    got = run(linear_ce.linear_cross_entropy, *inputs, bias=offset, fp8=True, **settings)
    exact = truth(*inputs, bias=offset, **settings)
    assert abs(got[0].double() / exact[0] - 1) < SLACK * 6e-3
    assert judge.rms_ratio(got[1], exact[1]) < SLACK * 0.04


def test_chunks_change_nothing():
    inputs = make(1.0, 2.0)
    want = run(linear_ce.linear_cross_entropy, *inputs, fp8=True)
    for chunk in (1, 7):
        for value, same in zip(run(linear_ce.linear_cross_entropy, *inputs, fp8=True, chunk_rows=chunk), want):
            assert judge.rms_ratio(value, same) < 4 * 2.0**-8 if DTYPES[0] == torch.bfloat16 else 4 * 2.0**-23


def test_one_scale_for_a_whole_weight(poisoned_empty):
    weight = make()[1]
    rows, columns, scale = fp8.quantize_whole(weight, 144)
    assert torch.equal(scale, (weight.float().abs().max() * (1 / 448)).reshape(1))
    want = ref.to_fp8(weight.float() * scale.reciprocal()).view(torch.uint8)
    if not triton_interpreted():  # which drops the carry of a rounding to a power of two
        assert torch.equal(rows.view(torch.uint8)[:VOCAB], want)
    assert (rows.float()[VOCAB:] == 0).all() and torch.equal(columns.float(), rows.float().t())
    assert ((rows.float()[:VOCAB] * scale - weight.float()).norm() / weight.float().norm()) < SLACK * 0.04


def test_what_is_not_finite_shows():
    hidden, weight, labels = make()
    hidden = hidden.detach().clone()
    hidden[5, 1] = float("nan")
    loss, grad = run(linear_ce.linear_cross_entropy, hidden.requires_grad_(), weight, labels, fp8=True)
    assert loss.isnan() and grad[5].isnan().any() and grad[6:].isfinite().all()


def test_certain_labels_under_a_large_factor():
    """The others' gradients are all zero then, and so is what is left of the label's: none of it is NaN."""
    inputs = make(1e-3, 400.0, masked=())
    loss, grad = run(linear_ce.linear_cross_entropy, *inputs, fp8=True, num_items=1, scale=64.0)
    assert loss.abs() < 1e-3 and grad.isfinite().all() and grad.abs().max() < 1e-3


def test_without_gradient_mode():
    inputs = make()
    want = linear_ce.linear_cross_entropy(*inputs, fp8=True)
    with torch.no_grad():
        assert torch.equal(linear_ce.linear_cross_entropy(*inputs, fp8=True), want)


def test_what_it_refuses():
    hidden, weight, labels = make()
    trained = weight.clone().requires_grad_()
    with pytest.raises(UsageError, match="fp8: expected False here: its weight is trained, got True"):
        linear_ce.linear_cross_entropy(hidden, trained, labels, fp8=True)
    assert "fp8 products give bfloat16" in linear_ce.fp8_obstacle(hidden.half(), weight, None)
    assert "need multiples of 16" in linear_ce.fp8_obstacle(hidden[:, :60], weight[:, :60], None)
    assert linear_ce.fp8_obstacle(hidden, weight, None) == ""


def test_factors_that_were_kept_give_the_same_bits():
    inputs = make()
    factors = linear_ce.fp8_factors(inputs[1])
    want, got = (
        run(linear_ce.linear_cross_entropy, *inputs, fp8=True, **given) for given in ({}, {"factors": factors})
    )
    assert torch.equal(want[0], got[0]) and torch.equal(want[1], got[1])
    exact = run(linear_ce.linear_cross_entropy, *inputs, factors=factors)  # of no use without fp8
    assert torch.equal(exact[1], run(linear_ce.linear_cross_entropy, *inputs)[1])


@pytest.mark.parametrize("kept", [False, True])
def test_opcheck(kept):
    hidden, weight, labels = make(rows=9, masked=(2,))
    settings = (0.5, 3.0, 0.1, -100, -1, 4, True, True, False, False)
    rows, columns, scale = linear_ce.fp8_factors(weight)
    factors = [rows.view(torch.uint8), columns.view(torch.uint8), scale] if kept else []  # it compares no fp8 on a CPU
    torch.library.opcheck(
        torch.ops.fastft.linear_cross_entropy, (hidden, weight, labels, None, None, factors, *settings)
    )


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("vocab", [128256, 151937])
def test_large_vocabularies_on_a_gpu(vocab):
    g = torch.Generator("cuda").manual_seed(0)
    weight = (torch.randn(vocab, 256, device="cuda", generator=g) / 16).bfloat16()
    labels = torch.randint(0, vocab, (515,), device="cuda", generator=g)
    for aligned in (0.0, 12.0):
        hidden = torch.randn(515, 256, device="cuda", generator=g) + aligned * weight[labels].float()
        inputs = hidden.bfloat16().requires_grad_(), weight, labels
        exact, got = truth(*inputs), run(linear_ce.linear_cross_entropy, *inputs, fp8=True)
        assert abs(got[0].double() - exact[0]) < 5e-3
        assert judge.rms_ratio(got[1], exact[1]) < 0.03
