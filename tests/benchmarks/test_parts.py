"""What the comparison rests on: equal weights in every arm, a right reference, a sketch that measures, the fit."""

import contextlib
import math
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from benchmarks import measure, parity, truth
from benchmarks.arms import reference
from benchmarks.batches import batch_of
from benchmarks.cells import Cell, Task, default_cells
from benchmarks.fit import memory_fits
from benchmarks.measure import gradient_norm, gradient_sketch
from benchmarks.shapes import SHAPES
from benchmarks.truth import weight_of, widen
from benchmarks.weights import build, save, transformer

TINY = Cell("tiny", "nf4", 2, 32)
PARAMETERS = {  # billions, embeddings counted once where they are tied: those of the published models
    "llama-1b": 1.236, "llama-3b": 3.213, "llama-8b": 8.030, "qwen3-8b": 8.191, "gemma3-4b": 3.880,
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_shapes_are_those_of_the_models(name):
    config = getattr(transformers, SHAPES[name].config_class)(**SHAPES[name].fields)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(PARAMETERS[name], abs=5e-4)


@pytest.mark.parametrize("shape", ["tiny", "tiny-gemma3"])
def test_a_model_built_is_the_model_loaded(shape, tmp_path):
    """Weights, buffers and quantisation of the arms that build, and of those that load from a folder, bit for bit."""
    cell = Cell(shape, "nf4", 1, 8, head_scale=3.0)
    save(cell, "cpu", tmp_path)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, dtype=torch.bfloat16
    )
    built = transformer(cell, "cpu", quantised=True)
    theirs, ours = dict(loaded.named_parameters()), dict(built.named_parameters())
    assert theirs.keys() == ours.keys()
    for name, parameter in ours.items():
        assert torch.equal(parameter, theirs[name]), name
        assert getattr(parameter, "quant_state", None) == getattr(theirs[name], "quant_state", None) or torch.equal(
            parameter.quant_state.absmax, theirs[name].quant_state.absmax
        )
    for (name, buffer), (_, other) in zip(built.named_buffers(), loaded.named_buffers(), strict=True):
        assert torch.equal(buffer, other), name
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).pad_token_id == 3


def test_weights_depend_on_their_names_alone_and_the_head_is_scaled():
    one, two = transformer(TINY, "cpu", False), transformer(Cell("tiny", "bf16", 1, 8, layers=1), "cpu", False)
    assert torch.equal(one.model.layers[0].mlp.up_proj.weight, two.model.layers[0].mlp.up_proj.weight)
    assert not torch.equal(one.model.layers[0].mlp.up_proj.weight, one.model.layers[1].mlp.up_proj.weight)
    peaked = transformer(Cell("tiny", "bf16", 1, 8, head_scale=8.0), "cpu", False)
    assert peaked.lm_head.weight.float().std().item() == pytest.approx(8 * 0.02, rel=0.02)
    assert torch.equal(peaked.model.embed_tokens.weight, one.model.embed_tokens.weight)


@pytest.mark.parametrize("shape", ["tiny", "tiny-gemma3"])
def test_reference_is_eager_attention_row_by_row(shape, monkeypatch):
    """In fp32, with padding, several blocks of queries and a window: loss and every gradient of transformers' eager."""
    monkeypatch.setattr(reference, "QUERIES", 20)
    cell = Cell(shape, "full", 3, 48, padding=0.6, completion=0.7)
    batch = batch_of(cell, 0, "cpu")
    model = build(cell, "cpu").float()
    model.set_attn_implementation("eager")
    truth = model(**batch, use_cache=False).loss
    truth.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    reference.AttentionInterface.register(reference.NAME, reference.attention)
    model.set_attn_implementation(reference.NAME)
    loss = reference.by_rows(model, batch)
    assert loss.item() == pytest.approx(truth.item(), rel=2e-6)
    for name, parameter in model.named_parameters():
        assert (parameter.grad - wanted[name]).norm() <= 2e-5 * wanted[name].norm(), name


