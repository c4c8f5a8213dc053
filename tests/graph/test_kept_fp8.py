"""NF4 weights kept as fp8 factors: the bits of a step, the bytes, and that no step makes or transposes them anew."""

import pytest
import torch
from nf4_models import MIXED, compiled, nf4, same
from tiny import batch, run
from torch._subclasses.fake_tensor import FakeTensorMode

import fastft
from fastft.graph.compile import release_weights
from fastft.graph.kept import FACTORS, KeptWeights, Packed, examples, finder, kept_inputs
from fastft.graph.passes import context
from fastft.graph.verify import Verdict
from fastft.kernels import fp8
from fastft.kernels.nf4 import ref as nf4_ref
from fastft.memory.estimate import Mode
from fastft.state import get_state
from fastft.train import step
from fastft.train.cuda_graphs import state_of

# Of a layer of the tiny Llama: its NF4 weights, and the rows of all of them, each of which has a scale in fp32.
WEIGHTS, ROWS = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128, 2 * 64 + 2 * 32 + 3 * 128 - 64
LAYER = 2 * WEIGHTS + 4 * ROWS


def pair(**changes):
    """Return two models that compute in fp8: one without copies of its weights, and one with, and the plan of that."""
    plain, _ = compiled(compute="fp8", **changes)
    model, planned = compiled(plan="fast", compute="fp8", **changes)
    return plain, model, planned


@pytest.mark.parametrize(
    ("family", "dtype", "nested", "backend"),
    [("llama", torch.float32, True, "aot_eager"), ("llama", torch.bfloat16, False, "eager"),
     ("phi3", torch.float32, True, "aot_eager"), ("gemma3_text", torch.float32, True, "eager")],
)  # fmt: skip
def test_steps_have_the_same_bits_with_copies_and_without(family, dtype, nested, backend):
    plain, model, planned = pair(family=family, dtype=dtype, nested=nested, backend=backend)
    for seed in range(2):
        assert same(run(plain, batch(seed)), run(model, batch(seed)))
    told = fastft.report(model)
    assert told.modes == "2 layers keep, weights in fp8" and told.notes == () == told.not_in_fp8() == told.refused()
    assert len(told.in_fp8()) == len(planned.weights.copies) == (8 if family == "phi3" else 14)
    assert planned.weights.changes == 2 * 4  # made once: what reads one activation together
    assert all([form[0] for form in one.tensors] == [FACTORS] for one in planned.weights.copies.values())
    predicted = {part.name: part.bytes for part in planned.predicted().parts}["weights in fp8"]
    rows = sum(linear.out_features for layer in planned.keepable for linear in layer)
    assert predicted == planned.setup.dequantised_bytes(planned.modes) == planned.weights.bytes - 4 * rows
    assert predicted == 2 * sum(planned.setup.nf4_weights) > 0


@pytest.mark.inductor
def test_compiled_by_inductor():
    plain, model, _ = pair(num_hidden_layers=1, backend="inductor")
    for seed in range(2):
        assert same(run(plain, batch(seed)), run(model, batch(seed)))


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_step_makes_and_transposes_no_factors(family, monkeypatch):
    plain, model, _ = pair(family=family, num_hidden_layers=1)
    wanted = run(plain, batch(0))
    run(model, batch(0))
    made = []
    for owner, name in ((fp8.op, "_transposed_into"), (nf4_ref, "nf4_dequantize")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, real=real: made.append(given) or real(*given))
    assert same(wanted, run(model, batch(0))) and made == []
    assert same(wanted, run(plain, batch(0))) and made != []


def test_levels_moved_or_not_beside_layers_that_are_not_kept():
    options = {"num_hidden_layers": 5, "backend": "aot_eager", "compute": "fp8"}
    plain, moved = compiled([Mode(m.level, m.offload) for m in MIXED], **options)
    wanted = [run(plain, batch(seed)) for seed in range(2)]
    model, planned = compiled(MIXED, **options)
    assert all(same(one, run(model, batch(seed))) for seed, one in enumerate(wanted))
    assert planned.weights.bytes == 3 * LAYER and planned.weights.changes == 3 * 4
    assert planned.offloader.moved_bytes == moved.offloader.moved_bytes > 0  # copies stay where they are
    layers = model.get_base_model().model.layers
    assert [len(planned.weights.of(layer.parameters())) for layer in layers] == [0, 21, 21, 21, 0]


