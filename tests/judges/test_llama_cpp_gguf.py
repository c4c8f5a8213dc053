"""llama.cpp reads what fastft writes: logits and greedy continuations of every family, adapters, real vocabularies.

Whole files are compared with those of llama.cpp's own converter where its sources are at hand
(FASTFT_LLAMA_CPP_SOURCE).
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import vocabularies
from gguf_models import MODELS, demo_tokenizer, gguf_model
from tiny import with_lora

from fastft.errors import LoadError
from fastft.export.gguf.export import export_gguf
from fastft.export.gguf.file import FileWriter, read_gguf, text
from fastft.export.gguf.lora import export_lora_gguf
from fastft.export.gguf.vocabulary import vocabulary_of
from fastft.export.llama_cpp import LlamaCpp, why_unavailable

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
needs_source = pytest.mark.skipif(vocabularies.source() is None, reason=vocabularies.MISSING)
# ggml reads GELU from a table in fp16
LIMIT = dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3-other-windows"), 5e-3)


def ids_of(length, vocabulary=2048):
    return torch.randint(4, vocabulary, (1, length), generator=torch.Generator().manual_seed(0))


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids).logits[0].float()


def continued(model, ids, count):
    end = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    return model.generate(ids, max_new_tokens=count, min_new_tokens=count, **end)[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def tokenizer():
    return demo_tokenizer()


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_continuations(name, tokenizer, tmp_path):
    model = gguf_model(name)
    path = export_gguf(model, tokenizer, tmp_path, "f32", progress=False).files[0].path
    long = name == "phi3-long"  # transformers takes the long factors by the text's length, llama.cpp by the context's
    ids, prompt = ids_of(300 if long else 60), ids_of(260 if long else 20)
    with LlamaCpp(path, context=1024 if long else 256) as judge:
        assert (judge.logits(ids[0].tolist()) - logits_of(model, ids)).abs().max() < LIMIT.get(name, 1e-4)
        assert judge.greedy(prompt[0].tolist(), 20) == continued(model, prompt, 20)


def test_a_wrong_file_is_told_apart(tokenizer, tmp_path):
    """The judge must be able to fail: without the rope factors or with other weights, the logits are far off."""
    plain, scaled = gguf_model("llama"), gguf_model("llama-llama3")
    path = export_gguf(plain, tokenizer, tmp_path, "f32", progress=False).files[0].path
    ids = ids_of(60)
    with LlamaCpp(path, context=256) as judge:
        assert (judge.logits(ids[0].tolist()) - logits_of(scaled, ids)).abs().max() > 0.1


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2", "glm4"])
def test_adapter_beside_its_base_and_merged(name, tokenizer, tmp_path):
    model, ids = gguf_model(name), ids_of(40)
    base = export_gguf(model, tokenizer, tmp_path, "f32", name="base", progress=False).files[0].path
    adapted = with_lora(model, torch.float32, use_rslora=name == "llama").eval()
    wanted = logits_of(adapted, ids)
    adapter = export_lora_gguf(adapted, tmp_path / "adapter.gguf")
    merged = export_gguf(adapted, tokenizer, tmp_path, "f32", name="merged", progress=False).files[0].path
    limit = LIMIT.get(name, 1e-4)
    with LlamaCpp(base, context=256) as judge:
        assert (judge.logits(ids[0].tolist()) - wanted).abs().max() > 0.1
    with LlamaCpp(base, context=256, lora=adapter) as judge:
        assert (judge.logits(ids[0].tolist()) - wanted).abs().max() < limit
    with LlamaCpp(merged, context=256) as judge:
        assert (judge.logits(ids[0].tolist()) - wanted).abs().max() < limit


def test_two_adapters_and_one_on_the_embedding(tokenizer, tmp_path):
    from peft import LoraConfig

    model, ids = gguf_model("llama"), ids_of(40)
    base = export_gguf(model, tokenizer, tmp_path, "f32", progress=False).files[0].path
    adapted = with_lora(model, torch.float32, target_modules=["embed_tokens", "lm_head", "q_proj", "down_proj"])
    adapted.add_adapter("second", LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], init_lora_weights=False))
    adapted.base_model.set_adapter(["default", "second"])
    adapter = export_lora_gguf(adapted.eval(), tmp_path / "adapter.gguf")
    with LlamaCpp(base, context=256, lora=adapter) as judge:
        assert (judge.logits(ids[0].tolist()) - logits_of(adapted, ids)).abs().max() < 1e-4


def test_tokenizer_of_the_demo(tokenizer, tmp_path):
    path = export_gguf(gguf_model("qwen2"), tokenizer, tmp_path, "f32", progress=False).files[0].path
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "17 + 25 = ?\n\n  'S é漢 🦙"}], tokenize=False)
    with LlamaCpp(path, vocabulary_only=True) as judge:
        assert judge.tokenize(chat) == tokenizer(chat)["input_ids"]
        assert judge.detokenize(judge.tokenize(chat), special=True) == chat
        assert judge.ends_generation(tokenizer.eos_token_id) and judge.eot == tokenizer.eos_token_id
        assert not judge.add_bos and judge.bos == tokenizer.bos_token_id


def test_file_cut_short_is_refused(tokenizer, tmp_path):
    path = export_gguf(gguf_model("qwen2"), tokenizer, tmp_path, "f32", progress=False).files[0].path
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(LoadError, match=r"llama\.cpp cannot load it"):
        LlamaCpp(path)
    with pytest.raises(LoadError, match="cut short"):
        read_gguf(path)


# Where llama.cpp's sources are at hand --------------------------------------------------------------------------------


@needs_source
@pytest.mark.slow
@pytest.mark.parametrize("name", vocabularies.NAMES)
def test_real_vocabularies(name, tmp_path):
    tokenizer = vocabularies.real_tokenizer(name)
    vocabulary = vocabulary_of(tokenizer, max(tokenizer.get_vocab().values()) + 1)
    path = tmp_path / "vocabulary.gguf"
    with FileWriter(path, {"general.architecture": text("llama")} | vocabulary.metadata, []) as file:
        file.finish()
    with LlamaCpp(path, vocabulary_only=True) as judge:
        for given, ids in vocabularies.vectors(name):
            assert judge.tokenize(given, add_special=False) == ids
            assert judge.tokenize(given) == tokenizer(given)["input_ids"]
            if name != "bert-bge" and not tokenizer.clean_up_tokenization_spaces:
                assert judge.detokenize(ids).strip() == given.strip()


# Converter's keys that fastft leaves out or gives otherwise, and why.
EXPLAINED = {
    "general.name": "the folder's name as it is, not in title case",
    "general.size_label": "a label for lists of models",
    "tokenizer.ggml.pre": "another of llama.cpp's names for the same splits",
    "tokenizer.ggml.add_bos_token": "always stated",
    "tokenizer.ggml.add_eos_token": "always stated",
    "tokenizer.ggml.add_space_prefix": "always stated for SentencePiece",
    "tokenizer.ggml.eot_token_id": "from the chat template and the generation config",
    "tokenizer.ggml.eom_token_id": "from the generation config",
    "tokenizer.ggml.padding_token_id": "the tokenizer's, not that of config.json",
    "tokenizer.ggml.unknown_token_id": "the tokenizer's; byte-level ones never use it",
    "tokenizer.ggml.token_type": "the unknown token is of type unknown, not control",
    "tokenizer.ggml.scores": "of control tokens, which are never merged",
    "vocab_size": "always stated",
    "attention.key_length": "always stated",
    "attention.value_length": "always stated",
    "rope.dimension_count": "always stated",
    "rope.freq_base": "always stated",
    "rope.scaling.type": "llama.cpp's default",
    "attention.sliding_window_pattern": "only stated where llama.cpp would assume another",
}
CONVERTED = {
    "llama-llama3": "llama-bpe",
    "llama-biases": "qwen2",
    "qwen2": "qwen2",
    "qwen3": "qwen2",
    "granite": "refact",
    "olmo2": "gpt-2",
    "phi3-short": "phi-3",
    "gemma2": "llama-spm",
    "gemma3": "llama-spm",
    "glm4": "qwen2",
}
"""Families, and a vocabulary that llama.cpp's converter takes for each."""


