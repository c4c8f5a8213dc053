"""Weights of a model or folder: names, and base plus adapters, against the model's own forward."""

import copy
import json

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import fastft
from fastft.demo import MODEL_FOLDER
from fastft.errors import LoadError, UsageError
from fastft.export.folder import run_record
from fastft.export.weights import weight_source


def plain_model(source):
    """Return a transformers model in fp32 that holds what the source reads."""
    model = AutoModelForCausalLM.from_config(copy.deepcopy(source.config), dtype=torch.float32)
    found = model.load_state_dict({name: source.read(name) for name in source.names}, strict=False)
    assert not found.unexpected_keys
    assert set(found.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    return model


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_names_and_numbers_are_those_of_save_pretrained(family, tmp_path):
    model = tiny.make(family, torch.float32, lora=False)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    source = weight_source(model)
    assert set(source.names) == set(stored)
    for name in source.names:
        assert source.shape(name) == tuple(stored[name].shape)
        assert torch.equal(source.read(name), stored[name])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_lora_of_every_family(family, tools):
    _, logits, relative = tools
    model = tiny.make(family, torch.float32, lora=True)
    source = weight_source(model)
    assert relative(logits(model, vocabulary=250), logits(plain_model(source), vocabulary=250)) < 2e-6
    adapted = {weight.module for weight in source.weights.values() if weight.adapted}
    assert len(adapted) == sum("lora_A" in name for name, _ in model.named_parameters())


OPTIONS = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "biases": {"bias": "all"},
    "whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "rows": {"train_tokens": [5, 6, 7]},
    "head": {"targets": ["q_proj", "lm_head"]},
    "embeddings": {"targets": ["q_proj", "embed_tokens"]},
    "dora embeddings": {"targets": ["q_proj", "embed_tokens"], "dora": True},
}


