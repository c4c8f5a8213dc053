"""verify_export: right artefacts pass with small numbers, and each kind of damage fails and is named."""

import copy
import json
import math
import shutil
import struct

import pytest
import tiny
import torch
from attrs import evolve
from safetensors.torch import load_file, save_file

import fastft
from fastft.demo import MODEL_FOLDER
from fastft.errors import UsageError
from fastft.export import llama_cpp
from fastft.export.compare import Limits, distance, limits_of
from fastft.export.engines import kind_of_gguf
from fastft.export.gguf.export import export_gguf
from fastft.export.gguf.file import read_gguf
from fastft.export.merge import merge, save_adapter
from fastft.export.verify import verify_export

needs_llama_cpp = pytest.mark.skipif(not llama_cpp.available(), reason=f"{llama_cpp.why_unavailable()}")
QUICK = {"text_tokens": 96}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The demo model in fp32 with an adapter, its tokenizer, and a folder with exports of it."""
    folder = tmp_path_factory.mktemp("exports")
    model, tokenizer = fastft.load(MODEL_FOLDER, dtype="float32")
    export_gguf(model, tokenizer, folder / "bare", quants=["f32"], name="bare", progress=False)
    model = fastft.add_lora(model, r=4)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    for precision in ("fp32", "bf16", "nf4", "fp8"):
        merge(model, folder / precision, precision=precision)
    save_adapter(model, folder / "adapter")
    export_gguf(model, tokenizer, folder / "gguf", quants=["f32", "q8_0"], name="demo", progress=False)
    return model, tokenizer, folder


def test_distance_against_its_definitions():
    generator = torch.Generator().manual_seed(0)
    first = [torch.randn(5, 11, generator=generator) for _ in range(2)]
    second = [logits + 0.3 * torch.randn(5, 11, generator=generator) for logits in first]
    ids = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    found = distance(first, second, ids, text=1)
    p, q = (torch.cat(part).double().softmax(-1) for part in (first, second))
    assert found.kl == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-6)
    assert found.same_choice == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert found.largest_difference == pytest.approx((torch.cat(first) - torch.cat(second)).abs().max().item())
    nll = -second[1].double().log_softmax(-1)[torch.arange(4), torch.tensor(ids[1][1:])].mean()
    assert found.perplexity == pytest.approx(nll.exp().item(), rel=1e-6)
    assert found.tokens == 10
    # padding of the vocabulary is left out; a NaN is no agreement
    padded = [torch.cat((logits, torch.full((5, 3), 50.0)), -1) for logits in second]
    assert distance(first, padded, ids, text=1) == found
    second[0][2, 3] = math.nan
    assert math.isnan(distance(first, second, ids, text=1).kl)


def test_right_exports_pass(trained):
    model, tokenizer, folder = trained
    paths = [folder / name for name in ("fp32", "bf16", "nf4", "fp8", "adapter")]
    report = verify_export(model, tokenizer, paths, **QUICK)
    assert report.ok, str(report)
    found = {artefact.path.rpartition("/")[2]: artefact for artefact in report.artefacts}
    assert found["fp32"].distance.kl < 1e-10
    assert found["fp32"].distance.same_choice == 1
    assert found["adapter"].distance.kl < 1e-10
    assert found["fp32"].distance.kl < found["bf16"].distance.kl < found["fp8"].distance.kl < found["nf4"].distance.kl
    assert all(artefact.same_prompts and artefact.same_ids for artefact in report.artefacts)
    assert report.adapter_kl > 0.01
    assert all(f"\n{name} " in str(report) for name in found)
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["ok"] is True
    assert plain["artefacts"][0]["distance"]["kl"] == found["fp32"].distance.kl


@needs_llama_cpp
def test_gguf_files_in_llama_cpp(trained):
    model, tokenizer, folder = trained
    report = verify_export(model, tokenizer, folder / "gguf", **QUICK)
    assert report.ok, str(report)
    exact, rounded = report.artefacts
    assert (exact.kind, exact.runner, rounded.kind) == ("f32", "llama.cpp", "q8_0")
    assert exact.distance.kl < 1e-8
    assert exact.distance.largest_difference < 1e-3
    assert 1e-5 < rounded.distance.kl < 5e-3
    assert exact.same_prompts and exact.same_ids


def test_gguf_files_without_llama_cpp(trained, monkeypatch):
    model, tokenizer, folder = trained
    monkeypatch.setattr(llama_cpp, "available", lambda: False)
    monkeypatch.setattr(llama_cpp, "why_unavailable", lambda: "llama.cpp is not installed; install it with: ...")
    report = verify_export(model, tokenizer, folder / "gguf", **QUICK)
    assert report.ok, str(report)
    exact, rounded = report.artefacts
    assert exact.runner == "transformers, dequantised"
    assert exact.same_ids is None
    assert exact.same_prompts
    assert any("install it with" in note for note in exact.notes)
    assert exact.distance.kl < 1e-10  # rows were put back in order
    assert 1e-6 < rounded.distance.kl < 5e-3


@pytest.mark.parametrize("installed", [pytest.param(True, marks=needs_llama_cpp), False])
def test_a_file_without_the_adapter_fails(trained, installed, monkeypatch):
    model, tokenizer, folder = trained
    if not installed:
        monkeypatch.setattr(llama_cpp, "available", lambda: False)
    report = verify_export(model, tokenizer, folder / "bare" / "bare-f32.gguf", **QUICK)
    assert not report.ok
    assert any("adapter is missing" in problem for problem in report.artefacts[0].problems)
    assert "FAILED" in str(report)


def damaged(folder, tmp_path, name="fp32"):
    return shutil.copytree(folder / name, tmp_path / "damaged")


def test_a_swapped_weight_fails(trained, tmp_path):
    model, tokenizer, folder = trained
    out = damaged(folder, tmp_path)
    tensors = load_file(out / "model.safetensors")
    first, second = (f"model.layers.{n}.mlp.up_proj.weight" for n in (0, 1))
    tensors[first], tensors[second] = tensors[second], tensors[first]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    report = verify_export(model, tokenizer, out, **QUICK)
    assert not report.ok
    assert "KL divergence" in report.artefacts[0].problems[0]


def test_another_template_fails(trained, tmp_path):
    model, tokenizer, folder = trained
    out = damaged(folder, tmp_path)
    path = out / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant\\n' }}", "assistant: ' }}"))
    artefact = verify_export(model, tokenizer, out, **QUICK).artefacts[0]
    assert artefact.same_prompts is False
    assert "assistant: " in artefact.problems[0]
    path.unlink()
    artefact = verify_export(model, tokenizer, out, **QUICK).artefacts[0]
    assert "no chat template" in artefact.problems[0]


def test_another_tokenizer_fails(trained, tmp_path):
    model, tokenizer, folder = trained
    out = damaged(folder, tmp_path)
    path = out / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][:500]
    path.write_text(json.dumps(content))
    artefact = verify_export(model, tokenizer, out, **QUICK).artefacts[0]
    assert artefact.same_ids is False
    assert any("token " in problem for problem in artefact.problems)


def test_weights_that_are_no_numbers_fail(trained, tmp_path):
    model, tokenizer, folder = trained
    out = damaged(folder, tmp_path)
    tensors = load_file(out / "model.safetensors")
    tensors["model.norm.weight"][:] = math.nan
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    assert not verify_export(model, tokenizer, out, **QUICK).ok


def test_a_kind_without_a_limit_still_has_to_be_numbers(trained, tmp_path, monkeypatch):
    # ggml's products of quantised numbers would swallow a NaN
    monkeypatch.setattr(llama_cpp, "available", lambda: False)
    model, tokenizer, _ = trained
    path = export_gguf(model, tokenizer, tmp_path, quants=["tq2_0"], progress=False).files[0].path
    artefact = verify_export(model, tokenizer, path, **QUICK).artefacts[0]
    assert (artefact.ok, artefact.limits) == (True, None)
    file = read_gguf(path)
    with path.open("r+b") as raw:
        raw.seek(file.offsets["output_norm.weight"])
        raw.write(struct.pack("<f", math.nan))
    artefact = verify_export(model, tokenizer, path, **QUICK).artefacts[0]
    assert artefact.problems == ("its logits hold NaN or infinity, or those of the model do",)


def test_a_file_that_names_no_quant_is_judged_by_its_tensors(trained):
    file = read_gguf(trained[2] / "gguf" / "demo-q8_0.gguf")
    assert kind_of_gguf(file) == "q8_0"
    for number in (None, 1024, 999):
        assert kind_of_gguf(evolve(file, metadata={"general.file_type": number})) == "q8_0"


def test_a_folder_as_the_reference(trained, tmp_path):
    _, _, folder = trained
    report = verify_export(folder / "adapter", None, folder / "bf16", **QUICK)
    assert report.ok, str(report)
    assert any("no run.json" in note for note in report.notes)


def test_prompts_and_limits_of_ones_own(trained):
    model, tokenizer, folder = trained
    prompts = ["A plain text", [{"role": "user", "content": "Hello"}]]
    report = verify_export(model, tokenizer, folder / "bf16", prompts=prompts, text="Some text. " * 20)
    assert report.prompts == 2
    assert report.ok
    assert not verify_export(model, tokenizer, folder / "bf16", limits=Limits(1e-9, 0.0, 0.0), **QUICK).ok


def test_rounding_beyond_the_adapters_whole_effect_is_told(tmp_path):
    model, tokenizer = fastft.load(MODEL_FOLDER, dtype="float32")
    model = fastft.add_lora(model, r=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(1e-3)
    for precision in ("nf4", "fp32"):
        merge(model, tmp_path / precision, precision=precision)
    report = verify_export(model, tokenizer, [tmp_path / "nf4", tmp_path / "fp32"], **QUICK)
    assert report.ok, str(report)
    assert report.adapter_kl < report.artefacts[0].distance.kl
    assert ["is more than all that the adapters changed" in "".join(one.notes) for one in report.artefacts] == [
        True, False,
    ]  # fmt: skip


def test_merging_into_the_original_base_is_known(tmp_path):
    model, tokenizer = fastft.load(MODEL_FOLDER, quant="nf4", dtype="float32")
    model = fastft.add_lora(model)
    merge(model, tmp_path / "out", precision="fp32", base="original")
    artefact = verify_export(model, tokenizer, tmp_path / "out", **QUICK).artefacts[0]
    assert artefact.ok
    assert artefact.distance.kl > 0.01
    assert artefact.limits.kl == pytest.approx(limits_of("fp32", "float32").kl + limits_of("nf4", "float32").kl)


def test_limits_of_kinds():
    order = ["f32", "f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_s", "q2_k"]
    limits = [limits_of(kind, "float32") for kind in order]
    assert [limit.kl for limit in limits] == sorted(limit.kl for limit in limits)
    assert limits_of("iq4_xs", "float32") == limits_of("q4_0", "float32")
    assert limits_of("q8_0", "bfloat16").kl > limits_of("q8_0", "float32").kl
    assert limits_of("tq1_0", "float32") is None


def test_gguf_files_beside_merged_weights_are_verified_too(trained, tmp_path):
    model, tokenizer, folder = trained
    out = damaged(folder, tmp_path)
    shutil.copy2(folder / "gguf" / "demo-q8_0.gguf", out)
    kinds = [artefact.kind for artefact in verify_export(model, tokenizer, out, **QUICK).artefacts]
    assert kinds == ["fp32", "q8_0"]


def test_wrong_use(trained, tmp_path):
    model, tokenizer, folder = trained
    with pytest.raises(UsageError, match="no such file or folder"):
        verify_export(model, tokenizer, tmp_path / "absent")
    with pytest.raises(UsageError, match=r"not a \.gguf file"):
        verify_export(model, tokenizer, folder / "fp32" / "config.json")
    with pytest.raises(UsageError, match="at least two tokens"):
        verify_export(model, tokenizer, folder / "fp32", text="")
    with pytest.raises(UsageError, match="a model, or the path"):
        verify_export(None, tokenizer, folder / "fp32")
    (tmp_path / "cut.gguf").write_bytes((folder / "gguf" / "demo-f32.gguf").read_bytes()[:100000])


def test_what_cannot_be_read_fails_and_the_others_are_judged(trained, tmp_path):
    model, tokenizer, folder = trained
    good, file = folder / "fp32", tmp_path / "cut.gguf"
    file.write_bytes((folder / "gguf" / "demo-f32.gguf").read_bytes()[:100000])
    out = damaged(folder, tmp_path)
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    report = verify_export(model, tokenizer, [file, out, good], **QUICK)
    assert [artefact.ok for artefact in report.artefacts] == [False, False, True]
    assert "cut short or damaged" in report.artefacts[0].problems[0]
    assert "model.safetensors is damaged" in report.artefacts[1].problems[0]
    assert report.artefacts[0].distance is None
    assert "FAILED cut.gguf: " in str(report)
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_folder_of_folders_and_an_adapter_file(trained, tmp_path):
    from fastft.export.gguf.lora import export_lora_gguf

    model, tokenizer, folder = trained
    for name in ("fp32", "bf16"):
        shutil.copytree(folder / name, tmp_path / "m" / name)
    alone = export_lora_gguf(model, tmp_path / "m" / "fp32" / "adapter.gguf")
    report = verify_export(model, tokenizer, tmp_path / "m", **QUICK)
    assert [artefact.kind for artefact in report.artefacts] == ["bf16", "fp32"]
    assert report.ok
    assert "adapter.gguf is an adapter" in str(report)
    with pytest.raises(UsageError, match="of a whole model"):
        verify_export(model, tokenizer, alone, **QUICK)


def test_tensors_and_end_tokens_that_differ_are_named(trained, tmp_path):
    model, tokenizer, folder = trained
    out = damaged(folder, tmp_path)
    tensors = load_file(out / "model.safetensors")
    tensors["model.stray"] = torch.zeros(2)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    path = out / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": 5}))
    problems = "\n".join(verify_export(model, tokenizer, out, **QUICK).artefacts[0].problems)
    assert "it lacks 1 tensors: model.layers.0.mlp.up_proj.weight" in problems
    assert "the model has no place for 1 tensors: model.stray" in problems
    assert "generation stops at the tokens [5] there" in problems


def test_the_end_tokens_of_tokenizer_and_configs_are_those_of_an_export(tmp_path):
    """A folder whose files disagree, and a chat template whose stop token became the tokenizer's EOS."""
    from fastft.chat_templates import get_chat_template

    folder = shutil.copytree(MODEL_FOLDER, tmp_path / "base")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    eos = json.loads((folder / "config.json").read_text())["eos_token_id"]
    made = merge(folder, tmp_path / "merged")
    assert f"stops at the tokens [{eos}, 5], of which that of the model named [5]" in "\n".join(made.notes)
    files = [tmp_path / "merged", export_gguf(folder, None, tmp_path, "f32", name="m", progress=False).files[0].path]
    checked = verify_export(folder, None, files, **QUICK)
    assert checked.ok, checked

    model, tokenizer = fastft.load(MODEL_FOLDER, dtype="float32")
    other = get_chat_template(tokenizer, "chatml")
    assert other.eos_token == "<|im_end|>"
    merge(model, tmp_path / "chatml", tokenizer=other)
    stored = json.loads((tmp_path / "chatml" / "generation_config.json").read_text())["eos_token_id"]
    assert other.eos_token_id in ([stored] if isinstance(stored, int) else stored)
    assert verify_export(model, other, tmp_path / "chatml", **QUICK).ok
    (tmp_path / "chatml" / "generation_config.json").write_text(json.dumps({"eos_token_id": 700}))
    problems = verify_export(model, other, tmp_path / "chatml", **QUICK).artefacts[0].problems
    assert any("generation stops at the tokens [700] there" in problem for problem in problems)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_is_read_back(family, tmp_path, tools):
    """Names, orders of rows and folded offsets are undone: the model that comes back is the one that was written."""
    from fastft.export.gguf_read import dequantised_model
    from fastft.model.tokenizer import load_tokenizer

    _, logits, relative = tools
    tokenizer = load_tokenizer(MODEL_FOLDER)
    # llama.cpp's smollm3 rotates in all but each fourth layer
    fixed = {"no_rope_layers": [1, 1]} if family == "smollm3" else {}
    model = tiny.make(family, torch.float32, lora=True, vocab_size=len(tokenizer), **fixed).eval()
    report = export_gguf(model, tokenizer, tmp_path, quants=["f32"], progress=False)
    back = dequantised_model(read_gguf(report.files[0].path), model)
    truth = logits(copy.deepcopy(model).double())
    assert relative(truth, logits(back)) < 2 * relative(truth, logits(model)) + 1e-7


def test_a_failing_number_is_told_with_digits_that_tell_it_from_the_allowed_one():
    from fastft.export.compare import Distance
    from fastft.export.verify import ArtefactReport, _limited

    limits = Limits(2e-3, 0.05, 0.02)
    found = Distance(2000, 0.1, 2.0004e-3, 0.9496, 102.04, 100.0)
    report = ArtefactReport("merged", "bf16", "transformers", True, True, found, None, limits, ())
    assert _limited(report, limits, None).problems == (
        "mean KL divergence 0.0020004, allowed 0.002",
        "5.04% other first choices, allowed 5.00%",
        "perplexity +2.04%, allowed +2.00%",
    )
    far = Distance(2000, 0.1, 0.3, 0.5, 150.0, 100.0)
    assert _limited(evolve(report, distance=far), limits, None).problems == (
        "mean KL divergence 0.3, allowed 0.002",
        "50.0% other first choices, allowed 5.0%",
        "perplexity +50.0%, allowed +2.0%",
    )
