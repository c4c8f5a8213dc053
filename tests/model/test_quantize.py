"""4-bit weights stay as loaded: evaluating before training changes no gradient."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import fastft
from fastft.errors import LoadError
from fastft.graph.capture import quant_state_tensors
from fastft.kernels.lora.gemm import dense
from fastft.kernels.nf4.ref import block_scales
from fastft.model import quantize
from fastft.model.adapters import add_lora
from fastft.model.generate import generate
from fastft.model.load import load
from fastft.model.quantize import dequantized_4bit
from fastft.state import get_state

IDS = torch.tensor([[1, 7, 20, 33, 150, 260, 9, 12, 40, 77], [1, 8, 21, 34, 151, 261, 10, 13, 41, 78]])


def bnb_linears(model):
    from bitsandbytes.nn import Linear4bit

    return [m for m in model.modules() if isinstance(m, Linear4bit)]


def gradients(model):
    """Gradients of eight small batches side by side [8, n]: one bf16 rounding may be lucky, eight are not."""
    model.train()
    found = {n: [] for n, p in model.named_parameters() if p.requires_grad}
    for batch in torch.randint(0, 290, (8, 2, 10), generator=torch.Generator().manual_seed(0)):
        model.zero_grad()
        model(batch, labels=batch).loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                found[name].append(parameter.grad.double().flatten())
    return {name: torch.stack(grads) for name, grads in found.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "phi3"])
def test_gradients_after_evaluation_are_those_of_the_dequantised_model(tiny, family, dtype, rms):
    import bitsandbytes as bnb

    folder = tiny(family)
    model, tokenizer = load(folder, quant="nf4", dtype=dtype)
    model = add_lora(model, r=4, init=False)
    packed = [m.weight.data.clone() for m in bnb_linears(model)]
    model.eval()
    with torch.no_grad():
        model(IDS)
        model(IDS[:1, :1])
    generate(model, tokenizer, ["The quick", "A model reads"], max_new_tokens=4)
    for module, bits in zip(bnb_linears(model), packed, strict=True):
        assert torch.equal(module.weight.data, bits)
    got = gradients(model)

    def dense(dtype):
        other, _ = load(folder, dtype=dtype)
        other = add_lora(other, r=4, init=False)
        other.load_state_dict({n: p for n, p in model.state_dict().items() if "lora_" in n}, strict=False)
        for name, module in model.named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                other.get_submodule(name).weight.data.copy_(weight)
        return gradients(other)

    true, same_dtype = dense("float32"), dense(dtype)
    assert got.keys() == true.keys() and got

    def whole(grads):
        return torch.cat([grads[name].flatten() for name in true])

    # The budget is the error of the dense model in the same dtype; two computations that round differently may differ
    # by a third over all, and by more in one small tensor. Repacked weights are off by 0.9.
    assert rms(whole(got), whole(true)) < max(1e-5, 1.33 * rms(whole(same_dtype), whole(true)))
    for name, grad in got.items():
        assert rms(grad, true[name]) < max(2e-5, 2 * rms(same_dtype[name], true[name])) < 0.3, name


def test_every_layer_is_told_not_to_repack(tiny):
    """The mechanism, which holds on CPUs that would not repack anyway."""
    model, _ = load(tiny(), quant="nf4")
    layers = bnb_linears(model)
    assert len(layers) == 14 and not any(m.support_avx512bf16_for_cpu for m in layers)
    add_lora(model, r=4)
    assert not any(m.support_avx512bf16_for_cpu for m in bnb_linears(model))


def test_the_class_is_left_alone(tiny):
    from bitsandbytes.functional import has_avx512bf16
    from bitsandbytes.nn import Linear4bit

    before = dict(vars(Linear4bit))
    load(tiny(), quant="nf4")
    assert dict(vars(Linear4bit)) == before
    assert Linear4bit(64, 64).support_avx512bf16_for_cpu == has_avx512bf16()


def test_a_bitsandbytes_that_repacks_all_the_same_is_refused(tiny, monkeypatch):
    from bitsandbytes.nn import Linear4bit

    forward = Linear4bit.forward

    def repacking(self, x):
        out = forward(self, x)
        if not self.training:
            self.weight.data = self.weight.data.flip(0)
        return out

    monkeypatch.setattr(Linear4bit, "forward", repacking)
    with pytest.raises(LoadError, match="repacks 4-bit weights"):
        load(tiny(), quant="nf4")


def test_repacked_weights_are_refused(tiny):
    model, _ = load(tiny(), quant="nf4")
    bnb_linears(model)[3].weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(LoadError, match=r"model\.layers\.0.*repacked for inference"):
        quantize.keep_weights_unpacked(model)


def test_16bit_modules_follow_the_spec():
    from fastft.registry.spec import HeadPoint, ModelSpec

    spec = ModelSpec(name="x", model_types=("x",), layer_classes=("X",), keep_16bit=("router",), head=HeadPoint("head"))
    config = quantize.config_for("nf4", torch.bfloat16, spec)
    assert config.llm_int8_skip_modules == ["head", "router"]
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert quantize.config_for("int8", torch.float16, spec).load_in_8bit


def test_int8_gradients_are_the_same_after_evaluation(tiny, rms):
    folder = tiny("qwen2")

    def start():
        return add_lora(load(folder, quant="int8", dtype="float32")[0], r=4, init=False)

    fresh, asked = start(), start()
    tokenizer = load(folder)[1]
    asked.eval()
    with torch.no_grad():
        asked(IDS)
    generate(asked, tokenizer, ["The quick", "A model reads"], max_new_tokens=4)
    expected, got = gradients(fresh), gradients(asked)
    assert got.keys() == expected.keys() and got
    assert all(rms(got[name], expected[name]) < 1e-6 for name in got)


def test_layers_that_bitsandbytes_multiplies_wrongly_are_told(tiny, monkeypatch):
    """Which are wrong hangs on the CPU; what is told is what differs."""
    from bitsandbytes import functional

    real = functional.dequantize_4bit

    def faulty(packed, state, *rest, **options):
        made = real(packed, state, *rest, **options)
        return made + 1 if len(state.shape) == 2 and state.shape[1] == 96 else made

    def sound(packed, state):
        flat = copy.copy(state)
        flat.shape = torch.Size([state.shape.numel()])
        return real(packed, flat).view(state.shape)

    def notes(**sizes):
        model, _ = load(tiny(**sizes), quant="nf4", device="cpu", dtype="bfloat16")
        return [note for note in get_state(model).notes if "wrongly on this CPU" in note]

    monkeypatch.setattr(functional, "dequantize_4bit", faulty)
    (told,) = notes(intermediate_size=96)
    assert (
        "multiplies 2 of the 4-bit layers" in told and "layers.0.mlp.down_proj, model.layers.1.mlp.down_proj)" in told
    )
    assert told.endswith("Load the model on a GPU, or its 16-bit checkpoint with quant=None, where they are used.")
    assert notes() == []
    monkeypatch.setattr(functional, "dequantize_4bit", sound)
    assert notes(intermediate_size=96) == []


@pytest.mark.parametrize("quant", ["nf4", "fp4"])
@pytest.mark.parametrize(("n", "k"), [(64, 96), (7, 96), (16, 4304), (64, 64), (3, 5)])
def test_rows_of_any_length_are_dequantised_as_their_blocks_say(quant, n, k):
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type=quant)
    scales = block_scales(state.absmax, state.state2.code, state.state2.absmax, state.offset)
    nibbles = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten()[: n * k].long()
    expected = state.code[nibbles] * scales.repeat_interleave(64)[: n * k]
    assert torch.allclose(dequantized_4bit(packed, state), expected.view(n, k), rtol=1e-6, atol=0)


def test_a_merge_on_a_cpu_has_the_numbers_that_the_blocks_hold(tiny, tmp_path):
    model, _ = load(tiny(intermediate_size=96), quant="nf4", device="cpu", dtype="bfloat16")
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    expected = dense(layer.weight.data, list(quant_state_tensors(layer).values()), 64, 96, torch.bfloat16).float()
    fastft.merge(model, tmp_path / "merged", precision="fp32")
    merged, _ = load(tmp_path / "merged", dtype="float32", device="cpu")
    assert torch.equal(merged.get_submodule("model.layers.0.mlp.down_proj").weight, expected)


def test_a_checkpoint_stored_in_4_bits_computes_in_the_dtype_asked_for(tiny, tmp_path):
    """Not in the one that it names: a GPU here need not have that of its maker's."""
    folder, ids = tiny(), torch.tensor([[1, 5, 9, 30]])
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                  bnb_4bit_compute_dtype=torch.bfloat16)  # fmt: skip
    given = {"quantization_config": settings, "device_map": {"": "cpu"}, "dtype": torch.float32}
    AutoModelForCausalLM.from_pretrained(folder, **given).save_pretrained(tmp_path / "stored")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "stored")
    made = []
    for where, quant in ((folder, "nf4"), (tmp_path / "stored", None)):
        model, _ = load(where, quant=quant, dtype="float32", device="cpu")
        with torch.no_grad():
            made.append(model(ids).logits)
    assert torch.allclose(*made, rtol=0, atol=1e-5)
