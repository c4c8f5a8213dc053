"""Gate and up kept in 8 bits: the bytes of a step, its loss to the bit, and how far its gradients come to lie off."""

import pytest
import torch
from attrs import evolve
from counting import Counting
from tiny import batch, flat, in_nf4, make, relative, run, with_lora

import fastft
from fastft.errors import UsageError
from fastft.graph.passes import context, feed_forward
from fastft.graph.twin import tiny_model
from fastft.graph.verify import Verdict
from fastft.memory.estimate import Mode, estimate, own_bytes_per_token, setup_of
from fastft.memory.levels import LEVELS
from fastft.memory.plan import PLANS, budget_of, named_part, plan_problem, planned, solve
from fastft.memory.remedies import remedies
from fastft.memory.shape import Shape
from fastft.state import get_state, update_state
from fastft.train import card

ROWS, LENGTH = 4, 64
# 64 numbers have a scale: a width of whole blocks is what the estimate counts.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
WIDE = "gate and up are kept as they are, not in 8 bits: in 2 of 2 graphs of layers, {}"


def llama(plan, dtype=torch.float32, nf4=False, family="llama", compute="exact", wide=None, **changes):
    torch._dynamo.reset()
    kinds = {"layer_types": ["full_attention"] * 2} if family == "gemma3_text" else {}
    model = tiny_model(family, dtype=dtype, **{**SIZES, **kinds})
    model.set_attn_implementation("sdpa")
    model = with_lora(in_nf4(model, (), True) if nf4 else model, dtype, **changes).train()
    model = fastft.compile(model.to(wide or dtype), plan=plan, backend="aot_eager", compute=compute)
    return model, get_state(model).compiled.planned


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3_text"])
@pytest.mark.parametrize(("dtype", "nf4"), [(torch.float32, True), (torch.bfloat16, False)])
def test_the_same_loss_to_the_bit_and_gradients_within_a_hundredth(family, dtype, nf4):
    inputs = batch(0, rows=ROWS, length=LENGTH)
    exact = run(llama("keep", dtype, nf4, family)[0], inputs)
    model, _ = llama("keep+8bit", dtype, nf4, family)
    got = run(model, inputs)
    assert torch.equal(got[0], exact[0]) and torch.equal(got[1], exact[1])
    truth = flat(exact[2])
    if dtype == torch.bfloat16:
        truth = flat(run(llama("keep", dtype, nf4, family, wide=torch.float32)[0], inputs)[2])
    assert relative(truth, flat(got[2])) < 0.01 + relative(truth, flat(exact[2]))
    assert relative(flat(exact[2]), flat(got[2])) > 1e-4
    report = fastft.report(model)
    assert report.refused() == report.not_in_eight_bits() == report.notes == ()
    assert [r.module for g in report.graphs for r in g.rewrites if r.kept == "8 bits"] != []
    assert report.modes == "2 layers keep (gate and up in 8 bits, not exact)" and report.modes in str(report)


def test_training_follows_the_exact_curve():
    inputs, curves = batch(0, rows=ROWS, length=LENGTH), []
    for plan in ("keep", "keep+8bit"):
        model, _ = llama(plan)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        curves.append([])
        for _ in range(12):
            curves[-1].append(run(model, inputs)[1].item())
            optimizer.step()
    exact, narrow = curves
    assert exact[-1] < exact[0] - 0.3 and narrow != exact
    assert narrow == pytest.approx(exact, rel=2e-3)


def test_levels_keep_what_the_estimate_says():
    """One that computes gate and up again is exact, and its graph as without the plan."""
    modes = [Mode("min"), *(Mode(level, True) for level in LEVELS)]
    model = make("llama", torch.float32, True, **{**SIZES, "num_hidden_layers": len(modes)})
    torch._dynamo.reset()
    model.set_attn_implementation("sdpa")
    model = fastft.compile(model, plan="keep+8bit", backend="aot_eager")
    plan = get_state(model).compiled.planned
    plan.chosen, plan.offloader = tuple(modes), Counting()
    got = run(model, batch(0, rows=ROWS, length=LENGTH))
    setup = plan.setup
    assert setup.eight_bits
    wanted = [ROWS * LENGTH * (own_bytes_per_token(setup, level) + 4 * setup.shape.hidden) for level in LEVELS]
    assert plan.offloader.by_call == wanted
    assert all(torch.isfinite(gradient).all() for gradient in got[2].values())