def sentencepiece_model(folder, name):
    """Write the tokenizer.model that llama.cpp's converter wants for SentencePiece vocabularies."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    keys = read_gguf(vocabularies.source() / "models" / f"ggml-vocab-{name}.gguf").metadata
    model = proto.ModelProto()
    columns = (keys[f"tokenizer.ggml.{column}"][:32000] for column in ("tokens", "scores", "token_type"))
    for piece, score, kind in zip(*columns):
        model.pieces.add(piece=piece, score=score, type=kind)
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = 2, True
    model.normalizer_spec.name = "identity"
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())


@needs_source
@pytest.mark.slow
@pytest.mark.parametrize("name", CONVERTED)
def test_same_file_as_llama_cpp_s_converter(name, tmp_path):
    vocabulary, source = CONVERTED[name], vocabularies.source()
    tokenizer = vocabularies.real_tokenizer(vocabulary)
    if name == "glm4":  # the converter looks for it
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    model = gguf_model(name, max(tokenizer.get_vocab().values()) + 1, torch.bfloat16)
    folder, theirs = tmp_path / "model", tmp_path / "theirs.gguf"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if vocabulary in ("llama-spm", "phi-3"):
        sentencepiece_model(folder, vocabulary)
    command = [sys.executable, source / "convert_hf_to_gguf.py", folder, "--outfile", theirs, "--outtype", "f16"]
    environment = {**os.environ, "PYTHONPATH": str(source / "gguf-py")}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    report = export_gguf(folder, None, tmp_path, "f16", progress=False)
    ours, theirs = read_gguf(report.files[0].path), read_gguf(theirs)
    assert ours.tensors == theirs.tensors
    for tensor in theirs.tensors:
        assert np.array_equal(ours.data(tensor), theirs.data(tensor)), tensor
    different = {
        key.removeprefix(f"{ours.metadata['general.architecture']}.")
        for key in ours.metadata.keys() | theirs.metadata.keys()
        if ours.metadata.get(key) != theirs.metadata.get(key)
    }
    assert different <= set(EXPLAINED), different - set(EXPLAINED)
