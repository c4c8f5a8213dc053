"""Importance matrices: the sums against a reference, both file formats, and what they do to a quantised weight."""

import struct

import numpy as np
import pytest
import torch
from tiny import make, relative

from fastft.errors import LoadError, SaveError, UsageError
from fastft.export.gguf.imatrix import (
    Entry,
    ImportanceMatrix,
    calibration_chunks,
    collect,
    linear_names,
    load_imatrix,
    save_imatrix,
)
from fastft.export.gguf.quants import dequantize, quantize


def chunks(count=3, length=20):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 250, (1, length), generator=generator) for _ in range(count)]


def matrix():
    generator = torch.Generator().manual_seed(1)
    entries = {
        "blk.0.attn_q.weight": Entry(torch.rand(1, 64, generator=generator) * 100, torch.tensor([1000.0])),
        "blk.0.ffn_up_exps.weight": Entry(torch.rand(4, 32, generator=generator), torch.tensor([700.0, 0, 5, 900])),
    }
    return ImportanceMatrix(entries, chunks=2, chunk_size=512, datasets=("wiki.txt",))


@pytest.mark.parametrize("lora", [False, True])
def test_sums_are_the_squares_of_the_layers_inputs(lora):
    model = make("llama", torch.float32, lora=lora)
    result = collect(model, chunks())
    assert model.training and not any(module._forward_pre_hooks for module in model.modules())
    assert (result.chunks, result.chunk_size) == (3, 20)
    base = model.get_base_model() if lora else model
    layer = base.model.layers[0]
    with torch.no_grad():
        inputs = torch.cat([layer.input_layernorm(base.model.embed_tokens(ids))[0] for ids in chunks()]).double()
    expected = inputs.square().sum(0)
    for name in ("attn_q", "attn_k", "attn_v"):
        entry = result.entries[f"blk.0.{name}.weight"]
        assert relative(expected, entry.sums[0].double()) < 1e-6
        assert entry.counts.tolist() == [60.0]
        assert relative(expected / 60, result.importance()[f"blk.0.{name}.weight"].double()) < 1e-6
    layers = base.config.num_hidden_layers
    linears = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    names = {f"blk.{layer}.{name}.weight" for layer in range(layers) for name in linears}
    assert set(result.entries) - {"output.weight"} == names
    assert ("output.weight" in result.entries) == (not base.config.tie_word_embeddings)


def test_the_inner_layers_of_adapters_are_the_ones_observed():
    names = linear_names(make("llama", torch.float32, lora=True))
    assert len(set(names.values())) == len(names)
    assert not [path for path in names if "lora_" in path]


@pytest.mark.parametrize("family", ["phi3", "gemma2", "qwen3"])
def test_other_families_have_names(family):
    result = collect(make(family, torch.float32, lora=False), chunks(1))
    assert "blk.0.ffn_down.weight" in result.entries
    assert ("blk.0.attn_qkv.weight" in result.entries) == (family == "phi3")


def test_nan_in_an_input_and_no_text_are_errors():
    model = make("llama", torch.float32, lora=False)
    with pytest.raises(UsageError, match="chunks"):
        collect(model, [])
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = float("nan")
    with pytest.raises(UsageError, match=r"blk\.1\.attn_q\.weight: its inputs hold NaN"):
        collect(model, chunks(1))
    assert model.training and not any(module._forward_pre_hooks for module in model.modules())


def test_texts_are_cut_into_whole_chunks():
    def tokenizer(content):
        return {"input_ids": list(range(len(content)))}

    pieces = list(calibration_chunks(tokenizer, ["a" * 5, "b" * 9], length=6))
    assert [piece.tolist() for piece in pieces] == [[[0, 1, 2, 3, 4, 0]], [[1, 2, 3, 4, 5, 6]]]
    with pytest.raises(UsageError, match="3 tokens"):
        list(calibration_chunks(tokenizer, ["abc"], length=6))


def test_gguf_file_round_trip(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = save_imatrix(matrix(), tmp_path / "imatrix.gguf")
    back = load_imatrix(path)
    assert (back.chunks, back.chunk_size, back.datasets) == (2, 512, ("wiki.txt",))
    for name, entry in matrix().entries.items():
        assert torch.equal(back.entries[name].sums, entry.sums)
        assert torch.equal(back.entries[name].counts, entry.counts)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert tensors["blk.0.ffn_up_exps.weight.in_sum2"].shape.tolist() == [32, 4]
    assert tensors["blk.0.ffn_up_exps.weight.counts"].shape.tolist() == [1, 4]


def test_older_file_round_trip(tmp_path):
    back = load_imatrix(save_imatrix(matrix(), tmp_path / "imatrix.dat"))
    assert (back.chunks, back.datasets) == (2, ("wiki.txt",))
    for name, entry in matrix().entries.items():
        assert relative(entry.mean().flatten().double(), back.entries[name].mean().flatten().double()) < 1e-6
    assert (back.entries["blk.0.ffn_up_exps.weight"].mean()[0, 32:64] == 1).all()  # the expert without a token


def test_older_file_by_hand(tmp_path):
    values = np.array([2, 4, 6], dtype="<f4")
    data = struct.pack("<ii3sii", 1, 3, b"abc", 2, 3) + values.tobytes()
    path = tmp_path / "old.dat"
    for end in (b"", struct.pack("<ii5s", 2, 5, b"x.txt")):
        path.write_bytes(data + end)
        assert load_imatrix(path).importance()["abc"].tolist() == [1, 2, 3]
    assert load_imatrix(path).datasets == ("x.txt",)


@pytest.mark.parametrize("suffix", [".gguf", ".dat"])
def test_a_disk_that_fails_leaves_what_was_there(tmp_path, suffix, monkeypatch):
    path = save_imatrix(matrix(), tmp_path / f"imatrix{suffix}")
    whole = path.read_bytes()

    def refuse(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(SaveError, match=r"imatrix\..*could not be written.*No space left"):
        save_imatrix(matrix(), path)
    assert [(left.name, left.read_bytes()) for left in tmp_path.iterdir()] == [(path.name, whole)]


@pytest.mark.parametrize("suffix", [".gguf", ".dat"])
def test_a_file_cut_short_is_an_error(tmp_path, suffix):
    path = save_imatrix(matrix(), tmp_path / f"imatrix{suffix}")
    whole = path.read_bytes()
    for length in (0, 3, 7, 40, len(whole) // 2, len(whole) - 5 - 32 * (suffix == ".gguf")):
        path.write_bytes(whole[:length])
        with pytest.raises(LoadError, match=r"imatrix\."):
            load_imatrix(path)
    with pytest.raises(LoadError, match="cannot be read"):
        load_imatrix(tmp_path / "none")


def test_wrong_numbers_in_a_file_are_an_error(tmp_path):
    bad = matrix()
    bad.entries["blk.0.attn_q.weight"].sums[0, 3] = float("nan")
    with pytest.raises(LoadError, match=r"blk\.0\.attn_q\.weight holds negative, NaN"):
        load_imatrix(save_imatrix(bad, tmp_path / "bad.gguf"))


@pytest.mark.parametrize("name", ["q2_k", "q3_k", "q4_k", "iq4_xs"])
def test_importance_lowers_the_error_that_it_weighs(name):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 512, generator=generator)
    importance = torch.exp(2 * torch.randn(512, generator=generator))

    def error(weights):
        back = dequantize(quantize(x, name, weights), name, tuple(x.shape))
        return ((back - x).double().square() * importance).sum()

    assert error(importance) < 0.9 * error(None)
