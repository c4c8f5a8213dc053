"""The norm behind the layers: compiled as they are and where they are, proved, counted, and taken off again."""

import pytest
import torch
from attrs import evolve
from peft import LoraConfig, get_peft_model
from tiny import batch, flat, make, relative, run

import fastft
from fastft.graph import planned as planning
from fastft.graph.compile import uncompile, uncompiled
from fastft.graph.twin import tiny_model
from fastft.memory.estimate import norm_bytes
from fastft.registry.resolve import find
from fastft.registry.spec import NormPoint
from fastft.state import base_model, get_state, update_state

FAMILIES = ("llama", "gemma3_text", "qwen3", "cohere")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# Of a layer nothing is rewritten but its norms: what is judged here is behind it.
OTHERS = ("feed_forward", "lora", "glu", "rope")


def compiled(family="llama", dtype=torch.float32, lora=True, disable=(), **changes):
    return fastft.compile(make(family, dtype, lora, **changes), backend="eager", disable=disable)


def norm_graphs(model):
    """Return the reports of the graphs that are a norm's own."""
    kind = type(base_model(model).model.norm).__name__
    return [graph for graph in fastft.report(model).graphs if graph.unit == kind]


def kept_bytes(norm, x):
    """Return the bytes that autograd keeps of one call of `norm`, weights left out, and the result."""
    kept, own = {}, norm.weight.untyped_storage().data_ptr()

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes() if storage.data_ptr() != own else 0
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = norm(x)
    return sum(kept.values()), y


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@DTYPES
@pytest.mark.parametrize("family", FAMILIES)
def test_value_and_gradients_are_those_of_an_fp32_norm(family, dtype, lora):
    """Odd lengths, after a step that compiled; the whole model is judged in test_families."""
    model = compiled(family, dtype, lora, OTHERS, hidden_size=72)
    run(model, batch(0))
    norm = base_model(model).model.norm
    truth = tiny_model(family, hidden_size=72).model.norm.train()
    truth.load_state_dict({name: value.float() for name, value in norm.state_dict().items()})
    epsilon = torch.finfo(dtype).eps
    for rows, length in ((3, 19), (2, 37)):
        generator = torch.Generator().manual_seed(length)
        given, upstream = (torch.randn(rows, length, 72, generator=generator).to(dtype) for _ in range(2))
        x, wide = given.clone().requires_grad_(), given.float().requires_grad_()
        norm.weight.grad = truth.weight.grad = None
        before = x * 1  # as behind a layer
        got, expected = norm(before), truth(wide)
        got.backward(upstream)
        expected.backward(upstream.float())
        assert got.dtype == dtype and relative(expected, got.float()) < epsilon
        assert relative(wide.grad, x.grad.float()) < epsilon
        assert (norm.weight.grad is None) == lora
        assert lora or relative(truth.weight.grad, norm.weight.grad.float()) < epsilon
    assert len(norm_graphs(model)) == 1


@pytest.mark.parametrize(
    ("family", "dtype"), [*((family, torch.bfloat16) for family in FAMILIES), ("llama", torch.float32)]
)
def test_it_keeps_its_input_alone_as_the_estimate_says(family, dtype):
    x = torch.randn(4, 64, 64).to(dtype).requires_grad_()
    found = {}
    for disable in (OTHERS, (*OTHERS, "norm")):
        torch._dynamo.reset()
        model = compiled(family, dtype, disable=disable)
        run(model, batch(0, rows=4, length=64))
        setup = get_state(model).compiled.planned.setup
        eager = "norm" in disable
        assert (setup.tokens, setup.norm) == (4 * 64, "eager" if eager else "reference")
        assert len(norm_graphs(model)) == (not eager)
        found[eager], _ = kept_bytes(base_model(model).model.norm, x * 1)
        small = found[eager] - norm_bytes(setup)[0]
        # as it was: in fp32 what every row was divided by, and the weight or one more than it
        assert 4 * 64 * 4 <= small <= 4 * 64 * 4 + 64 * 4 if eager else small == 0
    if dtype == torch.bfloat16:
        assert found[False] < found[True] / 2


