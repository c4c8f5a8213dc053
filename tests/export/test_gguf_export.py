"""Exports as wholes: values in the file, refusals before any work, names, several quants at once, bounded memory."""

import numpy as np
import peaks
import pytest
import torch
from gguf_models import MODELS, demo_tokenizer, gguf_model
from tiny import with_lora

from fastft.demo import MODEL_FOLDER
from fastft.errors import SaveError, UsageError
from fastft.export.gguf.architecture import architecture_of, heads_of
from fastft.export.gguf.export import export_gguf, quant_names
from fastft.export.gguf.file import read_gguf
from fastft.export.gguf.lora import export_lora_gguf
from fastft.export.gguf.quants import dequantize
from fastft.export.gguf.tensors import pairs_from_halves, plan_tensors
from fastft.export.weights import weight_source
from fastft.graph.twin import tiny_config, tiny_model
from fastft.registry.resolve import register, resolve


def values(path, name):
    file = read_gguf(path)
    entry = file.tensors[name]
    return dequantize(torch.from_numpy(file.data(name)), entry.type, entry.shape)


def partials(folder):
    return [path.name for path in folder.rglob("*") if path.is_file()]


def refused(model_type, match, **changes):
    config = tiny_config(model_type, **changes)
    with pytest.raises(UsageError, match=match):
        architecture_of(config, resolve(config), config.vocab_size)


def test_values_are_the_model_s(tmp_path):
    model, tokenizer = gguf_model("gemma3"), demo_tokenizer()
    path = export_gguf(model, tokenizer, tmp_path, "f32", name="m", progress=False).files[0].path
    assert path == tmp_path / "m-f32.gguf"
    state = model.state_dict()
    assert torch.equal(values(path, "token_embd.weight"), state["model.embed_tokens.weight"])
    assert torch.equal(values(path, "blk.1.attn_q.weight"), state["model.layers.1.self_attn.q_proj.weight"])
    assert torch.equal(values(path, "output_norm.weight"), state["model.norm.weight"] + 1)
    assert torch.equal(values(path, "blk.0.attn_q_norm.weight"), state["model.layers.0.self_attn.q_norm.weight"] + 1)


def test_unknown_arguments_are_told_with_the_right_name(tmp_path):
    with pytest.raises(UsageError) as caught:
        export_gguf(gguf_model("llama"), demo_tokenizer(), tmp_path, quant="q4_k_m", pre_tokeniser="x", device="gpu")
    assert [str(problem) for problem in caught.value.problems[:2]] == [
        "export_gguf: unknown argument 'quant'; here it is quants",
        "export_gguf: unknown argument 'pre_tokeniser'; did you mean 'pre_tokenizer'?",
    ]
    assert caught.value.problems[2].where == "export_gguf device" and not list(tmp_path.iterdir())


def test_rows_become_pairs():
    model = gguf_model("llama")
    heads = heads_of(model.config)
    rows = torch.arange(4 * 16 * 3).view(64, 3)
    pairs = pairs_from_halves(rows, heads)
    for head in range(4):
        for i in range(8):
            assert torch.equal(pairs[head * 16 + 2 * i], rows[head * 16 + i])
            assert torch.equal(pairs[head * 16 + 2 * i + 1], rows[head * 16 + 8 + i])


def test_rows_beyond_the_rotated_part_stay():
    heads = heads_of(tiny_config("glm4"))
    assert heads.rotated == 8 and heads.size == 16
    rows = torch.arange(32)
    assert pairs_from_halves(rows, heads).tolist()[:17] == [0, 4, 1, 5, 2, 6, 3, 7, *range(8, 16), 16]


