"""Every family, rewritten and compiled, against eager transformers: logits, loss and every gradient."""

import math

import pytest
import torch
from tiny import FAMILIES, batch, flat, make, relative, run

import fastft

# Gradients in bf16 are noisy, and now and then one is far off: of a few batches two equal errors differ by a third.
SEEDS = {torch.float32: range(3), torch.bfloat16: range(12)}
# Regions of the two-layer twin's layers: LoRA linears, gates, rotations, norms. Behind the layers is one norm more.
PACKED = {"phi3": 8, "glm4": 12}
NORMS = {"qwen3": 8, "gemma2": 8, "gemma3_text": 12, "olmo2": 8, "glm4": 8, "cohere": 2, "cohere2": 2}
ROTATED_LAYERS = {"cohere2": 1, "smollm3": 1}


EPS = torch.finfo(torch.float32).eps
# (what, factor over eager's own error, floor). Thousands of roundings average out in logits and in the whole gradient;
# the loss is one number, and the worst of some thirty parameters is an extreme value: both are noisier draws.
BUDGETS = {
    torch.float32: [
        ("logits", 1.25, 4 * EPS),
        ("loss", 1, 16 * EPS),
        ("gradient", 1.25, 4 * EPS),
        ("worst", 2, 16 * EPS),
    ],
    torch.bfloat16: [("logits", 1.25, 0), ("loss", 1, 3e-4), ("gradient", 1.25, 0), ("worst", 2, 0)],
}


def worst_parameter(truth, other):
    """Return the largest relative error of one parameter's gradient; a vanishing gradient (as that of a key's bias) is
    measured against a tenth of the median gradient."""
    norms = sorted(gradient.norm().item() for gradient in truth.values())
    least = 0.1 * norms[len(norms) // 2]
    errors = [((other[n] - g).norm() / max(g.norm().item(), least)).item() for n, g in truth.items()]
    assert all(math.isfinite(error) for error in errors)
    return max(errors)


def rms(values):
    return math.sqrt(sum(v * v for v in values) / len(values))


def expected_regions(family, lora):
    found = {"glu": 2, "norm": NORMS.get(family, 4), "rope": ROTATED_LAYERS.get(family, 2)}
    return found | ({"lora": PACKED.get(family, 14)} if lora else {})


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_region_is_rewritten_and_the_model_as_near_to_the_truth_as_eager(family, dtype, lora):
    truth_model, eager_model = make(family, dtype, lora, wide=torch.float64), make(family, dtype, lora)
    # The rewritten graph as it is, and as it is split into forward and backward: a dtype each.
    backend = "aot_eager" if dtype == torch.bfloat16 else "eager"
    model = fastft.compile(make(family, dtype, lora), backend=backend)
    errors = {"eager": [], "ours": []}
    for seed in SEEDS[dtype]:
        inputs = batch(seed)
        truth = run(truth_model, inputs)
        for name, other in (("eager", run(eager_model, inputs)), ("ours", run(model, inputs))):
            assert other[2].keys() == truth[2].keys()
            logits, gradient = relative(truth[0], other[0]), relative(flat(truth[2]), flat(other[2]))
            errors[name].append(
                (logits, abs(other[1] - truth[1]).item(), gradient, worst_parameter(truth[2], other[2]))
            )
    for index, (kind, factor, floor) in enumerate(BUDGETS[dtype]):
        eager, ours = (rms([e[index] for e in errors[name]]) for name in ("eager", "ours"))
        assert ours <= eager * factor + floor, f"{kind}: ours {ours:.2e}, eager {eager:.2e}"
    assert_every_claimed_region_is_replaced(fastft.report(model), family, lora)


def assert_every_claimed_region_is_replaced(report, family, lora):
    assert report.refused() == ()
    assert report.head.startswith("chunked")
    # Layers that share a graph are captured once: count regions by layer class and kind, not by layer.
    once, graphs = expected_regions(family, lora), len(report.graphs)
    expected = {rule: count if graphs == 3 else count // 2 for rule, count in once.items()}
    assert report.applied() == expected | {"norm": expected["norm"] + 1}
    assert [r.module for r in report.graphs[-1].rewrites] == ["model.norm"]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "cohere2", "phi3"])
def test_fused_operations_in_the_graph_agree_too(family):
    operations = dict.fromkeys(("lora", "glu", "norm", "rope"), "op")
    truth_model = make(family, torch.float32, True, wide=torch.float64)
    model = fastft.compile(make(family, torch.float32, True), backend="aot_eager", implementations=operations)
    inputs = batch(0)
    truth, ours = run(truth_model, inputs), run(model, inputs)
    assert relative(truth[0], ours[0]) < 2e-6
    assert relative(flat(truth[2]), flat(ours[2])) < 5e-6
    report = fastft.report(model)
    assert report.refused() == ()
    assert {r.implementation for g in report.graphs for r in g.rewrites} == {"op"}


@pytest.mark.inductor
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_inductor_gives_the_same(family):
    truth_model = make(family, torch.float32, True, wide=torch.float64)
    model = fastft.compile(make(family, torch.float32, True))
    inputs = batch(0)
    truth, ours = run(truth_model, inputs), run(model, inputs)
    assert relative(truth[0], ours[0]) < 2e-6
    assert relative(flat(truth[2]), flat(ours[2])) < 5e-6