@pytest.mark.parametrize("quant", [None, "nf4"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_adapters_of_every_kind(quant, options, adapted, tools):
    _, logits, relative = tools
    model, _ = adapted(quant, **options)
    source = weight_source(model)
    assert relative(logits(model), logits(plain_model(source))) < 3e-6
    # the embeddings and the head of this model are one weight; DoRA on both makes them two
    assert source.config.tie_word_embeddings is ("lm_head.weight" not in source.names)
    assert bool(source.notes) is (options == OPTIONS["dora embeddings"])


def test_an_adapter_on_the_head_alone_unties_it(tools):
    from peft import LoraConfig, get_peft_model

    shake, logits, relative = tools
    model = tiny.make("llama", torch.float32, lora=False, tie_word_embeddings=True)
    assert "lm_head.weight" not in weight_source(model).names
    model = shake(get_peft_model(model, LoraConfig(target_modules=["lm_head"], r=4)))
    source = weight_source(model)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(source.names)
    assert source.config.tie_word_embeddings is False
    assert relative(logits(model, vocabulary=250), logits(plain_model(source), vocabulary=250)) < 2e-6
    assert model.config.tie_word_embeddings is True  # the model's own config is left alone


def test_several_adapters(adapted, tools):
    shake, logits, relative = tools
    model, _ = adapted(dora=True)
    model.add_adapter("two", model.peft_config["default"])
    model.base_model.set_adapter(["default", "two"])
    shake(model, seed=2)
    both = logits(model)
    assert relative(both, logits(plain_model(weight_source(model)))) < 3e-6
    model.base_model.set_adapter("two")
    assert relative(both, logits(model)) > 0.01
    assert relative(logits(model), logits(plain_model(weight_source(model)))) < 3e-6


def test_adapters_that_are_off_or_merged(adapted, tools):
    _, logits, relative = tools
    model, _ = adapted()
    on = logits(model)
    with model.disable_adapter():
        off = logits(plain_model(weight_source(model)))
        assert relative(logits(model), off) < 1e-6
    assert relative(on, off) > 0.01
    model.merge_adapter()
    assert relative(on, logits(plain_model(weight_source(model)))) < 3e-6


def test_int8_is_within_what_int8_rounds(adapted, tools):
    """bitsandbytes also rounds the inputs of its layers to int8, which dequantised weights do not."""
    _, logits, relative = tools
    model, _ = adapted("int8", dtype="float32")
    source = weight_source(model)
    assert relative(logits(model), logits(plain_model(source))) < 0.04
    name = "model.layers.0.mlp.up_proj.weight"
    true, held = weight_source(MODEL_FOLDER).read(name), source.read_base(name)
    # each number is rounded to the nearest of 127 steps of its row's largest magnitude
    assert ((held - true).abs() <= true.abs().amax(1, keepdim=True) / 127 * 0.51).all()


def test_original_base_replaces_what_is_quantised_alone(adapted):
    model, _ = adapted("nf4")
    ours, original = weight_source(model), weight_source(model, base="original")
    stored = load_file(MODEL_FOLDER / "model.safetensors")
    for name in ours.names:
        weight = original.weights[name]
        assert torch.equal(original.read_base(name), stored[name].float())
        if weight.adapted:
            delta = ours.read(name) - ours.read_base(name)
            assert (original.read(name) - weight.read_base() - delta).abs().max() < 1e-6
            assert not torch.equal(ours.read_base(name), weight.read_base())


def test_original_base_is_refused_where_it_would_be_wrong(tmp_path):
    model, tokenizer = fastft.load(MODEL_FOLDER, quant="nf4")
    with pytest.raises(UsageError, match=r"LoftQ.*dequantised"):
        weight_source(fastft.add_lora(model, init="loftq"), base="original")
    model, tokenizer = fastft.load(MODEL_FOLDER, quant="nf4")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    stored, _ = fastft.load(tmp_path)
    with pytest.raises(UsageError, match="itself stored quantised"):
        weight_source(stored, base="original")
    with pytest.raises(UsageError, match="did you mean 'original'"):
        weight_source(model, base="orginal")


def test_added_tokens_from_the_adapter_folder(tmp_path, tools):
    shake, _, relative = tools
    model, tokenizer = fastft.load(MODEL_FOLDER, dtype="float32")
    fastft.add_tokens(model, tokenizer, ["<one>", "<two>"])
    model = shake(fastft.add_lora(model, r=4))
    ids = torch.tensor([[5, *tokenizer.convert_tokens_to_ids(["<one>", "<two>"]), 9]])
    want = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for given in (model, tmp_path):
        source = weight_source(given)
        assert source.config.vocab_size == len(tokenizer)
        assert relative(want, plain_model(source)(input_ids=ids).logits) < 2e-6


def test_a_run_folder_tells_how_its_base_was_held(tmp_path, adapted):
    model, tokenizer = adapted("nf4", dtype="float32")
    rows = [{"prompt": f"{n} and one is", "completion": f" {n + 1}"} for n in range(10, 42)]
    fastft.compile(model, backend="aot_eager")
    fastft.sft(model, tokenizer, rows, output_dir=tmp_path / "run", steps=2, save_every=2, save_strategy="steps")
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-2"):
        source = weight_source(folder)
        assert source.state.quant == "nf4"
        trained = weight_source(model)
        for name in trained.names:
            assert torch.equal(source.read(name), trained.read(name)), name
        fastft.merge(folder, tmp_path / "out")
        assert (tmp_path / "out" / "run.json").read_text() == (tmp_path / "run" / "run.json").read_text()


@pytest.mark.parametrize(("of_run", "told"), [("a", "complete"), ("b", "running")])
def test_a_checkpoints_record_is_that_of_its_run_or_its_own(tmp_path, of_run, told):
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    own = {"status": "running", "runs": [{"id": "a", "from_step": 0}]}
    (folder / "run.json").write_text(json.dumps(own), "utf-8")
    beside = {"status": "complete", "runs": [{"id": of_run, "from_step": 0}]}
    (tmp_path / "run.json").write_text(json.dumps(beside), "utf-8")
    assert run_record(folder)["status"] == told and run_record(tmp_path)["status"] == "complete"


def test_a_sharded_checkpoint_is_read_from_its_files(tmp_path):
    model = tiny.make("llama", torch.bfloat16, lora=False)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    source = weight_source(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert source.folder == tmp_path.resolve()
    for name, value in model.state_dict().items():
        assert source.dtype(name) == torch.bfloat16
        assert torch.equal(source.read(name), value.float())


def test_what_cannot_be_merged_is_refused(tmp_path):
    from peft import LoHaConfig, PrefixTuningConfig, get_peft_model

    model = tiny.make("llama", torch.float32, lora=False)
    loha = get_peft_model(copy.deepcopy(model), LoHaConfig(target_modules=["q_proj"]))
    with pytest.raises(UsageError, match=r"q_proj: an adapter of the kind Linear|q_proj: an adapter of the kind LoHa"):
        weight_source(loha)
    prefix = get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(UsageError, match="learns inputs and changes no weight"):
        weight_source(prefix)
    with pytest.raises(UsageError, match="a model, or the path of a folder"):
        weight_source({"a": 1})
    with pytest.raises(LoadError, match="no weights, no adapter and no checkpoint"):
        weight_source(tmp_path)
