"""The first calls of fused operations: those that training makes, without a trace in the model."""

import contextlib
import copy
import subprocess
import sys
import threading

import pytest
import torch
from tiny import FAMILIES, batch, in_nf4, make, with_lora

import fastft
from fastft.graph import compile as compiling
from fastft.graph import first_calls as module
from fastft.graph.ahead import Ahead, make_ahead
from fastft.graph.compile import wait_ahead
from fastft.graph.first_calls import first_calls
from fastft.graph.twin import tiny_model
from fastft.state import base_model, get_state
from fastft.train import step


def operations(function):
    """Return the names of fastft's own operations that ran in `function()`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        function()
    return {event.key for event in seen.key_averages() if event.key.startswith("fastft::")}


def made_by(calls):
    return operations(lambda: [call() for call in calls])


def calls_of(model, plan="keep", **options):
    model = fastft.compile(model, plan=plan, backend="eager", **options)
    compiled, base = get_state(model).compiled, base_model(model)
    given = (base, compiled.spec, compiled.layers[0], compiled.norms, compiled.backend.settings)
    return first_calls(model, *given, compiled.fp8_head)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_calls_are_those_of_a_training_step(family):
    model = make(family, torch.bfloat16, True)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    made = made_by(calls_of(model))
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert all(weight.grad is None for weight in model.parameters())
    trained = operations(lambda: step.loss(model, batch(0)).backward())
    assert made and made <= trained
    assert "fastft::linear_cross_entropy" in made and "fastft::scale_gradient" in made
    gated = {"fastft::linears", "fastft::lora_glu_down", "fastft::lora_glu_down_backward"}
    assert made & gated == trained & gated
    alone = {name for name in trained if "norm" in name}
    assert made & alone == alone


def test_those_of_weights_in_nf4_read_them_as_they_are():
    dtype = torch.bfloat16
    model = with_lora(in_nf4(tiny_model("llama", dtype=dtype)), dtype).train()
    bases = [module for name, module in model.named_modules() if name.endswith("mlp.gate_proj.base_layer")]
    packed = [base.weight.clone() for base in bases]
    assert bases[0].weight.dtype == torch.uint8
    assert "fastft::lora_glu_down_backward" in made_by(calls_of(model))
    assert all(torch.equal(base.weight, before) for base, before in zip(bases, packed))


def test_what_is_left_out_is_not_called():
    model = make("llama", torch.bfloat16, True)
    assert made_by(calls_of(model, disable=["feed_forward", "norm"])) == {
        "fastft::linear_cross_entropy", "fastft::scale_gradient",
    }  # fmt: skip
    plain = made_by(calls_of(model, implementations={"feed_forward": "torch", "norm": "torch"}))
    assert plain == {"fastft::linear_cross_entropy", "fastft::scale_gradient"}


@pytest.mark.parametrize(("compute", "plan", "forms", "head"), [
    ("exact", "keep", [(False, False)], True),
    ("exact", "keep+8bit", [(False, False), (False, True)], True),
    ("fp8", "keep", [(True, False)], True),
    ("fp8+head", "keep+8bit", [(True, False), (True, True)], False),
])  # fmt: skip
def test_they_have_the_forms_that_a_step_has(compute, plan, forms, head, monkeypatch):
    seen, backward = [], []
    monkeypatch.setattr(module.lora_glu, "feed_forward", lambda x, *rest: seen.append(rest[-2:]))
    run = torch.ops.fastft.lora_glu_down_backward

    def watched(dy, kept, *rest):
        backward.append((rest[-1], kept[0].dtype == torch.uint8))
        return run(dy, kept, *rest)

    monkeypatch.setattr(torch.ops.fastft, "lora_glu_down_backward", watched)
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    model = make("llama", torch.bfloat16, True, **sizes)
    made = made_by(calls_of(model, compute=compute, plan=plan))
    assert ("fastft::linears_backward" in made) is (compute != "exact")
    assert seen == backward == forms and ("fastft::linear_cross_entropy" in made) is head


def test_of_many_feed_forwards_of_one_size_one_is_called():
    model = make("llama", torch.bfloat16, True)
    expected = len(calls_of(model))
    layer = get_state(model).compiled.layers[0]
    layer.experts = torch.nn.ModuleList([layer.mlp, *(copy.deepcopy(layer.mlp) for _ in range(3))])
    assert len(calls_of(model)) == expected
    other = make("llama", torch.bfloat16, True, intermediate_size=128)
    layer.shared_expert = base_model(other).model.layers[0].mlp
    assert len(calls_of(model)) == expected + 2


def test_projections_may_have_ranks_of_their_own(monkeypatch):
    ranks = {"gate_proj": 3, "up_proj": 2, "down_proj": 5}
    model = with_lora(tiny_model("llama", dtype=torch.bfloat16), torch.bfloat16, rank_pattern=ranks).train()
    run, seen = torch.ops.fastft.lora_glu_down_backward, []

    def watched(*given):
        seen.append([tuple(tensor.shape) for tensor in given[2:8]])
        return run(*given)

    monkeypatch.setattr(torch.ops.fastft, "lora_glu_down_backward", watched)
    made_by(calls_of(model))
    assert seen == [[(64, 5), (64, 5), (96, 3), (96, 2), (5, 96), (64, 5)]]


def test_there_are_none_in_fp32_nor_on_a_cpu():
    assert calls_of(make("llama", torch.float32, True)) == []
    made = []
    assert make_ahead([lambda: made.append(1)], torch.device("cpu")).threads == () and made == []
    assert get_state(fastft.compile(make("llama", torch.bfloat16, True))).compiled.backend.ahead.threads == ()


def test_compile_makes_them_ahead_for_all_units_and_whoever_needs_them_waits(monkeypatch):
    waits = []

    class Counted(Ahead):
        def join(self):
            waits.append(self)

    ahead, begun = Counted(), []
    monkeypatch.setattr(compiling, "make_ahead", lambda calls, device: begun.append((len(calls), device)) or ahead)
    model = fastft.compile(make("llama", torch.bfloat16, True), plan="keep", backend="eager")
    assert begun == [(4, torch.device("cpu"))] and waits == []
    wait_ahead(model)
    assert waits == [ahead]
    step.loss(model, batch(0)).backward()
    assert len(waits) == 1 + 2 and set(map(id, waits)) == {id(ahead)}  # the graphs of a layer and of the last norm


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("eight_bits", ["", "+8bit"])
def test_after_them_a_step_compiles_none_of_their_kernels(eight_bits):
    from fastft.kernels.linear_ce import triton as loss
    from fastft.kernels.lora_glu import triton as gated
    from fastft.kernels.rms_norm import triton as norm

    kernels = [
        gated.lora_glu_fwd_kernel, gated.lora_glu_bwd_kernel, loss.cross_entropy_kernel, loss.scale_kernel,
        norm.rms_norm_fwd_kernel, norm.rms_norm_bwd_kernel,
    ]  # fmt: skip
    own = 2  # of these the first two have a form of their own for each case, which no other test in the process made

    def compiled():
        caches = (kernel.device_caches[torch.cuda.current_device()][0] for kernel in kernels)
        return [len(cache) for cache in caches]

    sizes = {"hidden_size": 256, "intermediate_size": 576}
    model = with_lora(tiny_model("llama", dtype=torch.bfloat16, **sizes), torch.bfloat16, r=16).cuda().train()
    before, held = compiled(), torch.cuda.memory_allocated()
    fastft.compile(model, plan="keep" + eight_bits, backend="aot_eager")
    wait_ahead(model)
    ahead = compiled()
    assert torch.cuda.memory_allocated() <= held + 2**20  # a workspace of cuBLAS would be 32 MiB
    assert all(now > then for then, now in zip(before[:own], ahead)) and all(ahead)
    step.loss(model, {name: value.cuda() for name, value in batch(0, rows=4, length=256).items()}).backward()
    assert compiled() == ahead


@pytest.fixture
def no_device(monkeypatch):
    """Let threads be started for a GPU where there is none."""
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)


def test_one_that_fails_is_left_to_whoever_needs_it(no_device, monkeypatch):
    ran, told = [], []
    monkeypatch.setattr(threading, "excepthook", told.append)

    def wrong():
        raise RuntimeError("no")

    ahead = make_ahead([wrong, lambda: ran.append(1)], torch.device("cuda"))
    assert len(ahead.threads) == 2
    ahead.join()
    assert ran == [1] and told == [] and ahead.threads == ()


def test_workspaces_are_given_back_once_all_are_done(no_device, monkeypatch):
    events, release = [], threading.Event()
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: events.append("cleared"), raising=False)
    ahead = make_ahead([lambda: (release.wait(60), events.append("done"))], torch.device("cuda"))
    release.set()
    ahead.join()
    ahead.join()
    assert events == ["done", "cleared"]


ENDING = """
import contextlib, threading, torch
from fastft.graph.ahead import make_ahead
torch.cuda.device = lambda _: contextlib.nullcontext()
begun = threading.Event()

def call():
    begun.set()
    x = torch.randn(128, 128, requires_grad=True)
    for _ in range(300):
        torch.autograd.grad((x @ x).sum(), x)

make_ahead([call, call], torch.device("cuda"))
begun.wait()
raise SystemExit(3)
"""


def test_a_process_that_ends_meanwhile_ends_as_it_meant_to():
    run = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True)
    assert run.returncode == 3 and run.stderr == ""
