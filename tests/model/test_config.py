"""Rope scaling put in or widened, against frequencies computed by hand; special tokens put right."""

import math

import pytest
import torch

from fastft.errors import UsageError
from fastft.model.config import widen_positions
from fastft.model.load import load
from fastft.state import get_state

IDS = torch.tensor([[1, 7, 20, 33, 150, 260, 9, 12, 40, 77]])


def frequencies(model, layer_type=None):
    rotary = model.get_decoder().rotary_emb
    return getattr(rotary, f"{layer_type}_inv_freq" if layer_type else "inv_freq")


def plain(theta, dim):
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def test_default_becomes_linear_and_linear_is_widened(tiny, tmp_path, rms):
    folder = tiny()
    short, _ = load(folder, dtype="float32", max_length=128)
    assert not any("exceeds" in note for note in get_state(short).notes)
    long, tokenizer = load(folder, dtype="float32", max_length=320)
    assert rms(frequencies(long), plain(10000.0, 16) / 2.5) < 1e-6
    assert "linear scaling with factor 2.5 was put in" in " ".join(get_state(long).notes)
    assert long.config.max_position_embeddings == 320 == get_state(long).max_length == tokenizer.model_max_length
    # positions divided by 2.5: at every fifth half-position both models see the same angles
    with torch.no_grad():
        spaced = torch.arange(10)[None]
        assert rms(long(IDS, position_ids=spaced * 5).logits, short(IDS, position_ids=spaced * 2).logits) < 1e-5
    long.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    longer, _ = load(tmp_path, dtype="float32", max_length=640)
    assert rms(frequencies(longer), plain(10000.0, 16) / 5) < 1e-6


def test_gemma3_widens_only_the_layers_that_see_far(tiny, rms):
    folder = tiny("gemma3", layer_types=["sliding_attention", "full_attention"])
    native, _ = load(folder, dtype="float32")
    model, _ = load(folder, dtype="float32", max_length=256)
    assert torch.equal(frequencies(model, "sliding_attention"), frequencies(native, "sliding_attention"))
    assert rms(frequencies(model, "full_attention"), frequencies(native, "full_attention") / 2) < 1e-6


@pytest.mark.parametrize(
    ("rope", "changed"),
    [
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}, {"factor": 8.0}),
        (
            {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0,
             "high_freq_factor": 4.0},
            {"factor": 16.0},
        ),
        ({"rope_type": "dynamic", "factor": 2.0}, {"factor": 2.0}),
        ({"rope_type": "linear", "factor": 3.0}, {"factor": 12.0}),
    ],
)  # fmt: skip
def test_scaled_ropes_are_widened(tiny, rope, changed):
    model, _ = load(tiny(rope_parameters={"rope_theta": 10000.0, **rope}), dtype="float32", max_length=512)
    parameters = model.config.rope_parameters
    assert parameters["rope_type"] == rope["rope_type"]
    assert {name: parameters[name] for name in changed} == changed
    assert model.config.max_position_embeddings == 512
    assert any("max_length=512 exceeds the model's 128" in note for note in get_state(model).notes)
    with torch.no_grad():
        assert model(IDS).logits.isfinite().all()


def test_yarn_frequencies(tiny, rms):
    """Slow rotations are divided by the factor, fast ones kept (the paper's ramp at both ends)."""
    rope = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
    model, _ = load(tiny(rope_parameters=rope), dtype="float32", max_length=512)
    got, base = frequencies(model).double(), plain(10000.0, 16)
    turns = 64 * base / (2 * math.pi)
    assert (turns < 1).any()
    assert rms(got[turns < 0.5], base[turns < 0.5] / 8) < 1e-5
    assert abs(got[0] / base[0] - 1) < 1e-5


def test_longrope(tiny, rms):
    rope = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [1.0 + i for i in range(8)],
        "rope_theta": 10000.0,
    }
    folder = tiny("phi3", rope_parameters=rope, original_max_position_embeddings=32)
    model, _ = load(folder, dtype="float32", max_length=384)
    with torch.no_grad():
        model(torch.arange(40)[None])  # beyond the original length the long factors hold
    assert rms(frequencies(model), plain(10000.0, 16) / (3 * torch.tensor(rope["long_factor"]))) < 1e-6