def test_one_graph_serves_all_rows_and_lengths_and_norms_within_layers_are_not_taken_twice():
    eager, model = make("qwen3", torch.float32, True), compiled("qwen3")
    for seed, (rows, length) in enumerate(((2, 37), (3, 24), (2, 51), (5, 18))):
        inputs = batch(seed, rows=rows, length=length)
        expected, got = run(eager, inputs), run(model, inputs)
        assert relative(expected[0], got[0]) < 2e-6 and relative(flat(expected[2]), flat(got[2])) < 5e-6
    (graph,) = norm_graphs(model)
    (done,) = graph.rewrites
    assert (done.rule, done.module, done.applied, done.implementation) == ("norm", "model.norm", True, "op")
    names = [r.module for g in fastft.report(model).graphs for r in g.rewrites if g is not graph]
    assert "model.norm" not in names and any("q_norm" in name for name in names)
    told = f"Qwen3RMSNorm: {graph.nodes_before} -> {graph.nodes_after} nodes; replaced 1 norm (op)"
    assert told in str(fastft.report(model))
    assert get_state(model).compiled.norms == (base_model(model).model.norm,)


def test_asked_for_as_torch_code_it_is_lowered_as_the_layers_are():
    model = fastft.compile(
        make("gemma3_text", torch.float32, True), backend="aot_eager", implementations={"norm": "torch"}
    )
    expected, got = run(make("gemma3_text", torch.float32, True), batch(0)), run(model, batch(0))
    assert relative(flat(expected[2]), flat(got[2])) < 5e-6
    assert [r.implementation for r in norm_graphs(model)[0].rewrites] == ["torch"]


@pytest.mark.parametrize("asked", [{}, {"norm": "op"}, {"norm": "torch"}], ids=str)
def test_the_estimate_counts_it_in_the_form_that_runs(asked, monkeypatch):
    """On a GPU the operation is fused; torch code is not, though Inductor compiles it."""
    honest = planning.computed_norm
    monkeypatch.setattr(planning, "computed_norm", lambda where, form: honest(torch.device("cuda"), form))
    model = fastft.compile(make("llama", torch.float32, True), backend="eager", implementations=asked)
    assert get_state(model).compiled.planned.setup.norm == ("reference" if "torch" in asked.values() else "fused")
    assert honest(torch.device("cpu"), "op") == honest(torch.device("cpu"), "torch") == "reference"


def with_layer_norms(last):
    """Return a model whose last norm is `last()`, and the same model compiled."""
    models = [make("llama", torch.float32, True, hidden_size=72) for _ in range(2)]
    for model in models:
        base = base_model(model)
        base.model.norm = last()
        point = NormPoint(("LayerNorm",), kind="layer", eps="eps")
        spec = find(base.config)
        update_state(base, spec=evolve(spec, norms=(*spec.norms, point)))
    return models[0], fastft.compile(models[1], backend="eager")


def bare(epsilon=1e-5):
    return torch.nn.LayerNorm(72, eps=epsilon, elementwise_affine=False)


def test_one_without_a_weight_is_known_and_replaced():
    """Nothing in its graph names it: no parameter, and no module within it."""
    eager, model = with_layer_norms(bare)
    expected, got = run(eager, batch(0)), run(model, batch(0))
    assert relative(expected[0], got[0]) < 2e-6 and relative(flat(expected[2]), flat(got[2])) < 5e-6
    (done,) = norm_graphs(model)[0].rewrites
    assert (done.module, done.applied) == ("model.norm", True)
    assert get_state(model).compiled.planned.setup.norm == "reference"