def test_linears_that_are_not_in_nf4_are_quantised_beside_the_copies_of_others():
    plain, model, planned = pair(dense=("k_proj", "up_proj", "down_proj"), num_hidden_layers=1)
    assert same(run(plain, batch(0)), run(model, batch(0)))
    assert len(planned.weights.copies) == 4
    assert planned.weights.bytes == 2 * (2 * 64 * 64 + 64 * 32 + 64 * 128) + 4 * (2 * 64 + 32 + 128)


def test_what_a_proof_refuses_in_fp8_reads_copies_in_its_own_dtype(monkeypatch):
    real = context.prove

    def prove(graph_module, region, binding, function, arguments, allowed, inputs, **more):
        if allowed.name == "fp8" and "self_attn" in region.name:
            return Verdict(False, 1.0, 1.0, "too far off")
        return real(graph_module, region, binding, function, arguments, allowed, inputs, **more)

    monkeypatch.setattr(context, "prove", prove)
    plain, model, planned = pair(num_hidden_layers=1, dtype=torch.bfloat16)
    assert same(run(plain, batch(0)), run(model, batch(0)))
    assert len(fastft.report(model).in_fp8()) == 3 and len(fastft.report(model).not_in_fp8()) == 4
    assert [next(iter(one.tensors)) for one in planned.weights.copies.values()].count(torch.bfloat16) == 4
    assert planned.weights.bytes == LAYER - 4 * (2 * 64 + 2 * 32)  # 2 bytes a weight either way