@pytest.mark.parametrize(
    "shape, mode", [("tiny", "nf4"), ("tiny", "bf16"), ("tiny-gemma3", "nf4"), ("tiny-gemma3", "full")]
)
def test_the_truth_is_the_model_in_fp32(shape, mode):
    """Loss and every gradient of a plain fp32 model that has the values of this one, 4-bit weights as they multiply."""
    cell = Cell(shape, mode, 2, 40, completion=0.7)
    batch = batch_of(cell, 0, "cpu")
    trainee = reference.prepare(Task("reference", cell), (), "cpu")
    values = {  # the other modes' own model, filled with what this one computes with
        name.replace(".base_layer", "").removeprefix("base_model.model."): weight_of(module).detach().clone()
        for name, module in trainee.model.named_modules()
        if isinstance(module, nn.Linear)
    }
    plain = build(Cell(shape, "full" if mode == "full" else "bf16", 2, 40), "cpu")
    with torch.no_grad():
        for name, module in plain.named_modules():
            if isinstance(module, nn.Linear):
                place = name.replace(".base_layer", "").removeprefix("base_model.model.")
                module.weight.copy_(values[place])
    scales = {name: buffer.bfloat16() for name, buffer in plain.named_buffers() if name.endswith("embed_scale")}
    plain.float()
    (plain if mode == "full" else plain.get_base_model()).set_attn_implementation("eager")
    for name, buffer in plain.named_buffers():
        if name in scales:
            buffer.copy_(scales[name])
    wanted = plain(**batch, use_cache=False).loss
    wanted.backward()
    widen(trainee.model)
    assert trainee.loss(batch).item() == pytest.approx(wanted.item(), rel=2e-6)
    wanted = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in trainee.model.named_parameters() if p.requires_grad}
    assert wanted.keys() == found.keys()
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert (gradient - wanted[name]).norm() <= 2e-5 * wanted[name].norm(), name


def test_reference_refuses_what_it_does_not_compute():
    q = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match="soft cap"):
        reference.attention(nn.Identity(), q, q, q, None, softcap=30.0)


@pytest.mark.parametrize("difference", [1e-3, 3e-2, 0.5])
def test_a_sketch_measures_the_relative_difference(difference):
    """Of a hundred thousand gradients, whatever the wrapping of their names."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"model": nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(300, 300), nn.Linear(300, 40)])})}
    )
    gradients = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    noise = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
    size = math.sqrt(sum(g.square().sum().item() for g in noise.values()))

    def sketch(root, scale):
        for (_, parameter), name in zip(root.named_parameters(), gradients, strict=True):
            parameter.grad = gradients[name] + noise[name] * (scale * norm / size)
        return gradient_sketch(root)

    exact = sketch(model, 0.0)
    assert gradient_norm(model) == pytest.approx(norm, rel=1e-6)
    wrapped = nn.ModuleDict({"base_model": model})
    assert parity._distance(sketch(wrapped, difference), exact) == pytest.approx(difference, rel=0.1)


RIGHT = {"status": "ok", "loss0": 8.0, "grad_norm0": 5.0, "sketch": [3.0, 4.0], **dict.fromkeys(parity.SPEEDS, 1.0)}
EAGER = {"loss0": 8.001, "grad_norm0": 5.01, "sketch": [3.08, 3.94]}  # 0.1 off by 5
REFERENCE = {"status": "ok", "loss0": 8.0, "grad_norm0": 5.0, "sketch": [3.0, 4.0], "eager": EAGER}


@pytest.mark.parametrize(
    "change",
    [
        {"loss0": 8.01}, {"grad_norm0": 5.06}, {"sketch": [4.0, 3.0]}, {"sketch": [2.88, 4.09]}, {"loss0": math.nan},
        {"sketch": [3.0, math.nan]}, {"sketch": [3.0]},
    ],
    ids=str,
)  # fmt: skip
def test_gate(change):
    kept = parity.judged({**RIGHT, "sketch": [2.904, 4.072]}, REFERENCE)  # 1.2 times eager's error, the other way
    assert kept["parity"]["ok"] and kept["tokens_per_second"] == 1.0 and "sketch" not in kept
    assert kept["parity"]["gradient_error"] == pytest.approx(0.024) and kept["parity"]["loss_difference"] == 0.0
    assert kept["parity"]["eager_gradient_error"] == pytest.approx(0.02)
    assert kept["parity"]["gradient_allowed"] == pytest.approx(0.02501)
    struck = parity.judged({**RIGHT, **change}, REFERENCE)
    assert struck["parity"]["ok"] is False and all(struck[name] is None for name in parity.SPEEDS)
    assert struck["struck_out"] == dict.fromkeys(parity.SPEEDS, 1.0)


CURVE = [8.0, 7.9, 7.8]
FP8 = {**RIGHT, "loss0": 8.01, "grad_norm0": 5.2, "sketch": [3.9, 3.6], "losses": [8.01, 7.905, 7.79]}


@pytest.mark.parametrize(
    "change",
    [
        {"loss0": 8.02}, {"grad_norm0": 5.3}, {"sketch": [4.4, 2.9]}, {"losses": [8.0, 7.9, 7.7]},
        {"losses": [8.0, 7.9, math.nan]}, {"losses": [8.0, 7.9]},
    ],
    ids=str,
)  # fmt: skip
def test_gate_of_an_arm_that_is_not_exact(change):
    """Its gradient may be 0.35 off; with fp8 factors, 1.25 times as far as eager's with such."""
    beside = {**RIGHT, "losses": CURVE}
    assert parity.judged(FP8, REFERENCE)["parity"]["ok"] is False  # as an exact arm it would fail
    kept = parity.judged(FP8, REFERENCE, False, beside)
    assert kept["parity"]["ok"] and kept["tokens_per_second"] == 1.0
    assert kept["parity"]["curve_difference"] == pytest.approx((0.01 / 8 + 0.005 / 7.9 + 0.01 / 7.8) / 3)
    assert kept["parity"]["gradient_allowed"] == 0.35 and "eager_fp8_gradient_error" not in kept["parity"]
    struck = parity.judged({**FP8, **change}, REFERENCE, False, beside)
    assert struck["parity"]["ok"] is False and struck["tokens_per_second"] is None
    alone = parity.judged(FP8, REFERENCE, False, None)["parity"]
    assert alone == {"ok": None, "reason": "not exact, and no exact arm passed before it"}


