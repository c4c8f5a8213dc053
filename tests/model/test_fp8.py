"""Linears held in fp8: the numbers of the dequantised model, in training, generation, merging, saving and loading."""

import copy

import pytest
import torch
from torch import nn

import fastft
from fastft.errors import UsageError
from fastft.model.fp8_linear import Fp8Linear
from fastft.model.load import load
from fastft.train import step

IDS = torch.tensor([[1, 7, 20, 33, 150, 260, 9, 12, 40, 77], [1, 8, 21, 34, 151, 261, 10, 13, 41, 78]])


def held(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Fp8Linear)}


def dense_twin(model, folder, **lora):
    """Return the same model with the dequantised weights in fp32."""
    other, _ = load(folder, dtype="float32")
    if lora:
        other = fastft.add_lora(other, **lora)
        other.load_state_dict({n: p for n, p in model.state_dict().items() if "lora_" in n}, strict=False)
    for name, module in held(model).items():
        other.get_submodule(name).weight.data.copy_(module.dequantized(torch.float32))
    return other


def step_of(model):
    model.train().zero_grad()
    loss = step.loss(model, {"input_ids": IDS.to(model.device), "labels": IDS.to(model.device)})
    loss.backward()
    return loss.detach(), {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


def test_what_is_held(tiny):
    folder = tiny("qwen2")  # with biases
    model, _ = load(folder, quant="fp8", dtype="bfloat16")
    plain, _ = load(folder, dtype="float32")
    layers = held(model)
    assert len(layers) == 14 and type(model.get_output_embeddings()) is nn.Linear
    assert fastft.state.get_state(model).quant == "fp8"
    for name, module in layers.items():
        want = plain.get_submodule(name)
        assert module.weight.dtype == torch.uint8 and not any(p.requires_grad for p in module.parameters())
        largest = want.weight.abs().amax(1)
        assert torch.allclose(module.weight_scale, largest.bfloat16().float() / 448, rtol=1e-6)
        off = (module.dequantized(torch.float32) - want.weight).norm() / want.weight.norm()
        assert 0.01 < off < 0.035
        assert (module.bias is None) is (want.bias is None)
    scale = next(iter(layers.values())).weight_scale.clone()
    model.to(torch.float16)
    assert next(iter(layers.values())).weight_scale.dtype == torch.float32
    assert torch.equal(next(iter(layers.values())).weight_scale, scale)


@pytest.mark.parametrize("compute", [None, "exact", "fp8"])
def test_gradients_are_those_of_the_dequantised_model(tiny, compute, rms):
    folder = tiny()
    on_gpu = compute == "fp8" and torch.cuda.is_available()  # whose fp8 products give bfloat16 alone
    model, tokenizer = load(folder, quant="fp8", dtype="bfloat16" if on_gpu else "float32")
    model = fastft.add_lora(model, r=4, init=False)
    assert fastft.generate(model, tokenizer, "The quick", max_new_tokens=4) is not None
    want = step_of(dense_twin(model, folder, r=4, init=False))
    if compute:
        fastft.compile(model, backend="eager", compute=compute)
    got = step_of(model)
    assert got[1].keys() == want[1].keys() and len(want[1]) == 28
    gradients = [torch.cat([g.flatten() for g in made[1].values()]) for made in (got, want)]
    if compute == "fp8":
        assert 1e-3 < rms(*gradients) < 0.2 and abs(got[0] - want[0]) < 0.02 * want[0]
        assert len(fastft.report(model).in_fp8()) == 14 and fastft.report(model).not_in_fp8() == ()
    else:
        assert rms(*gradients) < 1e-5 and abs(got[0] - want[0]) < 1e-5
    if compute:
        assert not fastft.report(model).refused()


def test_merge_save_and_load(tiny, tmp_path, rms):
    folder = tiny()
    model, _ = load(folder, quant="fp8", dtype="float32")
    model = fastft.add_lora(model, r=4, init=False)
    twin = dense_twin(model, folder, r=4, init=False).eval()
    ids = IDS.to(model.device)
    with torch.no_grad():
        want = twin(ids).logits
        assert rms(model.eval()(ids).logits, want) < 1e-5
    fastft.merge(model, tmp_path / "merged", precision="fp32")
    merged, _ = load(tmp_path / "merged", dtype="float32")
    assert not any("weight_scale" in name for name in merged.state_dict())
    model.save_pretrained(tmp_path / "adapter")
    again, _ = load(tmp_path / "adapter", quant="fp8", dtype="float32")
    assert len(held(again)) == 14
    with torch.no_grad():
        assert rms(merged(ids).logits, want) < 1e-5
        assert torch.equal(again.eval()(ids).logits, model(ids).logits)


def test_pefts_own_merge_is_refused_and_names_ours(tiny):
    """It would add into the bytes, or with safe_merge cast the adapter to bytes, which leaves nothing of it."""
    model, _ = load(tiny(), quant="fp8", dtype="float32")
    model = fastft.add_lora(model, r=4, init=False)
    before = {name: module.weight.detach().clone() for name, module in held(model).items()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        for safe in (False, True):
            with pytest.raises(UsageError, match=r"fastft\.merge\(model, folder\)"):
                merge(safe_merge=safe)
    assert all(torch.equal(module.weight, before[name]) for name, module in held(model).items())
    with torch.no_grad():
        assert model(IDS.to(model.device)).logits.isfinite().all()


def test_bytes_are_not_numbers(tiny):
    """What computes with them, or writes to what only stands for the weight, is refused and changes nothing."""
    model, _ = load(tiny(), quant="fp8", dtype="float32")
    layer = next(iter(held(model).values()))
    before, ones = layer.stored.detach().clone(), torch.ones(layer.weight.shape, device=model.device)

    def assign(value):
        layer.weight.data = value

    def write(weight):
        weight[0] = 1

    refused = {
        "data": lambda: assign(ones),
        "data of bytes": lambda: assign(before.flip(0)),
        "merged": lambda: assign(layer.weight.data + ones.byte()),
        "added": lambda: layer.weight + ones,
        "added from the right": lambda: ones + layer.weight,
        "cast": lambda: layer.weight.to(torch.bfloat16),
        "copied into numbers": lambda: ones.copy_(layer.weight),
        "norm": lambda: torch.linalg.norm(layer.weight.float(), dim=1),
        "product": lambda: nn.functional.linear(ones, layer.weight.float()),
        "in place": lambda: layer.weight.sub_(1),
        "zeroed": lambda: nn.init.zeros_(layer.weight),
        "an item": lambda: write(layer.weight.data),
    }
    for name, attempt in refused.items():
        with pytest.raises(UsageError, match="expected weights that are numbers"):
            attempt()
        assert torch.equal(layer.stored, before), name
    weight = layer.weight
    assert torch.equal(weight.data, before) and weight.clone().cpu().view(-1).numel() == before.numel()
    assert (weight == before).all() and weight.to("meta").is_meta and "uint8" in repr(weight)
    assert weight.dtype == torch.uint8 and not weight.requires_grad and weight.shape == ones.shape


def test_pefts_own_dora_is_refused(tiny):
    from peft import LoraConfig, get_peft_model

    model, _ = load(tiny(), quant="fp8", dtype="float32")
    with pytest.raises(UsageError, match="DoRA"):
        get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))


