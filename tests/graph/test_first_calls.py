"""The first calls of fused operations: those that training makes, without a trace in the model."""

import pytest
import torch
from tiny import FAMILIES, batch, in_nf4, make, with_lora

import fastft
from fastft.graph.first_calls import begin, first_calls
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


def calls_of(model, **options):
    model = fastft.compile(model, plan="keep", backend="eager", **options)
    compiled, base = get_state(model).compiled, base_model(model)
    settings = compiled.backend.settings
    return first_calls(model, base, compiled.spec, compiled.layers[0], compiled.norms, settings)


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
    gated = {"fastft::linears", "fastft::lora_glu_down", "fastft::linears_backward", "fastft::lora_glu_down_backward"}
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


def test_there_are_none_in_fp32_nor_on_a_cpu():
    assert calls_of(make("llama", torch.float32, True)) == []
    made = []
    assert begin([lambda: made.append(1)], torch.device("cpu")) == () and made == []
    assert get_state(fastft.compile(make("llama", torch.bfloat16, True))).compiled.backend.kernels == ()


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
    before = compiled()
    fastft.compile(model, plan="keep" + eight_bits, backend="aot_eager")
    for thread in get_state(model).compiled.backend.kernels:
        thread.join()
    ahead = compiled()
    assert all(now > then for then, now in zip(before[:own], ahead)) and all(ahead)
    step.loss(model, {name: value.cuda() for name, value in batch(0, rows=4, length=256).items()}).backward()
    assert compiled() == ahead


def test_one_that_fails_is_left_to_whoever_needs_it(monkeypatch):
    from fastft.graph import first_calls as module

    monkeypatch.setattr(module.torch.cuda, "device", lambda _: pytest.MonkeyPatch.context())
    ran = []

    def wrong():
        raise RuntimeError("no")

    for thread in begin([wrong, lambda: ran.append(1)], torch.device("cuda")):
        thread.join()
    assert ran == [1]