def test_windows_everywhere_need_no_scaling(tiny):
    import transformers as t

    config = t.MistralConfig(max_position_embeddings=128, sliding_window=32)
    length, notes = widen_positions(config, 512)
    assert length == 512 and config.rope_parameters["rope_type"] == "default" and "sliding window" in notes[0]


def test_learnt_positions_cannot_be_stretched():
    import transformers as t

    with pytest.raises(UsageError, match=r"at most 64, got 65.*no rotary positions"):
        widen_positions(t.GPT2Config(n_positions=64), 65)
    assert widen_positions(t.GPT2Config(n_positions=64), 64) == (64, [])


def test_pad_takes_a_spare_token(tiny):
    model, tokenizer = load(tiny())
    assert tokenizer.pad_token == "<unk>" and tokenizer.pad_token_id == 0
    assert model.config.pad_token_id == model.generation_config.pad_token_id == 0
    assert "no pad token; '<unk>' (id 0) now pads" in " ".join(get_state(model).notes)
    assert model.get_input_embeddings().weight.shape[0] == 300


def test_pad_that_ends_a_text_is_replaced_by_the_reserved_one(tiny):
    folder = tiny(tokenizer_changes={"pad_token": "<|im_end|>", "extra": ["<|finetune_right_pad_id|>"]})
    model, tokenizer = load(folder)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|finetune_right_pad_id|>", 5)
    assert model.config.pad_token_id == 5 and "which ends a text" in " ".join(get_state(model).notes)


def test_pad_that_is_right_stays(tiny):
    folder = tiny(tokenizer_changes={"pad_token": "</s>"}, pad_token_id=2, generation={"pad_token_id": 2})
    model, tokenizer = load(folder)
    assert tokenizer.pad_token_id == 2 == model.config.pad_token_id and get_state(model).notes == ()


@pytest.mark.parametrize("rows", [300, 290])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_pad_is_added_where_none_is_spare(tiny, family, rows, rms):
    """With spare rows nothing grows; without, embeddings and head grow alike and stay tied."""
    folder = tiny(family, vocab_size=rows, tokenizer_changes={"chat_template": "<unk>", "pad_token": "<|im_end|>"})
    model, tokenizer = load(folder, dtype="float32")
    count = len(tokenizer)
    assert tokenizer.pad_token == "<|pad|>" and tokenizer.pad_token_id == count - 1
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert len(embeddings) == len(head) == max(rows, count) == model.config.vocab_size
    assert (head is embeddings) == (family == "gemma3")
    for table in (embeddings, head):
        assert rms(table[count - 1], table[: count - 1].double().mean(0)) < 1e-6
    assert not any(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        assert model(torch.tensor([[1, count - 1]])).logits.shape[-1] == max(rows, count)


def test_eos_agrees_and_lists_are_kept(tiny):
    model, _ = load(tiny(eos_token_id=2, generation={"eos_token_id": [2, 3], "bos_token_id": 7}))
    assert model.config.eos_token_id == 4 and model.config.bos_token_id == 1
    assert model.generation_config.eos_token_id == [4, 2, 3] and model.generation_config.bos_token_id == 1
    notes = " ".join(get_state(model).notes)
    assert "EOS id 2 of config became 4" in notes and "BOS id 7 of generation_config became 1" in notes
    model, _ = load(tiny(eos_token_id=[4, 2], generation={"eos_token_id": [4, 2]}))
    assert model.config.eos_token_id == [4, 2] and model.generation_config.eos_token_id == [4, 2]
    assert not any("EOS" in note for note in get_state(model).notes)


def test_missing_eos_comes_from_the_config(tiny):
    folder = tiny(tokenizer_changes={"eos_token": None})
    model, tokenizer = load(folder)
    assert tokenizer.eos_token == "<|im_end|>" and "had no EOS" in " ".join(get_state(model).notes)