def test_several_quants_in_one_pass(tmp_path):
    model, reads = gguf_model("qwen2"), []
    from fastft.export.weights import WeightSource

    read = WeightSource.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightSource, "read", lambda self, name: reads.append(name) or read(self, name))
        report = export_gguf(
            model,
            demo_tokenizer(),
            tmp_path,
            ["f32", "not_quantized", "bf16", "fast_quantized"],
            name="m",
            progress=False,
        )
    assert [file.path.name for file in report.files] == ["m-f32.gguf", "m-f16.gguf", "m-bf16.gguf", "m-q8_0.gguf"]
    assert len(reads) == len(set(reads)) == len(read_gguf(report.files[0].path).tensors)
    weight = model.state_dict()["model.layers.0.mlp.up_proj.weight"]
    for file, dtype in zip(report.files, (torch.float32, torch.float16, torch.bfloat16)):
        assert torch.equal(values(file.path, "blk.0.ffn_up.weight"), weight.to(dtype).float())
        assert file.size == file.path.stat().st_size and sum(file.types.values()) == 27
    close = values(report.files[3].path, "blk.0.ffn_up.weight")
    assert 0 < (close - weight).abs().max() < weight.abs().max() / 127


def test_the_report_tells_where_the_time_went(tmp_path):
    for _ in range(20):  # the threads of a busy machine wait for a core, which is no phase
        phases = export_gguf(gguf_model("qwen2"), demo_tokenizer(), tmp_path, ["q8_0"], progress=False).phases
        side_by_side = (phases.read, phases.quantise, phases.copy + phases.write)
        assert all(0 < seconds < phases.whole for seconds in (*side_by_side, phases.finish))
        if phases.whole <= sum(side_by_side) + phases.finish + 1:
            break
    assert phases.whole <= sum(side_by_side) + phases.finish + 1