def test_under_autocast_the_copies_are_the_same():
    plain, model, planned = pair(num_hidden_layers=1, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        steps = [(run(plain, batch(seed)), run(model, batch(seed))) for seed in range(2)]
    assert all(same(*step) for step in steps) and len(fastft.report(model).in_fp8()) == 7
    run(model, batch(0))  # without it: a graph of its own, which reads what is there
    assert len(fastft.report(model).graphs) == 4 and len(fastft.report(model).in_fp8()) == 14
    assert planned.weights.bytes == LAYER and planned.weights.changes == 4


def test_passes_without_gradients_read_the_same_copies():
    plain, model, planned = pair(num_hidden_layers=1)
    with torch.no_grad():
        wanted, found = (one(**batch(0), use_cache=False, lengths_vary=True).logits for one in (plain, model))
    assert torch.equal(wanted, found) and planned.weights.changes == 4
    run(model, batch(0))
    assert planned.weights.bytes == LAYER and planned.weights.changes == 4


def test_copies_are_made_anew_with_their_group_when_a_weight_changes_and_go_when_let_go():
    plain, model, planned = pair(num_hidden_layers=1)
    first = run(model, batch(0))
    state = state_of(model)
    for one in (plain, model):
        with torch.no_grad():
            weight = one.get_base_model().model.layers[0].self_attn.k_proj.base_layer.weight
            weight.copy_(255 - weight)
    assert state_of(model) != state  # a recording of before is of no use
    made = run(model, batch(0))
    assert same(made, run(plain, batch(0))) and not same(made, first)
    assert planned.weights.changes == 5 and planned.weights.bytes == LAYER
    state = state_of(model)
    release_weights(model)
    assert planned.weights.bytes == 0 and state_of(model) != state
    assert same(made, run(model, batch(0))) and planned.weights.bytes == LAYER


def packed(*sizes, k=64):
    """Return NF4 weights [n, k] of random bytes."""
    generator, found = torch.Generator().manual_seed(0), []
    for n in sizes:
        weight = torch.randint(0, 256, (n * k // 2, 1), dtype=torch.uint8, generator=generator)
        found.append(Packed(weight, (torch.rand(n * k // 64, generator=generator) + 0.01,), n, k))
    return found


def test_copies_of_a_group_lie_side_by_side_and_are_counted_once():
    group, weights = packed(32, 16, 48), KeptWeights()
    copies = weights.together(group, FACTORS)
    for one, (q, scale, turned) in zip(group, copies, strict=True):
        want, scales = fp8.weight_rows(one.weight, list(one.state), one.n, one.k)
        assert torch.equal(q.view(torch.uint8), want.view(torch.uint8)) and torch.equal(scale, scales)
        assert torch.equal(turned.view(torch.uint8), want.view(torch.uint8).t())
    assert fp8.side_by_side([turned for _, _, turned in copies]).shape == (64, 96)
    assert fp8.side_by_side([scale for _, scale, _ in copies]).shape == (96,)
    assert weights.bytes == 2 * 64 * 96 + 4 * 96 and weights.changes == 1
    again = weights.together(group, FACTORS)
    assert all(one is other for one, other in zip(again[1], copies[1], strict=True)) and weights.changes == 1
    (alone,) = weights.together(group[:1], FACTORS)  # for a graph that reads it alone: no slice of a wider matrix
    assert [part.stride() for part in alone] == [(64, 1), (1,), (32, 1)] and copies[0][2].stride() == (96, 1)
    assert torch.equal(alone[2].view(torch.uint8), copies[0][2].view(torch.uint8)) and weights.changes == 2
    assert all(one is other for one, other in zip(weights.together(group, FACTORS)[0], copies[0], strict=True))


def test_inputs_of_a_graph_are_as_the_copies_that_it_gets():
    group, graph = packed(32, 16), torch.fx.Graph()
    nodes = [Packed(graph.placeholder(f"w{i}"), (graph.placeholder(f"s{i}"),), one.n, one.k) for i, one in
             enumerate(group)]  # fmt: skip
    with FakeTensorMode() as mode:
        for node, one in zip(nodes, group, strict=True):
            node.weight.meta["example_value"] = mode.from_tensor(one.weight)
    kept = []
    read = kept_inputs(kept, nodes, FACTORS)
    assert kept_inputs(kept, nodes[1:], FACTORS) == read[1:] and len(kept) == 1
    graph.output(tuple(node for nodes in read for node in nodes))
    copies = finder(graph, kept, KeptWeights())([part for one in group for part in (one.weight, *one.state)])
    told = [(one.shape, one.stride(), one.dtype) for one in examples(kept)]
    assert told == [(one.shape, one.stride(), one.dtype) for one in copies] and len(told) == 6
    module = torch.fx.GraphModule({}, graph)
    given = module(*(part for one in group for part in (one.weight, *one.state)), *copies)
    assert all(one is other for one, other in zip(given, copies, strict=True))  # the inputs come in this order


def losses(model, seeds=(0, 1)):
    """Return loss and gradients of steps through fastft's own loss head."""
    found = []
    for seed in seeds:
        model.zero_grad()
        loss = step.loss(model, batch(seed))
        loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    return found


def same_losses(one, other):
    pairs = [pair for (a, of_a), (b, of_b) in zip(one, other, strict=True) for pair in ((a, b), *zip(of_a, of_b))]
    return len(one[0][1]) == len(other[0][1]) > 0 and all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_heads_factors_are_kept_where_those_of_all_layers_are(autocast, monkeypatch):
    dtype = torch.bfloat16 if autocast else torch.float32
    options = {"backend": "eager", "compute": "fp8+head", "batch": (2, 37)}
    plain = fastft.compile(nf4(num_hidden_layers=1, dtype=dtype), plan="keep", **options)
    model = fastft.compile(nf4(num_hidden_layers=1, dtype=dtype), plan="fast", **options)
    planned, head = get_state(model).compiled.planned, model.get_base_model().lm_head
    head.float()  # what computes is another tensor under autocast
    plain.get_base_model().lm_head.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        wanted, found = losses(plain), losses(model)
        assert same_losses(wanted, found)
        kept = planned.weights.of([head.weight])
        assert [one.shape for one in kept] == [(272, 64), (64, 272), (1,)]  # the vocabulary of 259 is padded
        assert planned.weights.bytes == LAYER + 2 * 64 * 272 + 4 and planned.weights.changes == 5
        parts = {part.name: part.bytes for part in planned.predicted().parts}
        assert parts["weights in fp8"] == 2 * WEIGHTS + 2 * 64 * 259
        made = []
        for one in (plain, model):
            monkeypatch.setattr(fp8, "quantize_whole", lambda *given: made.append(1) or fp8.op.quantize_whole(*given))
            losses(one, [0])
        assert made == [1]  # without copies alone
        state = state_of(model)
        with torch.no_grad():
            for one in (plain, model):
                one.get_base_model().lm_head.weight.mul_(1.5)
        assert state_of(model) != state
        again = losses(model)
        assert same_losses(losses(plain), again) and not same_losses(found, again)
        release_weights(model)
        assert planned.weights.bytes == 0 and same_losses(again, losses(model))


def test_a_budget_that_is_not_enough_for_all_layers_keeps_nothing_of_the_head():
    model = fastft.compile(nf4(), plan="keep", backend="eager", compute="fp8+head", batch=(2, 37))
    keep = get_state(model).compiled.planned.predicted().peak
    model = fastft.compile(nf4(), plan=keep + 3 * WEIGHTS, backend="eager", compute="fp8+head", batch=(2, 37))
    planned = get_state(model).compiled.planned
    assert fastft.report(model).modes == "1 layer keep; 1 layer keep, weights in fp8"
    losses(model, [0])
    assert planned.weights.bytes == LAYER
