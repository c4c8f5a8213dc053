"""Merged checkpoints, read by plain transformers, give the adapter model's logits within the precision's error."""

import copy
import json

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import fastft
from fastft.demo import MODEL_FOLDER
from fastft.errors import UsageError
from fastft.export.encode import decode
from fastft.export.merge import merge, save_adapter
from fastft.export.tensorfile import TensorFile
from fastft.export.weights import weight_source
from fastft.model.quantize import linears_4bit

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.mark.parametrize("quant", [None, "nf4"])
@pytest.mark.parametrize(("precision", "error"), [("fp32", 3e-6), ("fp16", 1e-3), ("bf16", 6e-3)])
def test_plain_transformers_gives_the_adapter_models_logits(quant, precision, error, adapted, tools, tmp_path):
    """The errors are those of rounding each weight once, about four times what they were measured to be."""
    _, logits, relative = tools
    model, tokenizer = adapted(quant)
    want = logits(model)
    report = fastft.merge(model, tmp_path / "out", precision=precision)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.dtype is DTYPES[precision]
    assert relative(want, logits(merged.float())) < error
    assert torch.equal(want, logits(model))  # the model is as it was
    assert len(report.changes) == 35
    read = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert read.chat_template == tokenizer.chat_template
    assert read.get_vocab() == tokenizer.get_vocab()
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.eos_token_id == model.generation_config.eos_token_id


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_is_rounded_once(family, tmp_path, tools):
    _, logits, relative = tools
    model = tiny.make(family, torch.float32, lora=True)
    want = logits(model, vocabulary=250)
    source = weight_source(model)
    expected = {name: source.read(name).to(torch.bfloat16) for name in source.names}
    merge(model, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert set(stored) == set(expected)
    for name, value in expected.items():
        assert torch.equal(stored[name], value), name
    merge(model, tmp_path / "out", precision="fp32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert type(merged).__name__ == type(model.get_base_model()).__name__
    truth = logits(model.double(), vocabulary=250)
    assert relative(truth, logits(merged, vocabulary=250)) < 2 * relative(truth, want)


def test_changes_are_those_of_the_weights(adapted, tmp_path):
    model, _ = adapted("nf4")
    report = merge(model, tmp_path / "out", precision="fp32")
    source = weight_source(model)
    for change in report.changes:
        name = f"{change.module}.weight"
        delta = (source.read(name) - source.read_base(name)).double().abs()
        assert change.largest == pytest.approx(delta.max().item(), rel=1e-6)
        assert change.mean == pytest.approx(delta.mean().item(), rel=1e-6)
        assert change.relative == pytest.approx(
            (delta.norm() / source.read_base(name).double().norm()).item(), rel=1e-6
        )
    assert report.rounding == 0
    assert report.base == "dequantised"
    assert "35 weights" in str(report)
    json.dumps(report.to_dict())


def test_the_bases_differ_by_what_quantisation_took_away(adapted, tools, tmp_path):
    _, logits, relative = tools
    model, _ = adapted("nf4")
    merge(model, tmp_path / "a", precision="fp32")
    merge(model, tmp_path / "b", precision="fp32", base="original")
    saw, original = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in "ab")
    assert relative(logits(model), logits(saw)) < 3e-6
    assert relative(logits(model), logits(original)) > 0.02
    sixteen, _ = fastft.load(MODEL_FOLDER, dtype="float32")
    save_adapter(model, tmp_path / "adapter")
    from peft import PeftModel

    onto = PeftModel.from_pretrained(sixteen, tmp_path / "adapter")
    assert relative(logits(onto), logits(original)) < 3e-6


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_merged_4_bit_loads_in_transformers(quant, adapted, tools, tmp_path):
    _, logits, relative = tools
    model, _ = adapted(quant)
    want = logits(model)
    report = merge(model, tmp_path / "out", precision="nf4")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(merged.lm_head).__name__ == "Linear"
    # what each layer holds is what bitsandbytes makes of the merged weight, and its error is that of 4 bits
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    source = weight_source(model)
    layers = list(linears_4bit(merged))
    assert len(layers) == 35
    for name, layer in layers:
        packed, state = quantize_4bit(source.read(f"{name}.weight"), compress_statistics=True, quant_type="nf4")
        assert torch.equal(layer.weight.data.reshape(-1), packed.reshape(-1))
        held = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert held.dtype == torch.bfloat16
        assert torch.equal(dequantize_4bit(packed, state).bfloat16(), held)
    assert 0.05 < report.rounding < 0.12
    dense = AutoModelForCausalLM.from_config(copy.deepcopy(source.config), dtype=torch.float32)
    dense.load_state_dict({n: quantised(source, n) for n in source.names}, strict=False)
    dense.tie_weights()
    assert relative(logits(dense), logits(merged)) < 0.03  # bitsandbytes computes in bf16
    assert relative(want, logits(merged)) < 0.3


def quantised(source, name):
    """Return a weight as NF4 and bf16 hold it, computed apart from the code under test."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    value = source.read(name)
    if source.weights[name].linear and "lm_head" not in name:
        packed, state = quantize_4bit(value, blocksize=64, compress_statistics=True, quant_type="nf4")
        value = dequantize_4bit(packed, state)
    return value.bfloat16().float()


def test_fp8_is_scaled_by_rows_in_the_layout_of_compressed_tensors(adapted, tools, tmp_path):
    _, logits, relative = tools
    model, _ = adapted("nf4")
    source = weight_source(model)
    report = merge(model, tmp_path / "out", precision="fp8")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    assert stored[name].dtype == torch.float8_e4m3fn
    assert stored[name].shape == source.shape(name)
    assert stored[f"{name}_scale"].shape == (source.shape(name)[0], 1)
    assert stored[f"{name}_scale"].dtype == torch.bfloat16
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16
    # e4m3 has three bits behind the point: half a step is 1/16 of the number, or of the smallest normal one, 2^-6
    true, scale = source.read(name), stored[f"{name}_scale"].float()
    held = decode(name, {key: value for key, value in stored.items() if key.startswith(name)})
    bound = torch.maximum(true.abs(), scale * 2**-6) / 16
    assert ((held - true).abs() <= bound * 1.001).all()
    assert (held.abs().amax(1) >= true.abs().amax(1) * 0.93).all()
    assert 0.02 < report.rounding < 0.03
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["format"] == "float-quantized"
    assert config["ignore"] == ["lm_head"]
    group = config["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"]
    assert (group["weights"]["num_bits"], group["weights"]["type"], group["weights"]["strategy"]) == (
        8,
        "float",
        "channel",
    )
    assert (group["input_activations"]["strategy"], group["input_activations"]["dynamic"]) == ("token", True)
    dense = AutoModelForCausalLM.from_config(copy.deepcopy(source.config), dtype=torch.float32)
    numbers = {n: decode(n, {k: v for k, v in stored.items() if k.startswith(n)}) for n in source.names}
    dense.load_state_dict(numbers, strict=False)
    dense.tie_weights()
    assert relative(logits(model), logits(dense)) < 0.1


def test_fp8_of_empty_and_of_tiny_rows():
    from fastft.export.encode import Encoding

    weight = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    weight[1] = 0
    weight[2] *= 1e-30
    weight[3] *= 1e30
    out = Encoding("fp8", torch.bfloat16).encode("w", weight, quantise=True)
    assert out["w_scale"][1] == 1
    held = decode("w", out)
    assert held[1].eq(0).all()
    for row in (0, 2, 3, 4):
        assert (held[row] - weight[row]).double().norm() / weight[row].double().norm() < 0.05


def test_shards_with_an_index(adapted, tools, tmp_path):
    _, logits, _ = tools
    model, _ = adapted()
    whole, parts = (merge(model, tmp_path / name, shard_bytes=size) for name, size in (("a", 10**9), ("b", 2 * 10**6)))
    assert whole.files == ("model.safetensors",)
    assert len(parts.files) > 3
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(parts.files)
    for file in parts.files[:-1]:
        with safe_open(tmp_path / "b" / file, framework="pt") as shard:
            # one weight may be larger than a file is to be
            size = sum(shard.get_tensor(name).numel() * 2 for name in shard.keys())  # noqa: SIM118
            assert size <= 2 * 10**6 or len(list(shard.keys())) == 1
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in "ab")
    assert torch.equal(logits(first), logits(second))


def test_tensor_file_of_odd_sizes(tmp_path):
    """Sizes that are no multiple of eight bytes go last, so that every tensor can be mapped."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (3,), "b": (5, 7), "c": (8, 8), "d": (1,), "e": (0,), "f": ()}
    kinds = (torch.uint8, torch.bfloat16, torch.float32, torch.float8_e4m3fn)
    values = {
        f"{name}.{number}": torch.randn(shape, generator=generator).mul(100).clamp(0, 200).to(dtype)
        for number, dtype in enumerate(kinds)
        for name, shape in shapes.items()
    }
    planned = {name: (value.dtype, (None,) * value.dim()) for name, value in values.items()}
    with TensorFile(tmp_path / "x.safetensors", planned) as out:
        for name, value in values.items():
            out.add(name, value)
    read = load_file(tmp_path / "x.safetensors")
    assert set(read) == set(values)
    for name, value in values.items():
        assert read[name].dtype == value.dtype
        assert read[name].shape == value.shape
        assert (
            torch.equal(read[name].view(torch.uint8), value.view(torch.uint8)) if value.dim() else read[name] == value
        )
    with pytest.raises(KeyError, match="not written"), TensorFile(tmp_path / "y", planned):
        pass


def test_adapter_only(adapted, tools, tmp_path):
    _, logits, _ = tools
    model, tokenizer = adapted("nf4")
    folder = save_adapter(model, tmp_path / "adapter")
    again, read = fastft.load(folder, quant="nf4", dtype="float32")
    assert torch.equal(logits(model), logits(again))
    assert read.chat_template == tokenizer.chat_template
    copied = save_adapter(folder, tmp_path / "copied")
    again, _ = fastft.load(copied, quant="nf4", dtype="float32")
    assert torch.equal(logits(model), logits(again))
    bare, _ = fastft.load(MODEL_FOLDER)
    with pytest.raises(UsageError, match="carries no adapter"):
        save_adapter(bare, tmp_path / "none")
    with pytest.raises(UsageError, match="holds a whole model"):
        save_adapter(MODEL_FOLDER, tmp_path / "none")


def test_merging_a_folder_is_merging_its_model(adapted, tmp_path):
    model, _ = adapted()
    save_adapter(model, tmp_path / "adapter")
    merge(model, tmp_path / "a")
    report = merge(tmp_path / "adapter", tmp_path / "b")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any("no run.json tells" in note for note in report.notes)
    report = merge(tmp_path / "a", tmp_path / "c")
    assert any("no adapter is at work" in note for note in report.notes)
    third = load_file(tmp_path / "c" / "model.safetensors")
    assert all(torch.equal(first[name], third[name]) for name in first)


EXPERTS = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    "mixtral": {"num_local_experts": 4},
}


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_that_are_stacked_in_memory_and_single_in_the_file(family, tools, tmp_path):
    from peft import LoraConfig, get_peft_model

    _, logits, relative = tools
    model = tiny.tiny_model(family, **EXPERTS[family])
    model.save_pretrained(tmp_path / "base")
    names = set(load_file(tmp_path / "base" / "model.safetensors"))
    stacked = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=stacked, init_lora_weights=False)
    model = get_peft_model(model, config)
    want = logits(model, vocabulary=250)
    report = merge(model, tmp_path / "out", precision="fp32")
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == names
    assert len(report.changes) == 2 + 2 * 4 * 3  # per layer a q_proj and three matrices of four experts
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert relative(want, logits(merged, vocabulary=250)) < 2e-6  # grouped matrix products have no fp64 to compare with
    with pytest.raises(UsageError, match="mixture of experts"):
        merge(model, tmp_path / "four", precision="nf4")
