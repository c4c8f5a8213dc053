"""NF4 weights kept dequantised: the bits of a step, the bytes, and that the packed weights stay what the model is."""

import contextlib
import gc
from types import SimpleNamespace

import pytest
import torch
from nf4_models import MIXED, compiled, nf4, same
from tiny import batch, make, run
from torch._subclasses.fake_tensor import FakeTensorMode

import fastft
from fastft.graph.compile import FEWER_KEPT, release_weights, uncompile
from fastft.graph.kept import KeptWeights, Packed, finder, kept_inputs
from fastft.graph.passes import context
from fastft.graph.verify import Verdict
from fastft.kernels.nf4 import nf4_dequantize
from fastft.memory.estimate import Mode, estimate
from fastft.state import get_state
from fastft.train import cuda_graphs
from fastft.train.cuda_graphs import SETTLED, Replayer, state_of


def packed(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.dtype == torch.uint8}


@pytest.mark.parametrize(
    ("family", "dtype", "nested", "backend"),
    [("llama", torch.float32, True, "aot_eager"), ("llama", torch.bfloat16, False, "eager"),
     ("phi3", torch.float32, True, "eager"), ("gemma3_text", torch.float32, True, "eager")],
)  # fmt: skip
def test_steps_have_the_same_bits_and_the_packed_weights_stay(family, dtype, nested, backend):
    changes = {"family": family, "dtype": dtype, "nested": nested, "backend": backend}
    plain, _ = compiled(**changes)
    wanted = [run(plain, batch(seed)) for seed in range(2)]
    model, planned = compiled(plan="fast", **changes)
    before, keys = packed(model), list(model.state_dict())
    assert all(same(one, run(model, batch(seed))) for seed, one in enumerate(wanted))
    assert fastft.report(model).refused() == () and fastft.report(model).applied()["lora"] > 0
    assert fastft.report(model).modes == "2 layers keep, weights dequantised"
    assert len(planned.weights.copies) == len(before) > 0
    assert planned.weights.changes == len(before)  # made once
    assert list(model.state_dict()) == keys and set(keys) == set(plain.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in packed(model).items())
    assert planned.weights.bytes > 0 and holds_what_it_promises(planned)


def test_levels_moved_or_not_beside_layers_that_are_not_kept():
    plain, _ = compiled([Mode(m.level, m.offload) for m in MIXED], num_hidden_layers=5, backend="aot_eager")
    wanted = [run(plain, batch(seed)) for seed in range(2)]
    model, planned = compiled(MIXED, num_hidden_layers=5, backend="aot_eager")
    assert all(same(one, run(model, batch(seed))) for seed, one in enumerate(wanted))
    assert len(planned.weights.copies) == 7 * 3 == planned.weights.changes
    layers = model.get_base_model().model.layers
    assert [len(planned.weights.of(layer.parameters())) for layer in layers] == [0, 7, 7, 7, 0]


def test_code_that_inductor_fuses_reads_the_copies_too():
    implementations = {"feed_forward": "torch", "lora": "torch"}
    options = {"backend": "eager", "implementations": implementations}
    plain = fastft.compile(nf4(num_hidden_layers=1), plan="keep", **options)
    model = fastft.compile(nf4(num_hidden_layers=1), plan="fast", **options)
    assert same(run(plain, batch(0)), run(model, batch(0)))
    assert len(get_state(model).compiled.planned.weights.copies) == 7


def test_copies_are_not_moved_to_the_cpu():
    plain, moved = compiled([Mode("min", True)] * 2)
    run(plain, batch(0))
    model, planned = compiled([Mode("min", True, True)] * 2)
    run(model, batch(0))
    assert planned.offloader.moved_bytes == moved.offloader.moved_bytes > 0


def test_linears_that_are_not_in_nf4_are_read_as_they_are():
    dense = ("v_proj", "up_proj", "down_proj")
    plain, _ = compiled(dense=dense, num_hidden_layers=1)
    model, planned = compiled(plan="fast", dense=dense, num_hidden_layers=1)
    assert same(run(plain, batch(0)), run(model, batch(0)))
    assert len(planned.weights.copies) == 4
    assert planned.weights.bytes == 4 * (64 * 64 * 2 + 64 * 32 + 64 * 128) and holds_what_it_promises(planned)