@pytest.mark.gpu
def test_files_made_on_a_gpu_are_those_of_the_cpu(tmp_path):
    """From a folder; and adapters on a GPU's weights, which another stream merges while the quantisers run."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    quants = ["q4_k_m", "q8_0", "f16"]
    made = [
        [
            file.path.read_bytes()
            for file in export_gguf(MODEL_FOLDER, folder=tmp_path / place, quants=quants, device=place).files
        ]
        for place in ("cpu", "cuda")
    ]
    assert made[0] == made[1]
    model = with_lora(gguf_model("qwen2"), torch.float32).cuda()
    source = weight_source(model)
    path = export_gguf(model, demo_tokenizer(), tmp_path, "f32", name="m", device="cuda").files[0].path
    for tensor in plan_tensors(source, resolve(model.get_base_model().config), {}):
        assert torch.equal(values(path, tensor.name), tensor.read().cpu()), tensor.name


def test_wrong_quants_are_told_together(tmp_path):
    with pytest.raises(UsageError) as told:
        export_gguf("nowhere", None, tmp_path, ["q4_k_n", "f33", "q8_0"])
    assert len(told.value.problems) == 2
    assert "did you mean 'q4_k_" in str(told.value) and "did you mean 'f32'?" in str(told.value)
    with pytest.raises(UsageError, match="at least one"):
        export_gguf("nowhere", None, tmp_path, [])
    assert "q8_0" in quant_names()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_name_the_tensor(tmp_path, value):
    model = gguf_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = value
    with pytest.raises(UsageError, match=r"model\.layers\.1\.mlp\.down_proj\.weight .*as f16.*row 3, column 5"):
        export_gguf(model, demo_tokenizer(), tmp_path, ["f16", "q8_0"], progress=False)
    assert partials(tmp_path) == []


def test_what_fp16_cannot_hold(tmp_path):
    model = gguf_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    with pytest.raises(UsageError, match=r"up_proj\.weight .*fp16"):
        export_gguf(model, demo_tokenizer(), tmp_path, "f16", progress=False)
    assert export_gguf(model, demo_tokenizer(), tmp_path, "bf16", progress=False).files


def test_a_family_that_cannot_be_written_is_refused_first(tmp_path):
    from attrs import evolve

    from fastft.registry import resolve as module
    from fastft.registry.spec import Capability

    spec = resolve("meta-llama/Llama-3.1-8B")
    note = "its attention has no counterpart"
    capabilities = dict(spec.capabilities) | {"gguf": Capability("unsupported", note)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_registered", ())
        register(evolve(spec, capabilities=capabilities), replace=True)
        with pytest.raises(UsageError, match=note):
            export_gguf(gguf_model("llama"), demo_tokenizer(), tmp_path, "f32")
        gguf_model("llama").config.save_pretrained(tmp_path / "folder")
        (tmp_path / "folder" / "model.safetensors").write_bytes(b"never read")
        with pytest.raises(UsageError, match=note):
            export_gguf(tmp_path / "folder", demo_tokenizer(), tmp_path, "f32")
    assert not list(tmp_path.glob("*.gguf"))


def test_what_llama_cpp_would_compute_otherwise():
    refused("gemma2", r"attention scale: expected 0\.25", query_pre_attn_scalar=64)
    refused("gemma2", "final_softcap", final_logit_softcapping=None)
    refused("smollm3", r"config\.no_rope_layers", num_hidden_layers=2, no_rope_layers=[0, 1])
    refused("llama", r"config\.hidden_act", hidden_act="gelu")
    refused("cohere", r"config\.use_qk_norm", use_qk_norm=True)
    yarn = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "beta_fast": 16, "truncate": False}
    refused("llama", r"(?s)truncate.*beta_fast", rope_parameters=yarn)
    long = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": [1.0] * 8, "short_factor": [1.0] * 8}
    refused("llama", "rope_type", rope_parameters=long | {"original_max_position_embeddings": 64})


def test_differences_that_matter_only_sometimes_are_noted(tmp_path):
    window = architecture_of(tiny_config("mistral"), resolve(tiny_config("mistral")), 259)
    assert "beyond 16 tokens" in window.notes[0]
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    config = tiny_config("llama", rope_parameters=dynamic)
    assert "dynamic" in architecture_of(config, resolve(config), 259).notes[0]


def test_a_bias_without_a_place(tmp_path):
    model = gguf_model("olmo2")
    for layer in model.model.layers:
        layer.self_attn.o_proj.bias = torch.nn.Parameter(torch.zeros(64))
    names = read_gguf(export_gguf(model, demo_tokenizer(), tmp_path, "f32", progress=False).files[0].path).tensors
    assert "blk.0.attn_output.bias" not in names
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.bias[3] = 1
    with pytest.raises(UsageError, match=r"layers\.1\.self_attn\.o_proj\.bias.*reads no bias"):
        export_gguf(model, demo_tokenizer(), tmp_path, "f32", progress=False)


@pytest.mark.parametrize("name", MODELS)
def test_every_family_states_what_the_config_says(name):
    model_type, changes = MODELS[name]
    config = tiny_config(model_type, **changes)
    spec = resolve(config)
    keys = {
        key.removeprefix(f"{spec.gguf_architecture}."): value.value
        for key, value in architecture_of(config, spec, 259).metadata.items()
    }
    assert keys["block_count"] == config.num_hidden_layers and keys["attention.head_count_kv"] == 2
    assert keys["attention.key_length"] * 4 in (64, 128) and keys["vocab_size"] == 259
    for constant in (
        "embedding_multiplier",
        "residual_multiplier",
        "attention_multiplier",
        "logits_scaling",
        "logit_scale",
    ):
        value = getattr(config, constant, None)
        assert value is None or np.isclose(list(keys.values()), value).any() if value else True


def test_importance_changes_what_is_written_and_must_fit(tmp_path):
    model, tokenizer = gguf_model("qwen2"), demo_tokenizer()
    plain = written(model, tmp_path, "plain")
    names = [name for name in read_gguf(plain).tensors if "ffn_up" in name]
    generator = torch.Generator().manual_seed(0)
    matrix = {name: torch.rand(64, generator=generator) ** 4 for name in names}
    weighted = written(model, tmp_path, "weighted", importance=matrix)
    state = model.state_dict()["model.layers.0.mlp.up_proj.weight"]

    def error(path):
        return ((values(path, names[0]) - state) ** 2 * matrix[names[0]]).sum()

    assert error(weighted) < 0.9 * error(plain)
    assert torch.equal(values(weighted, "blk.0.ffn_gate.weight"), values(plain, "blk.0.ffn_gate.weight"))
    with pytest.raises(UsageError, match=r"importance of blk\.0\.ffn_up\.weight: .*\(64,\)"):
        written(model, tmp_path, "x", importance={names[0]: torch.ones(63)})
    with pytest.raises(UsageError, match="another model's"):
        written(model, tmp_path, "x", importance={"blk.99.ffn_up.weight": torch.ones(64)})
    with pytest.raises(UsageError, match="importance matrix"):
        export_gguf(model, tokenizer, tmp_path, "q2_k_s", progress=False)


def written(model, folder, name, **options):
    report = export_gguf(model, demo_tokenizer(), folder, "q4_0", name=name, progress=False, **options)
    return report.files[0].path


def test_disk_too_small(tmp_path, monkeypatch):
    import shutil
    from collections import namedtuple

    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(1000))
    with pytest.raises(SaveError, match=r"needs .* and 1,000 are free"):
        export_gguf(gguf_model("llama"), demo_tokenizer(), tmp_path / "new", "f32", progress=False)
    assert partials(tmp_path) == []


def test_adapters_that_need_merging(tmp_path):
    tied = gguf_model("llama-tied")
    cases = {
        "DoRA": with_lora(gguf_model("llama"), torch.float32, use_dora=True),
        "modules_to_save": with_lora(gguf_model("llama"), torch.float32, modules_to_save=["lm_head"]),
        "also the output head": with_lora(tied, torch.float32, target_modules=["embed_tokens", "q_proj"]),
        "no active LoRA": gguf_model("llama"),
    }
    for match, model in cases.items():
        with pytest.raises(UsageError, match=match):
            export_lora_gguf(model, tmp_path / "a.gguf")
    with pytest.raises(UsageError, match="did you mean 'f16'"):
        export_lora_gguf(tied, tmp_path / "a.gguf", "f61")
    with pytest.raises(UsageError, match=r"ends in \.gguf"):
        export_lora_gguf(tied, tmp_path / "a.bin")
    assert partials(tmp_path) == []


def test_an_adapter_s_file(tmp_path):
    model = with_lora(gguf_model("llama"), torch.float32, r=4)
    file = read_gguf(export_lora_gguf(model, tmp_path / "a.gguf", "bf16"))
    assert file.metadata["general.type"] == "adapter" and file.metadata["adapter.lora.alpha"] == 8.0
    assert file.tensors["blk.0.attn_q.weight.lora_a"].shape == (4, 64)
    assert file.tensors["blk.0.attn_q.weight.lora_b"].shape == (64, 4) and len(file.tensors) == 2 * 7 * 2


EXPORTS = """
import json, shutil, sys
from pathlib import Path
import peaks
from gguf_models import demo_tokenizer
from fastft.export.gguf.export import export_gguf

