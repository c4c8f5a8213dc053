"""Adapters of a layer cast together: the bits are those of each operation's own casts, and one operation is left."""

import pytest
import torch
from tiny import batch, flat, in_nf4, run, with_lora
from torch.profiler import ProfilerActivity, profile

import fastft
from fastft.graph import joint
from fastft.graph.backend import Settings, lower
from fastft.graph.compile import uncompile
from fastft.graph.twin import tiny_model
from fastft.kernels.lora import casts

CPU = [ProfilerActivity.CPU]


def model_of(family="llama", adapters=torch.float32, nf4=False, r=8, plan="keep", backend="aot_eager"):
    torch._dynamo.reset()
    base = tiny_model(family, dtype=torch.bfloat16)
    made = with_lora(in_nf4(base) if nf4 else base, torch.float32, r=r)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapters)
    return fastft.compile(made.train(), plan=plan, backend=backend)


def step(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return run(model, batch(0))


def graphs_of(monkeypatch):
    """Return the list that every joint graph is put on as it is when it is tagged."""
    seen, tag = [], joint.tag
    monkeypatch.setattr(joint, "tag", lambda graph, level: (seen.append(graph), tag(graph, level)))
    return seen


def named(graph, name):
    return [node for node in graph.nodes if getattr(node.target, "_schema", None) and node.target._schema.name == name]


def casts_in(profile):
    """Return how often the operation ran, as the profiler saw it."""
    return sum(event.name == "fastft::cast_matrices" for event in profile.events())


CASES = {
    "llama": {},
    "min": {"plan": "min"},
    "nf4": {"nf4": True},
    "phi3": {"family": "phi3"},  # packed projections
    "gemma2": {"family": "gemma2"},
    "inductor": {"backend": "inductor"},
}


@pytest.mark.parametrize("case", CASES)
def test_the_bits_are_those_of_each_operations_own_casts(case, monkeypatch):
    together = step(model_of(**CASES[case]))
    monkeypatch.setattr(joint, "share_casts", lambda graph: None)
    apart = step(model_of(**CASES[case]))
    assert torch.equal(together[1], apart[1]) and together[2].keys() == apart[2].keys()
    for name, gradient in together[2].items():
        assert torch.equal(gradient, apart[2][name]), name


def test_one_operation_casts_the_adapters_of_a_layer(monkeypatch):
    seen = graphs_of(monkeypatch)
    model = model_of()
    step(model)
    assert len(seen) == 2  # that of the first layer, whose input wants no gradient, and that of the others
    for graph in seen:
        (cast,) = named(graph, "fastft::cast_matrices")
        assert len(cast.args[0]) == 14 and cast.args[1] == torch.bfloat16  # A and B of seven linears
        assert all(matrix.op == "placeholder" and matrix.users.keys() == {cast} for matrix in cast.args[0])
        for name in ("lora_linears", "linears", "lora_glu_down"):
            assert named(graph, f"fastft::{name}") and named(graph, f"fastft::{name}_backward")
            assert all(
                node.kwargs == {"grad_dtype": torch.float32} for node in named(graph, f"fastft::{name}_backward")
            )


@pytest.mark.parametrize("plan", ["keep", "min"])
def test_the_copies_are_made_again_for_the_backward_and_not_kept(plan):
    model, kept = model_of(plan=plan), []
    step(model)
    layers = model.config.num_hidden_layers

    def pack(tensor):
        kept.append((tensor.dtype, tensor.numel()))
        return tensor

    seen = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with seen, torch.autocast("cpu", dtype=torch.bfloat16), profile(activities=CPU) as forward:
        loss = model(**batch(0), use_cache=False).loss
    with profile(activities=CPU) as backward:
        loss.backward()
    assert casts_in(forward) == casts_in(backward) == layers
    adapters = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n) // layers
    assert kept and (torch.bfloat16, adapters) not in kept


def test_what_is_not_cast_or_lies_unaligned_is_left(monkeypatch):
    seen = graphs_of(monkeypatch)
    step(model_of(adapters=torch.bfloat16))
    assert seen and not any(named(graph, "fastft::cast_matrices") for graph in seen)
    seen.clear()
    run(model_of(), batch(0))  # without autocast everything is in bf16 but the adapters
    assert [len(named(graph, "fastft::cast_matrices")) for graph in seen] == [1, 1]


def test_matrices_in_a_row_are_one_without_a_copy():
    flat_ = casts.cast_matrices([torch.randn(2, 8), torch.randn(0, 8), torch.randn(3, 8)], torch.bfloat16)
    a = [flat_[:16].view(2, 8), flat_[16:16].view(0, 8), flat_[16:].view(3, 8)]
    stack, _ = casts.stacked_and_cast(a, [], torch.bfloat16)
    assert stack.data_ptr() == flat_.data_ptr() and torch.equal(stack, torch.cat(a))
    one = flat_[:16].view(2, 8)
    rows = [one[:1].as_strided((1, 8), (1, 1)), one[1:]]  # of a single row any stride is contiguous
    assert torch.equal(casts.stacked_and_cast(rows, [], torch.bfloat16)[0], one)
    for others in ([a[2], a[0]], [a[0], a[2].clone()], [a[0].float(), a[2].float()]):
        made, _ = casts.stacked_and_cast(others, [], torch.bfloat16)
        assert made.data_ptr() != others[0].data_ptr() and torch.equal(made, torch.cat(others).bfloat16())


def test_the_gradients_are_near_those_of_fp64():
    """Through the whole model in bf16: not only the same as apart, but right."""
    truth = model_of().double()
    uncompile(truth)
    wanted = flat(run(truth, batch(0))[2])
    got = flat(step(model_of())[2])
    assert (got - wanted).norm() < 0.05 * wanted.norm()


def test_what_the_pass_does_is_part_of_the_caches_key(monkeypatch):
    keep, other = joint.JointPass("keep").uuid(), joint.JointPass("min").uuid()
    assert keep == joint.JointPass("keep").uuid() != other
    joint.sources_hash.cache_clear()
    monkeypatch.setattr(joint.shared_casts, "__file__", joint.recompute.__file__)  # another text of that file
    assert joint.JointPass("keep").uuid() != keep
    joint.sources_hash.cache_clear()


def test_the_pass_alone_tells_caches_apart(monkeypatch):
    """A tag beside it would be unknown to Inductor's workers, who save under it what later processes look for."""
    seen = []

    def lowering(graph_module, inputs, config_patches):
        seen.append((torch.compiler.config.cache_key_tag, config_patches["joint_custom_pre_pass"].uuid()))
        return graph_module.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lowering)
    with torch.compiler.config.patch(cache_key_tag="the user's"):
        lower(torch.fx.symbolic_trace(torch.nn.Identity()), [torch.ones(2)], Settings(level="min"))
    assert seen == [("the user's", joint.JointPass("min").uuid())]