def test_lengths_that_change():
    plain, _ = compiled(num_hidden_layers=1)
    model, _ = compiled(plan="fast", num_hidden_layers=1)
    for seed, length in enumerate((37, 24, 51)):
        assert same(run(plain, batch(seed, length=length)), run(model, batch(seed, length=length)))


def test_without_nf4_weights_the_plan_is_keep_and_says_so():
    model = fastft.compile(make("llama", torch.float32, True), plan="fast", backend="eager")
    assert fastft.report(model).modes == "2 layers keep"
    assert "plan 'fast' is 'keep': no layer has NF4 weights" in str(fastft.report(model))


def two_adapters(model):
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])


def another_blocksize(model):
    for weight in model.parameters():
        if hasattr(weight, "quant_state"):
            weight.quant_state.blocksize = 128


@pytest.mark.parametrize(
    ("lora", "change", "disable", "why"),
    [({"lora_dropout": 0.1}, None, (), "LoRA dropout above 0 runs as PEFT wrote it"),
     ({"use_dora": True}, None, (), "DoRA and other LoRA variants run as PEFT wrote them"),
     ({}, two_adapters, (), "2 adapters are active; one is fused"),
     ({}, another_blocksize, (), "base layer Linear4bit has no fused form"),
     ({}, None, ("lora", "feed_forward"), "the rewrite 'lora' is disabled")],
)  # fmt: skip
def test_copies_are_promised_of_linears_alone_that_a_rewrite_takes(lora, change, disable, why):
    model = nf4(lora=lora)
    if change is not None:
        change(model)
    for plan in ("fast", 10**12):
        fastft.compile(model, plan=plan, backend="eager", disable=disable, batch=(2, 37))
        planned, told = get_state(model).compiled.planned, fastft.report(model)
        assert told.modes == "2 layers keep" and not planned.setup.keepable
        assert all(part.name != "weights dequantised" for part in planned.predicted().parts)
        said = f"no weight is kept dequantised, plan 'fast' is 'keep': {why}"
        assert (said in told.notes) == (plan == "fast")


def holds_what_it_promises(planned):
    """Say whether the copies that there are are those of the modes, the setup and the prediction."""
    told = {part.name: part.bytes for part in planned.predicted().parts}
    of_modes = planned.setup.dequantised_bytes(planned.modes)
    return planned.weights.bytes == of_modes == told.get("weights dequantised", 0)


def test_without_the_rewrite_of_linears_whole_feed_forwards_read_copies():
    options = {"backend": "eager", "disable": ("lora",)}
    plain = fastft.compile(nf4(num_hidden_layers=1), plan="keep", **options)
    model = fastft.compile(nf4(num_hidden_layers=1), plan="fast", **options)
    assert same(run(plain, batch(0)), run(model, batch(0)))
    planned = get_state(model).compiled.planned
    assert len(planned.weights.copies) == 3 and holds_what_it_promises(planned) and not fastft.report(model).notes
    model = nf4(lora={"target_modules": ["q_proj", "gate_proj", "up_proj"]})  # no feed-forward of LoRA linears alone
    fastft.compile(model, plan="fast", backend="eager", disable=("lora",))
    assert fastft.report(model).modes == "2 layers keep"