def test_gate_of_a_gradient_with_fp8_factors():
    """Not 0.35, but what eager's rounding to fp8 does to the gradient here: more, or less."""
    beside, line = {**RIGHT, "losses": CURVE}, {**FP8, "sketch": [0.0, 4.0]}  # 0.6 off
    for rounded, ok in (([0.0, 4.5], True), ([3.0, 1.0], True), ([1.0, 4.0], False)):
        reference = REFERENCE | {"eager_fp8": {"loss0": 8.0, "grad_norm0": 5.0, "sketch": rounded}}
        told = parity.judged(line, reference, False, beside, True)["parity"]
        assert told["eager_fp8_gradient_error"] == pytest.approx(math.dist(rounded, [3.0, 4.0]) / 5)
        assert told["gradient_allowed"] == pytest.approx(1.25 * told["eager_fp8_gradient_error"] + 1e-5)
        assert told["ok"] is ok and told["gradient_error"] == pytest.approx(0.6)


def test_a_product_is_rounded_to_fp8_by_rows():
    """Beside fp64: rounding errors of factors of 4 bits, e4m3's, and the factors' own scales."""
    torch.manual_seed(0)
    x, w = torch.randn(40, 10, 256).bfloat16(), (torch.randn(48, 256) * torch.logspace(-6, 6, 48)[:, None]).bfloat16()
    exact = x.double() @ w.double().t()
    error = (truth.rounded_product(x, w).double() - exact).norm(dim=(0, 1)) / exact.norm(dim=(0, 1))
    assert error.min() > 0.03 and error.max() < 0.045  # sqrt(2) times a rounding of 2.6 %
    q = truth.rounded_product(torch.eye(256).bfloat16(), w[:1])[:, 0]
    assert torch.unique((q.float() / q.float().abs().max() * 448).abs()).numel() <= 127


def test_an_eager_model_with_fp8_factors():
    """Forward and gradients of a linear layer under an adapter are rounded to fp8, as long as the context lasts."""
    model = build(Cell("tiny", "nf4", 2, 40), "cpu")
    batch = batch_of(Cell("tiny", "nf4", 2, 40), 0, "cpu")
    seen = []
    for rounds in (False, True, False):
        with (
            truth.with_fp8_factors(model) if rounds else contextlib.nullcontext(),
            torch.autocast("cpu", torch.bfloat16),
        ):
            loss = model(**batch, use_cache=False).loss
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
        seen.append((loss.item(), dict(zip(names, gradients, strict=True))))
    assert seen[0][0] == seen[2][0] != seen[1][0] == pytest.approx(seen[0][0], rel=1e-3)
    for name, gradient in seen[0][1].items():
        assert torch.equal(gradient, seen[2][1][name])
        off = ((gradient - seen[1][1][name]).norm() / gradient.norm()).item()
        assert 0.005 < off < 0.3, name


def test_the_noise_of_eager_passes_and_half_as_much_again_does_not():
    """With the gradients of a model: the truth's, and noise of random direction on them."""
    task = Task("reference", Cell("tiny", "nf4", 2, 32))
    judge = reference.prepare(task, (), "cpu")
    seen = measure.judge(task, judge, "cpu")
    again = reference.prepare(task, (), "cpu")
    widen(again.model)
    again.loss(batch_of(task.cell, 0, "cpu"))
    truth = [parameter.grad.clone() for parameter in again.model.parameters() if parameter.grad is not None]
    error = parity.differences(seen["eager"], seen["eager"]["sketch"], seen)["gradient_error"]
    assert 1e-3 < error < 2e-2
    torch.manual_seed(0)
    noise = [torch.randn_like(gradient) for gradient in truth]
    size, norm = (math.sqrt(sum(g.square().sum().item() for g in gradients)) for gradients in (noise, truth))
    for times, ok in ((1.0, True), (1.5, False)):
        trained = [parameter for parameter in again.model.parameters() if parameter.grad is not None]
        for parameter, gradient, random in zip(trained, truth, noise, strict=True):
            parameter.grad = gradient + random * (times * error * norm / size)
        line = {
            **RIGHT, "loss0": seen["loss0"], "grad_norm0": measure.gradient_norm(again.model),
            "sketch": measure.gradient_sketch(again.model),
        }  # fmt: skip
        told = parity.judged(line, seen)["parity"]
        assert told["ok"] is ok and told["gradient_error"] == pytest.approx(times * error, rel=0.1)
        assert told["loss_difference"] == 0.0 and told["grad_norm_difference"] < 1e-3


