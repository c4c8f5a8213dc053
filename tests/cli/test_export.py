"""`fastft export` and `fastft verify`: what they write, print and return."""

import json
import os
import subprocess
import sys

import pytest
import torch

import fastft
from fastft.cli.main import main
from fastft.demo import MODEL_FOLDER
from fastft.export.merge import save_adapter


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    model, _ = fastft.load(MODEL_FOLDER, dtype="bfloat16")
    model = fastft.add_lora(model, r=4)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return str(save_adapter(model, folder))


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_merge_then_verify(adapter, tmp_path, capsys):
    code, out, _ = run(capsys, "export", "merged", adapter, tmp_path / "m", "--precision", "fp16", "--json")
    assert code == 0
    report = json.loads(out)
    assert report["precision"] == "fp16"
    assert (tmp_path / "m" / "model.safetensors").is_file()
    code, out, _ = run(capsys, "verify", tmp_path / "m", "--model", adapter, "--text-tokens", "64")
    assert code == 0
    assert "fp16" in out and "  ok" in out
    prompts, text = tmp_path / "p.jsonl", tmp_path / "t.txt"
    lines = ['"A text"', '[{"role": "user", "content": "Hi"}]', "", '{"messages": [{"role": "user", "content": "x"}]}']
    prompts.write_text("\n".join(lines))
    text.write_text("Numbers and words. " * 10)
    arguments = ["verify", tmp_path / "m", MODEL_FOLDER, "--model", adapter, "--prompts", prompts, "--text", text]
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 2  # the second is the base without the adapter
    report = json.loads(out)
    assert report["prompts"] == 3
    assert [artefact["ok"] for artefact in report["artefacts"]] == [True, False]
    assert "check failed: model differs from the trained model, or" in err


def test_lora(adapter, tmp_path, capsys):
    code, out, _ = run(capsys, "export", "lora", adapter, tmp_path / "copy")
    assert (code, out.strip()) == (0, f"{tmp_path / 'copy'}: written")
    assert (tmp_path / "copy" / "adapter_model.safetensors").is_file()
    code, out, _ = run(capsys, "export", "lora", adapter, tmp_path / "gguf", "--gguf")
    assert code == 0
    assert "adapter.gguf: f32, 0." in out and f"its base, {MODEL_FOLDER}" in out
    code, out, _ = run(capsys, "export", "lora", adapter, tmp_path / "gguf", "--gguf", "--json")
    assert code == 0
    assert json.loads(out)["path"] == str(tmp_path / "gguf" / "adapter.gguf")
    assert (tmp_path / "gguf" / "adapter.gguf").read_bytes()[:4] == b"GGUF"


def test_gguf_with_its_modelfile(adapter, tmp_path, capsys):
    options = ["--quant", "f16", "--system", "Be brief.", "--num-ctx", "256", "--json"]
    code, out, _ = run(capsys, "export", "gguf", adapter, tmp_path / "g", *options)
    assert code == 0
    report = json.loads(out)
    assert [file["quant"] for file in report["files"]] == ["f16"]
    made = (tmp_path / "g" / "Modelfile").read_text()
    assert made.startswith("FROM ./adapter-f16.gguf\n")
    assert "PARAMETER num_ctx 256\n" in made
    code, out, _ = run(capsys, "export", "gguf", adapter, tmp_path / "h", "-q", "f16", "-q", "q8_0")
    assert code == 0
    assert f"adapter-q8_0.gguf: q8_0, {(tmp_path / 'h' / 'adapter-q8_0.gguf').stat().st_size / 1e6:.1f} MB (" in out
    assert {path.name for path in (tmp_path / "h").iterdir()} == {
        "adapter-f16.gguf", "adapter-q8_0.gguf", "Modelfile.adapter-f16", "Modelfile.adapter-q8_0",
    }  # fmt: skip


