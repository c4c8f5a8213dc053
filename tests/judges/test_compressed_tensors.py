"""Merged weights in fp8 as compressed-tensors, and transformers with it, read them."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fastft.demo import MODEL_FOLDER
from fastft.export.encode import decode
from fastft.export.merge import merge

MISSING = "compressed-tensors is not installed (pip install 'fastft[judges]')"
compressed_tensors = pytest.importorskip("compressed_tensors", reason=MISSING)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8") / "merged"
    merge(MODEL_FOLDER, folder, precision="fp8")
    return folder


def test_the_config_is_its_own_for_dynamic_fp8(folder):
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

    written = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
    groups = {"group_0": preset_name_to_scheme("FP8_DYNAMIC", ["Linear"])}
    own = QuantizationConfig(
        config_groups=groups, ignore=["lm_head"], format="float-quantized", quantization_status="compressed"
    )
    assert QuantizationConfig.model_validate(written).model_dump() == own.model_dump()


def test_transformers_reads_the_numbers_that_were_written(folder):
    stored = load_file(folder / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    names = [name for name in stored if f"{name}_scale" in stored]
    assert len(names) == 35
    with torch.no_grad():
        logits = model(torch.arange(4, 60)[None]).logits  # weights are decompressed by the first call
    assert logits.isfinite().all()
    for name in names:
        module = model.get_submodule(name.removesuffix(".weight"))
        expected = decode(name, {key: part for key, part in stored.items() if key.startswith(name)})
        assert torch.equal(module.weight, expected.bfloat16()), name