folder, tokenizer = Path(sys.argv[1]), demo_tokenizer()

def exported(model):
    export_gguf(folder / model, tokenizer, folder / "out", ["f32", "f16", "bf16"], progress=False)
    shutil.rmtree(folder / "out")

exported("short")  # imports, buffers of libraries
print(json.dumps(peaks.rise(lambda: exported("long"))))
"""


@peaks.needs_linux
def test_memory_is_bounded_by_the_largest_tensor(tmp_path):
    """A model of 12 layers with tensors of up to 6 MB in fp32, 280 MB in all, is exported in a sixth of that.

    Of three tensors (one read, one encoded, one written) there are the stored form, fp32, and what three files get.
    """
    sizes = {"hidden_size": 768, "intermediate_size": 1536, "vocab_size": 2048}
    sizes |= {"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 128}
    for name, layers in (("short", 1), ("long", 12)):
        model = tiny_model("llama", **sizes, num_hidden_layers=layers)
        model.to(torch.bfloat16).save_pretrained(tmp_path / name)
    whole, largest = [f(parameter.numel() for parameter in model.parameters()) * 4 for f in (sum, max)]
    assert whole > 45 * largest
    assert peaks.run(EXPORTS, tmp_path) < 8 * largest


def test_names_and_folders_in_the_wrong_place(adapted, tmp_path):
    model, tokenizer = adapted()
    with pytest.raises(UsageError, match=r"name: expected a name for files, without / .*folder="):
        export_gguf(model, tokenizer, tmp_path, name="a/b")
    with pytest.raises(UsageError, match=r"tokenizer: .*pass folder='gx'"):
        export_gguf(model, "gx")
    assert not list(tmp_path.iterdir())