def test_a_copy_and_a_pickle_hold_the_same_bytes(tiny, tmp_path):
    model, _ = load(tiny(), quant="fp8", dtype="float32")
    layer = next(iter(held(model).values()))
    torch.save(layer, tmp_path / "layer.pt")
    for other in (copy.deepcopy(layer), torch.load(tmp_path / "layer.pt", weights_only=False)):
        assert [name for name, _ in other.named_parameters()] == [name for name, _ in layer.named_parameters()]
        assert type(other.stored) is nn.Parameter and not other.stored.requires_grad
        assert torch.equal(other.weight, layer.weight) and torch.equal(other.weight_scale, layer.weight_scale)
        other.to("meta")
        assert other.weight.is_meta and not layer.weight.is_meta
        other = other.to_empty(device=layer.weight.device)
        other.load_state_dict(layer.state_dict())
        ones = torch.ones(1, layer.in_features, device=model.device)
        assert torch.equal(other(ones), layer(ones))


def test_what_is_refused(tiny):
    with pytest.raises(UsageError, match="device: expected one device with quant='fp8', got 'auto'"):
        load(tiny(), quant="fp8", device="auto")
    with pytest.raises(UsageError, match="quant='fp8'"):
        load(tiny(), quant="fp8", full=True)
    model, _ = load(tiny(), quant="fp8")
    with pytest.raises(UsageError, match="dora: expected False on a model in fp8, got True"):
        fastft.add_lora(model, dora=True)
    with pytest.raises(UsageError, match="init: expected True or 'gaussian' on a model in fp8, got 'olora'"):
        fastft.add_lora(model, init="olora")
    with pytest.raises(UsageError, match=r"init: expected .* on a model in fp8, got 'pissa'"):
        fastft.add_lora(model, init="pissa")


def test_a_run_is_saved_and_resumed(tiny, tmp_path):
    """Two steps and a third after loading the adapter again: the curve of three steps at once."""
    folder = tiny()
    rows = [{"prompt": f"two and {n}", "completion": f" are {n + 2}"} for n in range(12)]
    options = {"batch_size": 4, "learning_rate": 1e-2, "schedule": "constant", "save_every": 1, "compile": False}

    def run(model, tokenizer, place, steps, **more):
        return fastft.sft(model, tokenizer, rows, output_dir=tmp_path / place, steps=steps, **options, **more)

    def fresh():
        model, tokenizer = load(folder, quant="fp8", dtype="float32")
        return fastft.add_lora(model, r=4), tokenizer

    whole = run(*fresh(), "whole", 3)
    run(*fresh(), "halted", 2)
    resumed = run(*load(tmp_path / "halted", quant="fp8", dtype="float32"), "halted", 3, resume=True)
    assert whole.record["model"]["quant"] == "fp8" and whole.losses[0] != whole.losses[2]
    assert resumed.losses == whole.losses
