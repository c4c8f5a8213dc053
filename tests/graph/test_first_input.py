"""The first layer's input needs no gradient: one capture serves it and all others, and none is computed for it."""

from contextlib import contextmanager

import pytest
import torch
from tiny import batch, make, run, with_lora
from torch._dynamo.utils import counters
from torch.multiprocessing.reductions import StorageWeakRef

import fastft
from fastft.graph.attention import only_causal
from fastft.graph.compile import decoder_layers
from fastft.graph.first_input import FirstInput, structure
from fastft.graph.twin import tiny_model
from fastft.graph.uncompiled_calls import NOT_AS_PLANNED
from fastft.registry.resolve import find
from fastft.state import base_model
from fastft.train import step


def compiled(apart=False, backend="aot_eager", **changes):
    """Return a compiled model; with `apart` its first layer has a hook, so that its input is shown as it is."""
    model = make("llama", torch.float32, True, num_hidden_layers=4, **changes)
    if apart:
        layers_of(model)[0].register_forward_pre_hook(lambda module, args: None)
    return fastft.compile(model, backend=backend)


def layers_of(model):
    base = base_model(model)
    return decoder_layers(base, find(base.config))


def captured():
    return counters["stats"]["unique_graphs"]


@pytest.fixture
def shown(monkeypatch):
    """Return a list that fills with the inputs that are shown as ones that need a gradient."""
    inputs, of = [], FirstInput.of

    @contextmanager
    def watched(self, *given):
        with of(self, *given) as arguments:
            inputs.extend([] if self.shown is None else [self.shown])
            yield arguments

    monkeypatch.setattr(FirstInput, "of", watched)
    return inputs


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_one_capture_gives_the_bits_of_two(shown, autocast):
    results, counts, reports = [], [], []
    for apart in (True, False):
        model, before = compiled(apart), captured()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results.append(run(model, batch(0)))
        counts.append(captured() - before)
        reports.append(fastft.report(model))
    # Two of layers and the norm's; one of layers and the norm's.
    assert counts == [3, 2] and len(shown) == 1
    assert [graph.unit for graph in reports[1].graphs] == ["LlamaDecoderLayer"] * 2 + ["LlamaRMSNorm"]
    assert reports[0].applied() == reports[1].applied() and reports[1].refused() == ()
    (logits, loss, gradients), (ours, our_loss, our_gradients) = results
    assert torch.equal(logits, ours) and torch.equal(loss, our_loss) and gradients.keys() == our_gradients.keys()
    assert all(torch.equal(gradient, our_gradients[name]) for name, gradient in gradients.items())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_no_gradient_is_computed_for_it(shown, backend):
    model = compiled(backend=backend)
    for index in range(2):
        run(model, batch(index))
    assert [(tensor.requires_grad, tensor.grad) for tensor in shown] == [(True, None)] * 2


def test_lengths_that_vary_keep_both_forms(shown):
    eager, model = make("llama", torch.float32, True, num_hidden_layers=4), compiled()
    for index, length in enumerate((37, 24, 51)):
        expected, got = run(eager, batch(index, length=length)), run(model, batch(index, length=length))
        for name, gradient in expected[2].items():
            assert (got[2][name] - gradient).norm() <= 5e-6 * gradient.norm()
    assert len(shown) == 3 and all(tensor.grad is None for tensor in shown)


def test_layers_of_one_structure_are_told_from_others():
    layers = layers_of(make("llama", torch.float32, True, num_hidden_layers=3))
    assert structure(layers[0]) == structure(layers[1]) == structure(layers[2])
    next(layers[1].parameters()).requires_grad_(True)
    layers[2].self_attn.scaling *= 2
    assert structure(layers[0]) != structure(layers[1]) and structure(layers[0]) != structure(layers[2])


def test_every_structure_of_layers_has_its_own_room_for_captures():
    """Dynamo keeps 8 captures of one: with a second for lengths that vary, that is 4 structures of layers."""
    structures, layers = 6, 8
    ranks = {f"model.layers.{index}.self_attn.q_proj": 2 + index % structures for index in range(layers)}
    models = []
    for _ in range(2):
        base = tiny_model("llama", num_hidden_layers=layers)
        base.set_attn_implementation("eager")
        models.append(with_lora(base, torch.float32, rank_pattern=ranks).train())
    eager, model = models[0], fastft.compile(models[1], "min", backend="aot_eager")
    for index, length in enumerate((13, 17)):
        expected, got = run(eager, batch(index, length=length)), run(model, batch(index, length=length))
        for name, gradient in expected[2].items():
            assert (got[2][name] - gradient).norm() <= 5e-6 * gradient.norm()
    report = fastft.report(model)
    assert report.notes == () and sum(graph.unit == "LlamaDecoderLayer" for graph in report.graphs) >= 2 * structures
    assert report.modes == "8 layers min"


