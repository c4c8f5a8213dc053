"""Adapters and base layers that no rewrite takes: the model compiles, trains as before, and the report says so."""

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft.tuners.lora.gptq import GPTQLoraLinear
from tiny import batch, flat, relative, run, with_lora
from torch import nn

import fastft
from fastft.graph.passes.lora import obstacle
from fastft.graph.twin import tiny_model
from fastft.train import step


class Packed(nn.Module):
    """A linear as GPTQ and others hold it: integers and no weight."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, None
        self.register_buffer("qweight", (linear.weight.detach() * 1000).round().to(torch.int32))

    def forward(self, x):
        return nn.functional.linear(x, self.qweight.to(x.dtype) / 1000)


def in_packed():
    config = LoraConfig(target_modules="all-linear", r=4)
    model = with_lora(tiny_model("llama"), torch.float32)
    for name, linear in list(model.named_modules()):
        parent, _, last = name.rpartition(".")
        if last.endswith("_proj"):
            made = GPTQLoraLinear(Packed(linear.base_layer), "default", config=config, r=4, lora_alpha=8)
            made.load_state_dict(linear.state_dict(), strict=False)
            setattr(model.get_submodule(parent), last, made)
    return model


def with_adalora():
    config = AdaLoraConfig(target_modules="all-linear", r=4, total_step=100, task_type="CAUSAL_LM")
    return get_peft_model(tiny_model("llama"), config)


OTHERS = {
    "packed": (in_packed, "base layer Packed has no fused form"),
    "adalora": (with_adalora, "the adapter of SVDLinear is no pair of linears and runs as PEFT wrote it"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_no_rewrite_takes_compiles_and_gives_the_plain_loss(name):
    make, why = OTHERS[name]
    torch.manual_seed(0)
    model = make().train()
    inputs = batch(0)
    expected = run(model, inputs)
    fastft.compile(model, backend="aot_eager")
    got = run(model, inputs)
    assert relative(expected[0], got[0]) < 2e-6 and relative(flat(expected[2]), flat(got[2])) < 5e-6
    assert abs(expected[1] - got[1]).item() < 4e-6
    assert abs(expected[1] - step.loss(model, inputs)).item() < 4e-6
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    report = fastft.report(model)
    assert obstacle(layer) == why and "lora" not in report.applied()
    assert why in [refused.reason for refused in report.refused()]


def test_a_term_that_an_adapter_adds_to_the_loss_is_in_the_loss():
    """AdaLoRA's keeps its factors orthogonal; the loss from hidden states alone would be without it."""
    torch.manual_seed(0)
    model, inputs = with_adalora().train(), batch(0)
    expected = model(**inputs, use_cache=False).loss
    assert abs(expected - step.loss(model, inputs)) < 4e-6
    logits = model(**{"input_ids": inputs["input_ids"]}, use_cache=False).logits[:, :-1].flatten(0, 1)
    assert expected > 1.01 * nn.functional.cross_entropy(logits, inputs["labels"][:, 1:].flatten())
    fastft.compile(model, backend="eager")
    assert "adds a term to the loss" in fastft.report(model).head