def test_what_computes_gate_and_up_again_is_exact():
    inputs, gradients = batch(0, rows=ROWS, length=LENGTH), {}
    for plan in ("keep", "keep+8bit"):
        model, chosen = llama(plan)
        chosen.chosen = (Mode("attention"),) * 2
        gradients[plan] = flat(run(model, inputs)[2])
    assert torch.equal(*gradients.values())


def test_lengths_that_change_compile_no_more_graphs():
    model, _ = llama("keep+8bit")
    graphs = []
    for length in (64, 48, 80, 33):
        run(model, batch(0, rows=ROWS, length=length))
        graphs.append(len(fastft.report(model).graphs))
    assert graphs[1:] == [graphs[1]] * 3


def test_together_with_fp8_factors():
    inputs = batch(0, rows=ROWS, length=LENGTH)
    fp8 = run(llama("keep", torch.bfloat16, compute="fp8")[0], inputs)
    model, _ = llama("keep+8bit", torch.bfloat16, compute="fp8")
    got = run(model, inputs)
    assert torch.equal(got[1], fp8[1]) and 1e-4 < relative(flat(fp8[2]), flat(got[2])) < 0.02
    report = fastft.report(model)
    assert report.not_in_fp8() == report.not_in_eight_bits() == () and "gate and up in 8 bits" in report.modes


def test_a_proof_that_refuses_is_told_and_keeps_them_as_they_are(monkeypatch):
    def prove(*arguments, **more):
        verdict = honest(*arguments, **more)
        refuse = arguments[5].name == "8 bits"
        return Verdict(False, 0.0, 0.5, "gradients differ by 0.5") if refuse else verdict

    honest = context.prove
    inputs = batch(0, rows=ROWS, length=LENGTH)
    exact = run(llama("keep")[0], inputs)
    monkeypatch.setattr(context, "prove", prove)
    model, _ = llama("keep+8bit")
    assert torch.equal(flat(run(model, inputs)[2]), flat(exact[2]))
    report = fastft.report(model)
    assert "not kept in 8 bits: model.layers.0.mlp: gradients differ by 0.5" in str(report)
    assert report.notes == (WIDE.format("gradients differ by 0.5"),)
    chosen = get_state(model).compiled.planned  # what is told and predicted is what is
    assert report.modes == "2 layers keep" and chosen.setup.eight_bits is False
    assert chosen.predicted().peak == estimate(evolve(chosen.setup, eight_bits=False), [Mode()] * 2).peak


def test_a_feed_forward_that_is_not_replaced_whole_is_told(monkeypatch):
    monkeypatch.setattr(feed_forward, "_fits", lambda projection: False)
    model, chosen = llama("keep+8bit")
    run(model, batch(0, rows=ROWS, length=LENGTH))
    report = fastft.report(model)
    assert "not kept in 8 bits: LlamaDecoderLayer: its feed-forward was not replaced as a whole" in str(report)
    assert report.modes == "2 layers keep" and not chosen.eight_bits
    assert report.notes == (WIDE.format("its feed-forward was not replaced as a whole"),)


def test_passes_without_gradients_keep_nothing():
    model, chosen = llama("keep+8bit")
    with torch.no_grad():
        model(**batch(0, rows=ROWS, length=LENGTH), use_cache=False, lengths_vary=True)
    (graph, *_) = [graph for graph in chosen.graphs if graph.unit == "LlamaDecoderLayer"]
    assert not graph.gradients and graph.eight_bits is None and not any(done.kept for done in graph.rewrites)
    run(model, batch(0, rows=ROWS, length=LENGTH))
    of_layers = [graph for graph in chosen.graphs if graph.unit == "LlamaDecoderLayer"]
    assert [graph.eight_bits for graph in of_layers] == [graph.gradients or None for graph in of_layers]
    assert chosen.eight_bits and any(graph.gradients for graph in of_layers)


