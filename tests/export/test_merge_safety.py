"""What merging must never do: leave half an export, replace what it should not, hide numbers that do not fit."""

import json
import os
import resource
import signal
import subprocess
import sys
from collections import namedtuple

import peaks
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import fastft
from fastft.errors import SaveError, UsageError
from fastft.export import place
from fastft.export.merge import merge, save_adapter


@pytest.fixture
def model():
    return tiny.make("llama", torch.float32, lora=True)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_export_is_replaced_by_the_next_one(model, tmp_path):
    merge(model, tmp_path / "out", shard_bytes=20000)
    assert len(contents(tmp_path / "out")) > 5
    merge(model, tmp_path / "out", precision="fp16")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_folders_of_something_else_are_not_replaced(model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"holds more than an export, .*\(thesis.tex\)"):
        merge(model, out)
    assert contents(out) == {"thesis.tex": b"years of work"}
    with pytest.raises(UsageError, match="this is a file"):
        merge(model, out / "thesis.tex")
    merge(model, tmp_path / "base")
    loaded = tiny_from(tmp_path / "base")
    before = contents(tmp_path / "base")
    with pytest.raises(UsageError, match="read from this folder"):
        merge(tmp_path / "base", tmp_path / "base")
    with pytest.raises(UsageError, match="read from this folder"):
        merge(loaded, tmp_path / "base")
    assert contents(tmp_path / "base") == before


def test_an_export_that_was_changed_is_not_replaced(model, tmp_path):
    out = tmp_path / "out"
    merge(model, out)
    record = json.loads((out / "export.json").read_text())
    written = contents(out)
    assert record["contents"] == {name: len(data) for name, data in written.items() if name != "export.json"}
    (out / "config.json").write_text('{"mine": 1}')
    before = contents(out)
    with pytest.raises(UsageError, match=r"changed since \(config.json\)"):
        merge(model, out)
    assert contents(out) == before
    # as exports wrote it that named no sizes
    (out / "export.json").write_text(json.dumps({**record, "contents": [*record["contents"], "export.json"]}))
    merge(model, out)
    assert contents(out)["config.json"] == written["config.json"]


def test_files_that_only_look_like_an_export_are_not_replaced(model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "train.json").write_text("rows")
    with pytest.raises(UsageError, match=r"holds more than an export, .*\(train.json\)"):
        merge(model, out)
    save_adapter(model, tmp_path / "mine")
    model.save_pretrained(tmp_path / "trained")  # by PEFT: the only copy of what was learnt
    before = contents(tmp_path / "trained")
    with pytest.raises(UsageError, match=r"adapter_model\.safetensors"):
        merge(model, tmp_path / "trained")
    assert contents(tmp_path / "trained") == before
    merge(model, tmp_path / "mine")
    for name, text in (
        ("m.gguf", "GGUF"),
        ("Modelfile.m", "FROM ./m.gguf"),
        ("README.md", "# m, exported with fastft"),
    ):
        (tmp_path / "mine" / name).write_text(text)
    merge(model, tmp_path / "mine")
    for name in ("README.md", "results.json"):
        (tmp_path / "mine" / name).write_text("my own")
        with pytest.raises(UsageError, match=name):
            merge(model, tmp_path / "mine")
        assert (tmp_path / "mine" / name).read_text() == "my own"
        (tmp_path / "mine" / name).unlink()


def tiny_from(folder):
    from fastft.demo import MODEL_FOLDER
    from fastft.model.tokenizer import load_tokenizer

    load_tokenizer(MODEL_FOLDER).save_pretrained(folder)
    return fastft.load(folder)[0]