def test_wrong_use(adapter, tmp_path, capsys):
    code, _, err = run(capsys, "export", "merged", adapter, tmp_path / "m", "--precision", "bf17")
    assert code == 3
    assert "did you mean 'bf16'" in err
    code, _, err = run(capsys, "export", "gguf", adapter, tmp_path / "g", "-q", "f16", "--chat-format", "gemma")
    assert code == 3
    assert "no token of this tokenizer" in err
    assert "--no-modelfile" in err
    assert not (tmp_path / "g").exists()
    code, _, err = run(capsys, "export", "gguf", adapter, tmp_path / "g", "-q", "f16", "-q", "q8_0", "--ollama", "x")
    assert (code, "takes one --quant" in err) == (3, True)
    (tmp_path / "file").write_text("mine")
    for command in (["merged"], ["lora"], ["lora", "--gguf"], ["gguf"]):
        code, _, err = run(capsys, "export", *command, adapter, tmp_path / "file")
        assert (code, "this is a file" in err) == (3, True)
    (tmp_path / "bad.jsonl").write_text("{\n3\n")
    code, _, err = run(capsys, "verify", adapter, "--model", adapter, "--prompts", tmp_path / "bad.jsonl")
    assert code == 3
    assert "bad.jsonl:1: not JSON" in err
    assert "bad.jsonl:2" in err
    code, _, err = run(capsys, "verify", tmp_path / "absent", tmp_path / "file", "--model", adapter)
    assert (code, "no such file or folder" in err, "file: not a .gguf file" in err) == (3, True, True)
    assert run(capsys, "export", "lora", adapter, tmp_path / "alone", "--gguf")[0] == 0
    code, _, err = run(capsys, "verify", tmp_path / "alone", "--model", tmp_path / "absent")  # nothing is loaded before
    assert (code, "adapter.gguf']" in err, "the .gguf file of a whole model" in err) == (3, True, True)
    assert "The GGUF file of an adapter alone cannot be verified: it runs beside its base's file only." in err
    for quant in ("nonsense", "f16"):
        code, _, err = run(capsys, "export", "lora", adapter, tmp_path / "typed", "--quant", quant)
        assert (code, (tmp_path / "typed").exists()) == (3, False)
        assert f"--quant: expected to be left out without --gguf, got '{quant}'" in err
    assert run(capsys, "verify", adapter)[0] == 3
    (tmp_path / "empty").mkdir()
    for command in (
        ["verify", adapter, "--model", tmp_path / "empty"],
        *(["export", *kind, tmp_path / "empty", tmp_path / "m"] for kind in (["merged"], ["lora"], ["gguf"])),
        ["export", "lora", tmp_path / "empty", tmp_path / "m", "--gguf"],
    ):
        code, _, err = run(capsys, *command)
        assert (code, "no weights, no adapter and no checkpoint of a run is in it" in err) == (3, True)
    assert run(capsys, "export", "other")[0] == 3


def test_arguments_are_checked_before_anything_is_loaded(adapter, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastft.cli.export.folder_of", lambda model: pytest.fail("the model was looked for"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("mine")
    for command in (["merged"], ["lora"]):
        code, _, err = run(capsys, "export", *command, adapter, tmp_path / "mine")
        assert (code, "note.txt" in err) == (3, True)
    assert run(capsys, "export", "lora", adapter, tmp_path / "a", "--gguf", "--quant", "q8_0")[0] == 3
    code, _, err = run(capsys, "export", "gguf", adapter, tmp_path / "g", "-q", "q4_k_x")
    assert (code, "did you mean" in err) == (3, True)
    assert run(capsys, "export", "gguf", adapter, tmp_path / "g", "--base", "16")[0] == 3
    monkeypatch.setattr("shutil.which", lambda name: None)
    code, _, err = run(capsys, "export", "gguf", adapter, tmp_path / "g", "--ollama", "x")
    assert (code, "nothing was written" in err) == (1, True)
    assert not (tmp_path / "g").exists()


def test_files_are_told_of_before_ollama_fails(adapter, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: "/bin/false")
    code, out, err = run(capsys, "export", "gguf", adapter, tmp_path / "g", "-q", "q8_0", "--ollama", "x")
    assert code == 1
    assert "adapter-q8_0.gguf: q8_0" in out
    assert "ollama create x" in err


@pytest.mark.parametrize(
    "code",
    [
        "from fastft.cli.main import main; main(['export', 'merged', {model!r}, {out!r}])",
        "import fastft; fastft.merge({model!r}, {out!r})",
        "from fastft.cli.main import main; main(['preview', {rows!r}, '--model', {model!r}])",
        "import fastft; fastft.preview({rows!r}, {model!r})",
    ],
    ids=["export", "merge", "preview", "fastft.preview"],
)
def test_nothing_is_said_of_a_cpu_kernel(code, tmp_path):
    """In a process of its own, since bitsandbytes warns when it is imported."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a b", "completion": " c"}\n' * 4)
    code = code.format(model=str(MODEL_FOLDER), out=str(tmp_path / "m"), rows=str(tmp_path / "rows.jsonl"))
    code += "; import sys; assert 'bitsandbytes' in sys.modules"
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "kernels" not in done.stderr + done.stdout