def test_auto_takes_the_plan_of_the_models_state():
    torch._dynamo.reset()
    model = with_lora(tiny_model("llama", **SIZES), torch.float32).train()
    update_state(model, plan="fast")
    model = fastft.compile(model, plan="auto+8bit", backend="eager")
    assert fastft.report(model).plan == "fast+8bit"
    update_state(model, plan="min")
    with pytest.raises(UsageError, match=r"min\+8bit"):
        fastft.compile(model, plan="auto+8bit", backend="eager")


@pytest.mark.parametrize("obstacle", ["attention only", "disabled", "torch"])
def test_where_it_cannot_be_the_report_says_why(obstacle):
    torch._dynamo.reset()
    model = tiny_model("llama", **SIZES)
    targets = {"target_modules": ["q_proj", "v_proj"]} if obstacle == "attention only" else {}
    model = with_lora(model, torch.float32, **targets).train()
    options = {"disabled": {"disable": ["feed_forward"]}, "torch": {"implementations": {"feed_forward": "torch"}}}
    model = fastft.compile(model, plan="keep+8bit", backend="eager", **options.get(obstacle, {}))
    report = fastft.report(model)
    assert any(note.startswith("gate and up are kept as they are, not in 8 bits: ") for note in report.notes)
    setup = get_state(model).compiled.planned.setup
    assert "8 bits" not in report.modes and setup.eight_bits is None
    assert not any("8 bits" in remedy.name for remedy in remedies(evolve(setup, rows=4, length=64), [Mode()] * 2))


LLAMA_8B = Shape(32, 4096, 14336, 32, 4096, 1024, 128256, False, (None,) * 32)


def test_budgets_are_solved_with_what_it_saves():
    exact = setup_of(LLAMA_8B, 4, 4096)
    narrow = evolve(exact, eight_bits=True)
    keep = [Mode()] * 32
    saved = estimate(exact, keep).peak - estimate(narrow, keep).peak
    assert saved == pytest.approx(32 * 4 * 4096 * 2 * 14336 * (2 - 1 - 4 / 64), rel=0.03)  # 14.1 GB
    budget = 50 * 10**9
    assert solve(narrow, budget).modes == tuple(keep) != solve(exact, budget).modes
    assert planned(narrow, "keep+8bit", budget).fits and not planned(exact, "keep", budget).fits
    fast = [Mode(dequantised=True)] * 32
    saves = {remedy.name: remedy.saves for remedy in remedies(narrow, fast)}
    assert saves['plan="keep+8bit"'] == estimate(narrow, fast).peak - estimate(narrow, keep).peak
    names = [remedy.name for remedy in remedies(exact, keep, budget)]
    assert "gate and up in 8 bits (not exact; a plan with '+8bit' behind it)" in names
    assert not any("8 bits" in remedy.name for remedy in remedies(narrow, keep, budget))


def test_how_a_plan_says_so():
    assert named_part("24GB+8bit") == ("24GB", True) and named_part("keep") == ("keep", False)
    assert named_part(24 * 10**9) == (24 * 10**9, False) and budget_of("24GB+8bit") == 24 * 10**9
    assert budget_of("fast+8bit") is None
    for plan in (*PLANS, "24GB"):
        assert (plan_problem(f"{plan}+8bit") is None) == (plan not in ("min", "offload")), plan
    with pytest.raises(UsageError, match=r"kep\+8bit(.|\n)*did you mean 'keep\+8bit'"):
        fastft.compile(tiny_model("llama"), plan="kep+8bit")


def test_the_model_card_says_so():
    report = fastft.report(llama("keep+8bit")[0]).to_dict()
    assert ("kept for the backward pass", "gate and up in 8 bits (not exact)") in card.facts({"rewrites": report})
    assert ("kept for the backward pass", None) in card.facts({"rewrites": {**report, "modes": "2 layers keep"}})