def test_too_little_room_is_told_before_anything_is_written(model, tmp_path, monkeypatch):
    merge(model, tmp_path / "out")
    before = contents(tmp_path / "out")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(place.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**6))
    with pytest.raises(SaveError, match=r"0\.07 GB are needed and 0\.00 GB are free.*Nothing was written"):
        merge(model, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_fills_leaves_what_was_there(model, tmp_path):
    merge(model, tmp_path / "out")
    before = contents(tmp_path / "out")
    largest = max(map(len, before.values()))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, hard))
    try:
        with pytest.raises(SaveError, match=r"File too large.*Nothing was written there"):
            merge(model, tmp_path / "out", precision="fp32")
        with pytest.raises(SaveError, match="File too large"):
            merge(model, tmp_path / "new", precision="fp32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
import tiny, torch
from fastft.export import merge, tensorfile
model = tiny.make("llama", torch.float32, lora=True)
real, written = tensorfile.TensorFile.close, []
def close(file):
    real(file)
    written.append(file)
    if len(written) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
tensorfile.TensorFile.close = close
merge.merge(model, sys.argv[1], shard_bytes=20000)
"""


def test_a_kill_in_the_middle(model, tmp_path):
    merge(model, tmp_path / "out")
    before = contents(tmp_path / "out")
    arguments = [tmp_path / "out", os.path.dirname(tiny.__file__)]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert contents(tmp_path / "out") == before
    left = [path for path in tmp_path.iterdir() if path.name != "out"]
    assert left and all(path.name.startswith(".") for path in left)
    # what the killed process left is in the way of nothing
    merge(model, tmp_path / "out", precision="fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_kill_between_the_last_two_renames(model, tmp_path):
    merge(model, tmp_path / "out")
    before = contents(tmp_path / "out")
    os.rename(tmp_path / "out", tmp_path / ".out.old")
    place.restore(tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_fp16_overflow_names_the_tensor(model, tmp_path):
    weight = model.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight
    with torch.no_grad():
        weight[3, 5] = 70000.0
    name = r"model\.layers\.1\.mlp\.up_proj\.weight"
    with pytest.raises(SaveError, match=rf"{name}: its largest magnitude 70000.*at most 65504.*precision='bf16'"):
        merge(model, tmp_path / "out", precision="fp16")
    assert not list(tmp_path.iterdir())
    merge(model, tmp_path / "out", precision="bf16")
    with torch.no_grad():
        weight[3, 5] = float("nan")
    for precision in ("bf16", "fp32", "nf4", "fp8"):
        with pytest.raises(SaveError, match=f"{name}: the merged weight holds NaN or infinity"):
            merge(model, tmp_path / "out", precision=precision)


def test_wrong_precision(model, tmp_path):
    with pytest.raises(UsageError, match="did you mean 'bf16'"):
        merge(model, tmp_path / "out", precision="bfloat16")
    with pytest.raises(UsageError, match="did you mean 'fp32'"):
        merge(model, tmp_path / "out", precision=torch.float32)


MERGES = """
import json, shutil, sys
from pathlib import Path
import peaks
from fastft.export.merge import merge

folder = Path(sys.argv[1])

def merged(base):
    merge(folder / base, folder / "out", precision=precision)
    shutil.rmtree(folder / "out")

rises = {}
for precision in ("bf16", "fp32", "nf4", "fp8"):
    merged("few")  # imports, buffers of libraries
    rises[precision] = [peaks.rise(lambda: merged(base)) for base in ("few", "many")]
print(json.dumps(rises))
"""


def checkpoint_of(folder, layers):
    """Save a checkpoint of 3 matrices of 4 MB a layer; returns the bytes of all tensors and of the largest."""
    small = tiny.tiny_model(
        "llama", num_hidden_layers=layers, hidden_size=32, intermediate_size=64, tie_word_embeddings=True
    )
    small.save_pretrained(folder)
    config = (folder / "config.json").read_text()
    tensors = load_file(folder / "model.safetensors")
    (folder / "config.json").write_text(config.replace('"intermediate_size": 64', '"intermediate_size": 32768'))
    generator = torch.Generator().manual_seed(0)
    for name in tensors:
        if ".mlp." in name:
            shape = (32, 32768) if "down" in name else (32768, 32)
            tensors[name] = torch.randn(shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return [f(t.numel() * 4 for t in tensors.values()) for f in (sum, max)]


@peaks.needs_linux
def test_memory_is_bounded_by_the_largest_tensor(tmp_path):
    """A checkpoint of 60 matrices of 4 MB is merged in one file: a tenth of its 240 MB, as for one of 6 matrices."""
    checkpoint_of(tmp_path / "few", 2)
    total, largest = checkpoint_of(tmp_path / "many", 20)
    assert total > 60 * largest
    for precision, (few, many) in peaks.run(MERGES, tmp_path).items():
        # read, encoded, decoded and compared: a few copies of one tensor at most
        assert many < 6 * largest, (precision, few, many)
        assert many - few < largest, (precision, few, many)
