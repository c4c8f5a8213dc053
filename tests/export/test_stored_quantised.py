"""Models whose checkpoint is stored in 4 or 8 bits are merged and exported as those that were quantised at loading."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import fastft
from fastft.demo import MODEL_FOLDER
from fastft.export.weights import weight_source

KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


def stored(kind, folder):
    """Save the demo model's checkpoint as transformers stores it in 4 or 8 bits."""
    settings = BitsAndBytesConfig(**KINDS[kind])
    AutoModelForCausalLM.from_pretrained(
        MODEL_FOLDER, quantization_config=settings, device_map={"": "cpu"}, dtype=torch.float32
    ).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL_FOLDER).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_its_merge_has_the_numbers_that_were_trained_on(kind, tools, tmp_path):
    shake, logits, relative = tools
    model, tokenizer = fastft.load(stored(kind, tmp_path / "stored"), dtype="float32")
    conversions = list(model._weight_conversions)
    model = shake(fastft.add_lora(model, r=4), 0.05)
    want, source = logits(model), weight_source(model)
    fastft.merge(model, tmp_path / "merged", precision="fp32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert getattr(merged.config, "quantization_config", None) is None
    for name, value in merged.state_dict().items():
        if name in source.names:
            assert torch.equal(value, source.read(name)), name
    # bitsandbytes rounds what goes into an 8-bit layer
    assert relative(want, logits(merged)) < (0.1 if kind == "int8" else 3e-6)
    assert model.get_base_model()._weight_conversions == conversions
    exported = fastft.export_gguf(model, tokenizer, folder=tmp_path / "gguf", quants="f16", progress=False)
    assert exported.files[0].size > 2 * sum(weight.numel() for weight in merged.parameters())


def test_what_merge_has_stored_in_nf4_is_merged_again(tmp_path):
    model, _ = fastft.load(MODEL_FOLDER, quant="nf4", dtype="float32")
    fastft.merge(model, tmp_path / "nf4", precision="nf4")
    again, _ = fastft.load(tmp_path / "nf4", dtype="float32")
    source = weight_source(again)
    fastft.merge(again, tmp_path / "merged", precision="fp32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.equal(merged[name], source.read(name)) for name in source.names)
    layer = "model.layers.0.mlp.down_proj.weight"
    before = weight_source(model).read(layer)
    assert (merged[layer] - before).norm() < 0.02 * before.norm()  # quantised twice