def test_layers_that_run_uncompiled_are_said_to_keep_more_than_the_plan_says():
    model = make("llama", torch.float32, True, num_hidden_layers=2)
    fastft.compile(model, "min", backend="eager", dynamic=False)
    with (
        torch._dynamo.config.patch(recompile_limit=2),
        pytest.warns(UserWarning, match="differ in more ways than the 2"),
    ):
        for length in (5, 6, 7):
            run(model, batch(0, length=length))
        # The norm behind them has its own room, and is not compiled where the layers are not.
        calls, layers = fastft.report(model).notes
    assert calls.startswith(
        "2 training calls of a layer ran uncompiled: its calls differ in more ways than the 2 captures"
    )
    assert layers == NOT_AS_PLANNED.format(2, 2) and "more than the memory plan" in layers


def test_what_is_said_of_lengths_is_said_of_the_input_that_is_shown(shown):
    """Rows laid end to end are captured once for all lengths: another length adds no capture."""
    model = compiled()
    counts = []
    for index, length in enumerate((40, 56, 72)):
        before = captured()
        inputs = batch(index, rows=1, length=length)
        offsets = torch.tensor([0, 17, length], dtype=torch.int32)
        positions = torch.cat([torch.arange(17), torch.arange(length - 17)])[None]
        hidden = model.get_base_model().model(
            inputs["input_ids"], position_ids=positions, attention_mask=only_causal(torch.device("cpu")),
            cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, max_length_q=64, max_length_k=64,
            lengths_vary=True, use_cache=False,
        ).last_hidden_state  # fmt: skip
        hidden.square().sum().backward()
        counts.append(captured() - before)
    assert counts == [2, 0, 0] and len(shown) == 3


@pytest.mark.parametrize("hook", ["register_forward_pre_hook", "register_forward_hook", "register_full_backward_hook"])
def test_hooks_of_the_layer_see_what_the_model_hands_it(shown, hook):
    model, seen = make("llama", torch.float32, True, num_hidden_layers=4), []
    first = layers_of(model)[0]
    getattr(first, hook)(lambda module, args, *_: seen.append(args[0].requires_grad if args[0] is not None else None))
    fastft.compile(model, backend="aot_eager")
    run(model, batch(0))
    assert shown == [] and set(seen) == {None if hook == "register_full_backward_hook" else False}


def test_frozen_layers_in_front_have_no_form_that_is_never_run(shown):
    model = make("llama", torch.float32, True, num_hidden_layers=4)
    eager = make("llama", torch.float32, True, num_hidden_layers=4)
    for one in (model, eager):
        for layer in layers_of(one)[:2]:
            layer.requires_grad_(False)
    fastft.compile(model, backend="aot_eager")
    expected, got = run(eager, batch(0)), run(model, batch(0))
    # One of the frozen ones, and both forms of those behind them.
    units = [graph.unit for graph in fastft.report(model).graphs]
    assert units == ["LlamaDecoderLayer"] * 3 + ["LlamaRMSNorm"] and len(shown) == 1
    for name, gradient in expected[2].items():
        assert (got[2][name] - gradient).norm() <= 5e-6 * gradient.norm()


def test_an_input_that_needs_no_gradient_any_more_is_captured_anew(shown):
    model = compiled()
    model.enable_input_require_grads()
    run(model, batch(0))
    assert shown == []
    model.disable_input_require_grads()
    run(model, batch(1))
    assert len(shown) == 1 and shown[0].grad is None


def test_nothing_but_what_is_saved_holds_the_first_layers_input(shown):
    """The shown input's place in the autograd graph would hold it to the end of the backward, wherever else it is."""
    model, held = compiled(), []
    base_model(model).get_input_embeddings().register_forward_hook(
        lambda module, args, output: held.append(StorageWeakRef(output.untyped_storage()))
    )
    step.loss(model, batch(0)).backward()
    shown.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda packed: packed):
        loss = step.loss(model, batch(0))
        shown.clear()
    assert loss.requires_grad and held[1].expired()