def test_a_wrong_softmax_scale_fails(monkeypatch):
    """Its loss and norm are right, and its gradient is nearer to the truth than a tenth."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    cell = Cell("tiny", "nf4", 2, 48)
    seen = measure.run(Task("reference", cell))
    for arm, ok in (("peft", True), ("module:wrong_scale", False)):
        told = parity.judged(measure.run(Task(arm, cell, 1, 1)), seen)["parity"]
        assert told["ok"] is ok
        assert told["loss_difference"] < 1e-3 and told["grad_norm_difference"] < 1e-2 and told["gradient_error"] < 0.1


@pytest.mark.parametrize("where", ["eager", "truth"])
def test_a_reference_that_is_not_finite_judges_nothing(where):
    bad = (
        {**REFERENCE, "sketch": [math.nan, 4.0]}
        if where == "truth"
        else REFERENCE | {"eager": EAGER | {"loss0": math.inf}}
    )
    assert parity.judged(RIGHT, bad)["parity"] == {"ok": None, "reason": "no reference: it is not finite"}


def test_without_a_reference_nothing_is_judged():
    line = parity.judged(RIGHT, {"status": "out of memory", "reason": "all of it"})
    assert line["parity"] == {"ok": None, "reason": "no reference: all of it"} and line["tokens_per_second"] == 1.0


def test_batches():
    cell = Cell("tiny", "nf4", 64, 100, padding=0.5, completion=0.25)
    batch, again, other = batch_of(cell, 3, "cpu"), batch_of(cell, 3, "cpu"), batch_of(cell, 4, "cpu")
    assert torch.equal(batch["input_ids"], again["input_ids"]) and not torch.equal(
        batch["input_ids"], other["input_ids"]
    )
    real = batch["attention_mask"].sum(1)
    assert real.min() >= 50 and real.max() <= 100 and 65 < real.float().mean() < 85
    for row, labels, ids in zip(real.tolist(), batch["labels"], batch["input_ids"]):
        start = int(row * 0.75)
        assert (labels[:start] == -100).all() and (labels[row:] == -100).all()
        assert torch.equal(labels[start:row], ids[start:row])
    assert batch_of(TINY, 0, "cpu").keys() == {"input_ids", "labels"}


def line_of(length, peak, arm="fastft"):
    cell = Cell("llama-8b", "nf4", 2, length)
    return {"arm": arm, "status": "ok", "peak_gb": peak, **{k: getattr(cell, k) for k in Cell.__annotations__}}


def test_memory_is_a_slope_and_an_intercept_from_four_lengths_on():
    lengths = (1024, 2048, 4096, 8192)
    lines = [line_of(n, 5.9 + 2 * n * 0.254e-3) for n in lengths] + [line_of(n, 1.0, "peft") for n in lengths[:3]]
    (fit,) = memory_fits(lines)
    assert fit["arm"] == "fastft" and fit["lengths"] == list(lengths)
    assert fit["mb_per_token"] == pytest.approx(0.254) and fit["intercept_gb"] == pytest.approx(5.9)
    assert fit["largest_residual_gb"] < 1e-9


def test_a_cpu_gets_the_tiny_shape():
    assert {cell.shape for cell in default_cells(None)} == {"tiny"}
    assert all(cell.shape in SHAPES for memory in (12e9, 24e9, 141e9) for cell in default_cells(memory))


def test_whole_runs_of_two_tools_are_timed_and_learn_the_same():
    """Both begin with the same weights, and their trainers shuffle alike: the losses of all steps agree."""
    from benchmarks import runs

    ours, theirs = (runs.measured(Task(arm, TINY, steps=2, backend="eager"), log_every=1) for arm in ("fastft", "peft"))
    assert ours["step_ms"] > 0 and theirs["step_ms"] > 0 and ours["cuda_graphs"] == {"replayed": 0}
    assert len(ours["losses"]) == 4 and ours["losses"] == pytest.approx(theirs["losses"], rel=1e-3)
    assert max(ours["losses"]) - min(ours["losses"]) > 1e-2  # of other batches they would be others