def test_each_of_several_without_weights_is_known_and_replaced():
    """Their graphs look alike; each is its own norm's."""
    eager, model = with_layer_norms(lambda: torch.nn.Sequential(bare(), torch.nn.LayerNorm(72), bare(), bare(1e-2)))
    expected, got = run(eager, batch(0)), run(model, batch(0))
    assert relative(expected[0], got[0]) < 2e-6 and relative(flat(expected[2]), flat(got[2])) < 5e-6
    graphs = [graph for graph in fastft.report(model).graphs if graph.unit == "LayerNorm"]
    done = [(rewrite.module, rewrite.applied) for graph in graphs for rewrite in graph.rewrites]
    assert done == [(f"model.norm.{index}", True) for index in range(4)]
    assert get_state(model).compiled.planned.setup.norm == "reference"


def test_it_runs_as_it_is_where_the_layers_do():
    model, inputs = compiled(), batch(0)
    norm = base_model(model).model.norm
    x = torch.randn(2, 5, 64)

    def untouched():
        return torch.equal(norm(x), norm._call_impl(x)) and not norm_graphs(model)

    assert untouched()  # no layer has run
    with torch.no_grad():
        model(**inputs, use_cache=False)  # a probe
        model.eval()
        model.generate(input_ids=inputs["input_ids"][:, :8], max_new_tokens=3, do_sample=False, use_cache=True)
    model.train()
    with uncompiled(model):
        run(model, inputs)
    with pytest.warns(UserWarning, match="use_cache=False"):
        model(**inputs, use_cache=True)
    assert untouched()
    run(model, inputs)
    assert len(norm_graphs(model)) == 1
    with torch.inference_mode():
        norm(x)
    with torch.no_grad():
        norm(x)
    model.eval()(**inputs, use_cache=False)
    assert len(fastft.report(model).graphs) == 3
    uncompile(model)
    assert norm._compiled_call_impl is None


def test_a_spec_that_is_wrong_about_it_is_refused_and_it_stays_what_it_was():
    """Offset 1 where the model has none; llama's other norms are of the same class and refused as well."""
    model, eager = make("llama", torch.float32, True), make("llama", torch.float32, True)
    spec = find(base_model(model).config)
    update_state(base_model(model), spec=evolve(spec, norms=(evolve(spec.norms[0], offset=1.0),)))
    model = fastft.compile(model, backend="eager")
    planned = get_state(model).compiled.planned
    assert planned.setup.norm == "reference"
    expected, got = run(eager, batch(0)), run(model, batch(0))
    assert relative(flat(expected[2]), flat(got[2])) < 5e-6
    assert "left as it was: norm model.norm: differs from the module" in str(fastft.report(model))
    assert planned.setup.norm == "eager"


def test_a_norm_that_is_trained_beside_adapters():
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        base = tiny_model("gemma")
        base.set_attn_implementation("eager")
        config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"], task_type="CAUSAL_LM")
        models.append(get_peft_model(base, config).train())
    model = fastft.compile(models[1], backend="eager")
    expected, got = run(models[0], batch(0)), run(model, batch(0))
    assert any("norm.modules_to_save" in name for name in got[2]) and got[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        assert gradient.norm() == got[2][name].norm() == 0 or relative(gradient, got[2][name]) < 5e-6
    assert [r.module for r in norm_graphs_of(model)] == ["model.norm.modules_to_save.default"]


def norm_graphs_of(model):
    return [r for graph in fastft.report(model).graphs if graph.unit == "GemmaRMSNorm" for r in graph.rewrites]


def test_one_that_cannot_be_traced_runs_as_it_is_and_is_told():
    eager, model = make("llama", torch.float32, True), compiled()
    norm, seen = base_model(model).model.norm, []

    @torch._dynamo.disable
    def look(*_):
        seen.append(1)

    norm.register_forward_pre_hook(look)
    with pytest.warns(UserWarning, match="a norm outside the layers runs uncompiled: Dynamo cannot trace it"):
        got = run(model, batch(0))
    expected = run(eager, batch(0))
    assert relative(flat(expected[2]), flat(got[2])) < 5e-6 and seen
    assert any("1 training calls of a norm outside the layers ran uncompiled" in n for n in fastft.report(model).notes)
    assert get_state(model).compiled.planned.setup.norm == "eager"