def test_layers_without_an_adapter_keep_no_copies():
    model, planned = compiled(plan="fast", lora={"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]})
    assert fastft.report(model).modes == "1 layer keep; 1 layer keep, weights dequantised"
    run(model, batch(0))
    assert len(planned.weights.copies) == 2 and holds_what_it_promises(planned) and not fastft.report(model).notes


FEW_AND_MANY = {"target_modules": r".*\.0\.self_attn\.k_proj|.*\.[12]\..*_proj"}


def test_layers_count_what_they_keep_themselves():
    """The first layer has an adapter on its smallest linear alone, 2048 of the 36864 weights of each other layer."""
    changes = {"lora": FEW_AND_MANY, "num_hidden_layers": 3}
    _, planned = compiled(**changes)
    planned.see(2, 37, torch.device("cpu"))
    modes = [(Mode(),) * (3 - kept) + (Mode(dequantised=True),) * kept for kept in range(4)]
    peaks = [estimate(planned.setup, chosen).peak for chosen in modes]
    for chosen, peak in zip(modes, peaks, strict=True):
        model, planned = compiled(plan=peak, **changes)
        planned.see(2, 37, torch.device("cpu"))
        assert planned.modes == chosen and planned.fits and planned.predicted().peak == peak
    run(model, batch(0))
    assert planned.weights.bytes == 4 * (36864 + 36864 + 2048) and holds_what_it_promises(planned)


@pytest.mark.parametrize("first", ["uncompiled", "switched off"])
def test_a_first_call_without_the_rewrites_takes_back_nothing(first):
    model, planned = compiled(plan="fast", num_hidden_layers=1)
    if first == "uncompiled":
        with pytest.warns(UserWarning, match="runs uncompiled"):
            model(**batch(0), use_cache=True)
    else:
        with model.disable_adapter():
            model(**batch(0), use_cache=False)
    assert planned.weights.bytes == 0
    run(model, batch(0))
    assert fastft.report(model).modes == "1 layer keep, weights dequantised" and not planned.fewer
    assert len(planned.weights.copies) == 7 and holds_what_it_promises(planned)


@pytest.mark.parametrize(("plan", "refused", "copies"), [("fast", "self_attn", 3), ("fast", "", 0), (10**12, "", 0)])
def test_what_a_proof_refuses_is_taken_back(plan, refused, copies, monkeypatch):
    real = context.prove

    def prove(graph_module, region, *args, **more):
        refuse = refused in region.name
        return Verdict(False, 1.0, 1.0, "too far off") if refuse else real(graph_module, region, *args, **more)

    monkeypatch.setattr(context, "prove", prove)
    plain, _ = compiled(num_hidden_layers=1)
    wanted = [run(plain, batch(0, length=length)) for length in (37, 50)]
    model, planned = compiled(plan=plan, num_hidden_layers=1)
    planned.see(2, 37, torch.device("cpu"))
    assert fastft.report(model).modes == "1 layer keep, weights dequantised" and not fastft.report(model).notes
    for one, length in zip(wanted, (37, 50), strict=True):  # the second one solves a budget anew
        assert same(one, run(model, batch(0, length=length)))
        assert fastft.report(model).modes == "1 layer keep" + (", weights dequantised" if copies else "")
        assert fastft.report(model).notes == (FEWER_KEPT.format(1),)
        assert len(planned.weights.copies) == copies and holds_what_it_promises(planned)


def test_copies_go_when_they_are_let_go_and_come_again():
    model, planned = compiled(plan="fast", num_hidden_layers=1)
    first = run(model, batch(0))
    state = state_of(model)
    assert state == state_of(model)
    release_weights(model)
    assert planned.weights.bytes == 0 and state_of(model) != state
    assert same(first, run(model, batch(0))) and planned.weights.bytes > 0
    alive = KeptCopies(planned.weights)
    uncompile(model)
    assert alive.count() == 0
    fastft.compile(model, plan="fast", backend="eager")
    assert same(first, run(model, batch(0)))
    alive = KeptCopies(get_state(model).compiled.planned.weights)
    fastft.compile(model, plan="keep", backend="eager")
    assert alive.count() == 0 and same(first, run(model, batch(0)))


def copy_of(weights, weight, state, dtype):
    """Return the copy of the weight that `quantised` gives, from before or made now."""
    ((copy,),) = weights.together([Packed(weight, tuple(state), 8, 16)], dtype)
    return copy


class KeptCopies:
    """Counts which of the copies that there are now are alive later."""

    def __init__(self, weights):
        import weakref

        self.references = [weakref.ref(copy) for copy in weights.of(list(weights.copies.keys()))]
        assert self.references

    def count(self):
        gc.collect()
        return sum(reference() is not None for reference in self.references)


def test_a_budget_spends_what_is_left_on_weights_and_auto_does_not():
    plain, planned = compiled()
    wanted = run(plain, batch(0))
    keep, layer = planned.predicted().peak, 4 * planned.setup.nf4_weights[-1]
    model, planned = compiled(plan=int(keep + 1.2 * layer))
    assert same(wanted, run(model, batch(0)))
    assert [mode.dequantised for mode in planned.modes] == [False, True] and planned.weights.bytes == layer
    run(model, batch(0, length=64))  # a larger batch leaves no room for it
    assert planned.weights.bytes == 0 and not any(mode.dequantised for mode in planned.modes)
    _, planned = compiled(plan="auto")
    assert not any(mode.dequantised for mode in planned.modes)


def test_a_copy_follows_its_weight():
    weight, state = quantised()
    weights, seen = KeptWeights(), []

    def holds(weight):
        """Say whether the copy, which need be no other tensor, is what the weight means now."""
        seen.append(copy_of(weights, weight, state, torch.float32))
        return torch.equal(seen[-1], wanted(weight, state, torch.float32))

    assert holds(weight) and holds(weight) and seen[0] is seen[1] and weights.changes == 1
    with torch.no_grad():
        weight.copy_(255 - weight)  # written to
    assert holds(weight) and not torch.equal(seen[-1], seen[0]) and weights.changes == 2
    weight.data = weight.data.flip(0)  # moved, and other bytes there
    assert holds(weight) and not torch.equal(seen[-1], seen[-2]) and weights.changes == 3
    for part in state:
        part += part  # a write to any part of its quantisation state
        assert holds(weight) and not torch.equal(seen[-1], seen[-2])
    assert weights.changes == 7
    state[3] = state[3].clone() - 1  # another one
    assert holds(weight) and not torch.equal(seen[-1], seen[-2]) and weights.changes == 8
    del weight
    gc.collect()
    assert len(weights.copies) == 0


def quantised():
    """Return the bytes of a weight [8, 16] and its nested quantisation state."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randint(0, 256, (64, 1), dtype=torch.uint8), requires_grad=False)
    state = [torch.randint(0, 100, (2,), dtype=torch.uint8), torch.rand(256), torch.rand(1), torch.tensor(0.5)]
    return weight, state


def wanted(weight, state, dtype):
    return nf4_dequantize(weight.detach(), *state, 8, 16, dtype)


def test_a_weight_that_is_read_in_two_dtypes_has_a_copy_in_each():
    weight, state = quantised()
    weights, dtypes = KeptWeights(), (torch.float32, torch.bfloat16)
    for _ in range(3):
        for dtype in dtypes:
            assert torch.equal(copy_of(weights, weight, state, dtype), wanted(weight, state, dtype))
    assert weights.changes == 2 and weights.bytes == (4 + 2) * 128
    assert [copy.dtype for copy in weights.of([weight])] == list(dtypes)
    with torch.no_grad():
        weight.copy_(255 - weight)
    copy_of(weights, weight, state, torch.float32)
    assert weights.bytes == 4 * 128  # what was made of the bytes before is of no use


def test_a_graph_may_read_a_weight_in_two_dtypes():
    weight, state = quantised()
    graph = torch.fx.Graph()
    nodes = [graph.placeholder(name) for name in ("weight", "absmax", "code2", "absmax2", "offset")]
    with FakeTensorMode() as mode:
        nodes[0].meta["example_value"] = mode.from_tensor(weight)
    kept = []
    packed = Packed(nodes[0], tuple(nodes[1:]), 8, 16)
    read = [kept_inputs(kept, [packed], dtype) for dtype in (torch.float32, torch.bfloat16) * 2]
    assert read[:2] == read[2:] and len(kept) == 2
    graph.output(tuple(node for nodes in read[:2] for node in nodes[0]))
    module, weights = torch.fx.GraphModule({}, graph), KeptWeights()
    copies = finder(graph, kept, weights)
    for _ in range(2):
        found = module(weight, *state, *copies([weight, *state]))
        assert all(torch.equal(one, wanted(weight, state, one.dtype)) for one in found)
    assert [one.dtype for one in found] == [torch.float32, torch.bfloat16] and weights.changes == 2


def test_a_recording_makes_no_copy(monkeypatch):
    weight, state = quantised()
    weights = KeptWeights()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="of which copies are kept has no current one"):
        copy_of(weights, weight, state, torch.float32)
    assert len(weights.copies) == 0 == weights.changes
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    made = copy_of(weights, weight, state, torch.float32)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert copy_of(weights, weight, state, torch.float32) is made  # what is there is read
    with pytest.raises(RuntimeError, match="has no current one"):
        copy_of(weights, weight, state, torch.bfloat16)
    assert weights.bytes == 4 * 128


def test_a_write_to_the_quantisation_state_reaches_the_next_step():
    plain, _ = compiled(num_hidden_layers=1)
    model, _ = compiled(plan="fast", num_hidden_layers=1)
    first = run(model, batch(0))
    for one in (plain, model):
        for module in one.modules():
            if hasattr(getattr(module, "weight", None), "quant_state"):
                module.weight.quant_state.offset *= 3
    made = run(model, batch(0))
    assert same(made, run(plain, batch(0))) and not same(made, first)


def test_what_a_recording_depends_on_changes_with_every_change_of_the_copies():
    model, planned = compiled(plan="fast", num_hidden_layers=1)
    states = [state_of(model)]
    run(model, batch(0))
    states.append(state_of(model))
    run(model, batch(1))
    assert state_of(model) == states[-1]  # a step of the same copies
    weight = next(iter(planned.weights.copies.keys()))
    with torch.no_grad():
        weight.copy_(255 - weight)
    states.append(state_of(model))  # written to while a recording would read the copy
    run(model, batch(0))
    states.append(state_of(model))
    planned.weights.copies[weight].state[0].add_(1)
    states.append(state_of(model))
    run(model, batch(0))
    states.append(state_of(model))
    release_weights(model)
    states.append(state_of(model))
    run(model, batch(0))
    states.append(state_of(model))
    before = planned.weights.changes
    fastft.compile(model, plan="fast", backend="eager")
    planned = get_state(model).compiled.planned
    for _ in range(2):
        run(model, batch(0))
    states.append(state_of(model))
    planned.weights.changes = before  # though as many copies were made since: they are elsewhere
    states.append(state_of(model))
    assert len(set(states)) == len(states)
    release_weights(model)
    with torch.no_grad():
        empty = state_of(model)
        weight.copy_(255 - weight)
    assert state_of(model) == empty  # without copies a recording reads the weight itself


def test_a_write_while_a_recording_is_held_lets_go_of_it(monkeypatch):
    model, planned = compiled(plan="fast", num_hidden_layers=1)
    recorded, items = [], OnGpu()

    def loss(given, items):
        return model(**given, use_cache=False).loss

    replayer = Replayer(model, loss, "always")
    monkeypatch.setattr(cuda_graphs, "uncached_autocast", contextlib.nullcontext)
    monkeypatch.setattr(Replayer, "_timed", Replayer._plain)
    monkeypatch.setattr(Replayer, "_in_the_way", lambda *_: "")
    monkeypatch.setattr(cuda_graphs._Replay, "apply", lambda recording: recorded.append(recording) or torch.ones(()))
    graph = SimpleNamespace(replay=lambda: None)

    def record(self, given, shape):
        return SimpleNamespace(shape=shape[0], state=shape[1], forward=graph, inputs={}, parameters=())

    monkeypatch.setattr(Replayer, "_record", record)

    def replayed(count):
        before = replayer.replayed
        for _ in range(count):
            replayer(batch(0), items)
        return replayer.replayed - before

    settling = SETTLED + 1  # the step that makes the copies is of another state than those that read them
    assert replayed(settling) == 0 and replayed(3) == 3
    weight = next(iter(planned.weights.copies.keys()))
    with torch.no_grad():
        weight.copy_(255 - weight)
    assert replayed(settling) == 0 and replayed(2) == 2
    release_weights(model)
    assert replayed(settling) == 0 and replayed(2) == 2
    fastft.compile(model, plan="fast", backend="eager")
    assert replayed(settling) == 0 and replayed(2) == 2
    assert len({id(one) for one in recorded}) == 4


class OnGpu:
    """Stands for the number of targets."""

    device = torch.device("cuda")
