"""What each argument of the familiar names does, and what is said to those that mean nothing or cannot work."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import BitsAndBytesConfig

import fastft
from fastft import FastLanguageModel, FastModel, FastVisionModel, is_bfloat16_supported
from fastft.errors import UsageError
from fastft.graph.compile import compile as compile_layers
from fastft.model.tokenizer import load_tokenizer
from fastft.state import base_model, get_state

from_pretrained, get_peft_model = FastLanguageModel.from_pretrained, FastLanguageModel.get_peft_model
INT8, FP4 = BitsAndBytesConfig(load_in_8bit=True), BitsAndBytesConfig(load_in_4bit=True)
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
SEVEN = ATTENTION | {"gate_proj", "up_proj", "down_proj"}


def said(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("fastft: ")]


def problems(call, *args, **kwargs):
    with pytest.raises(UsageError) as caught:
        call(*args, **kwargs)
    return [str(problem) for problem in caught.value.problems]


@pytest.fixture
def small(folder):
    """The demo model in fp32, unquantised: quick to load."""
    return from_pretrained(folder, load_in_4bit=False, dtype=torch.float32)[0]


# -- loading
@pytest.mark.parametrize(
    ("arguments", "quant", "trainable"),
    [
        ({}, "nf4", False),
        ({"load_in_4bit": True, "load_in_8bit": False}, "nf4", False),
        ({"load_in_8bit": True}, "int8", False),
        ({"load_in_4bit": False, "load_in_8bit": True}, "int8", False),
        ({"load_in_4bit": False}, None, False),
        ({"load_in_16bit": True}, None, False),
        ({"full_finetuning": True}, None, True),
        ({"full_finetuning": True, "load_in_4bit": False, "load_in_16bit": True}, None, True),
        ({"quantization_config": INT8}, "int8", False),
        ({"quantization_config": NF4, "load_in_4bit": True}, "nf4", False),
    ],
)  # fmt: skip
def test_one_quantisation_is_chosen(arguments, quant, trainable, folder, capsys):
    model, _ = from_pretrained(model_name=folder, **arguments)
    weight = model.model.layers[0].mlp.up_proj.weight
    kinds = {"nf4": "Params4bit", "int8": "Int8Params", None: "Parameter"}
    assert get_state(model).quant == quant and type(weight).__name__ == kinds[quant]
    assert get_state(model).full is trainable is weight.requires_grad
    lines = said(capsys)
    assert len(lines) == (1 if arguments == {"full_finetuning": True} else 0)
    assert all("load_in_4bit" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, ["load_in_4bit, load_in_8bit"]),
        ({"load_in_8bit": True, "load_in_16bit": True}, ["load_in_8bit, load_in_16bit"]),
        ({"full_finetuning": True, "load_in_4bit": True}, ["full_finetuning"]),
        ({"full_finetuning": True, "load_in_8bit": True}, ["full_finetuning"]),
        ({"quantization_config": INT8, "load_in_4bit": True}, ["quantization_config, load_in_4bit"]),
        ({"quantization_config": FP4}, ["quantization_config"]),
        ({"dtype": torch.float32, "torch_dtype": "float16"}, ["dtype, torch_dtype"]),
        ({"device_map": {"model.layers.0": 0, "lm_head": 1}}, ["device_map"]),
        ({"device_map": "gpu"}, ["device_map"]),
        ({"use_gradient_checkpointing": "unslot"}, ["use_gradient_checkpointing"]),
        ({"dtype": "int4", "max_seq_length": 0}, ["dtype", "max_seq_length"]),
    ],
)  # fmt: skip
def test_what_cannot_work_together_is_refused(arguments, names, folder):
    found = problems(from_pretrained, folder, **arguments)
    assert sorted(text.removeprefix("from_pretrained ").split(": ")[0] for text in found) == sorted(names)


def test_all_mistakes_of_loading_at_once_with_what_to_do(folder):
    found = problems(
        from_pretrained, folder, max_seq_lenght=512, load_in_fp8="block", qat_scheme="int4",
        rope_scaling={"type": "linear"}, load_in_8bit=True, load_in_16bit=True, nothing_like_it=1,
    )  # fmt: skip
    text = "\n".join(found)
    assert len(found) == 6
    assert "unknown argument 'max_seq_lenght'; did you mean 'max_seq_length'?" in text
    assert "unknown argument 'nothing_like_it'" in text
    for name, remedy in {
        "load_in_fp8": "load_in_4bit=True",
        "qat_scheme": "quantise afterwards",
        "rope_scaling": "max_seq_length",
    }.items():
        assert any(line.startswith(f"from_pretrained {name}:") and remedy in line for line in found), name


def test_idle_arguments_are_explained_in_one_line_each(folder, capsys):
    idle = {
        "unsloth_tiled_mlp": True,
        "float32_mixed_precision": True,
        "use_exact_model_name": True,
        "device_map": "sequential",
        "gpu_memory_utilization": 0.6,
        "max_lora_rank": 32,
        "temporary_location": "buffers",
        "random_state": 3407,
    }
    from_pretrained(folder, load_in_4bit=False, **idle)
    lines = said(capsys)
    assert sorted(re.match(r"fastft: from_pretrained\((\w+)=", line)[1] for line in lines) == sorted(idle)


def test_arguments_that_ask_for_nothing_are_silent(folder, capsys):
    off = dict.fromkeys(("fast_inference", "load_in_fp8", "offload_embedding", "unsloth_tiled_mlp"), False)
    none = dict.fromkeys(("qat_scheme", "device_map", "rope_scaling", "token"))
    quiet = {**off, **none, "fix_tokenizer": True}
    from_pretrained(folder, load_in_4bit=False, **quiet)
    assert said(capsys) == []
    from_pretrained(folder, load_in_4bit=False, fix_tokenizer=False)
    assert len(said(capsys)) == 1


@pytest.mark.parametrize(
    ("given", "length"), [({}, 512), ({"max_seq_length": None}, 512), ({"max_seq_length": 256}, 256)]
)
def test_the_default_length_stretches_nothing(given, length, folder):
    model, tokenizer = from_pretrained(folder, load_in_4bit=False, **given)
    assert get_state(model).max_length == length == tokenizer.model_max_length
    assert model.config.rope_parameters["rope_type"] == "default"


def test_a_length_that_is_asked_for_widens_rope_and_the_default_caps_a_longer_one(folder, tmp_path):
    model, tokenizer = from_pretrained(folder, max_seq_length=2048, load_in_4bit=False)
    assert model.config.rope_parameters["factor"] == 4.0 and tokenizer.model_max_length == 2048
    long = tmp_path / "long"
    shutil.copytree(folder, long)
    config = json.loads((long / "config.json").read_text())
    (long / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    model, tokenizer = from_pretrained(long, load_in_4bit=False)
    assert get_state(model).max_length == 2048 == tokenizer.model_max_length
    assert model.config.max_position_embeddings == 8192 and model.config.rope_parameters["rope_type"] == "default"


def test_dtype_device_and_attention_arrive(folder):
    model, _ = from_pretrained(
        folder, load_in_4bit=False, torch_dtype="float16", device_map={"": "cpu"}, attn_implementation="eager"
    )
    assert model.dtype == torch.float16 and model.config._attn_implementation == "eager" and model.device.type == "cpu"


def test_a_checkpoint_stored_in_8_bits_is_taken_as_it_is(folder, tmp_path, capsys):
    model, tokenizer = from_pretrained(folder, load_in_8bit=True)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = from_pretrained(str(tmp_path))
    assert get_state(again).quant == "int8"
    assert len(said(capsys)) == 1
    with pytest.raises(UsageError, match="stored as int8"):
        from_pretrained(str(tmp_path), load_in_4bit=True)


# -- adapters
def test_the_adapter_that_the_arguments_describe(small, capsys):
    model = get_peft_model(
        small, r=8, lora_alpha=32, lora_dropout=0.1, bias="lora_only", use_rslora=True, use_dora=True, random_state=7,
        target_modules=["q_proj", "up_proj"], layers_to_transform=[1, 3], loftq_config={}, init_lora_weights="gaussian",
        use_gradient_checkpointing=False, max_seq_length=512, rank_pattern={"up_proj": 4},
    )  # fmt: skip
    config = model.peft_config["default"]
    asked = (config.r, config.lora_alpha, config.lora_dropout, config.bias, config.use_rslora, config.use_dora)
    assert asked == (8, 32, 0.1, "lora_only", True, True)
    assert config.target_modules == {"q_proj", "up_proj"} and config.init_lora_weights == "gaussian"
    names = {name for name, _ in model.named_parameters() if "lora_A" in name}
    assert {re.search(r"layers\.(\d+)\.\w+\.(\w+)", name).groups() for name in names} == {
        (layer, part) for layer in "13" for part in ("q_proj", "up_proj")
    }
    assert model.base_model.model.model.layers[1].mlp.up_proj.lora_A["default"].weight.shape == (4, 256)
    assert model.training and said(capsys) == []


def test_defaults_are_the_familys_list_rank_16_and_a_fixed_seed(folder):
    made = [FastModel.get_peft_model(from_pretrained(folder, load_in_4bit=False)[0]) for _ in range(2)]
    config = made[0].peft_config["default"]
    assert set(config.target_modules) == SEVEN and (config.r, config.lora_alpha) == (16, 16)
    first, second = (dict(model.named_parameters()) for model in made)
    adapters = [name for name in first if "lora_" in name]
    assert len(adapters) == 70 and all(torch.equal(first[name], second[name]) for name in adapters)
    other = fastft.add_lora(from_pretrained(folder, load_in_4bit=False)[0], seed=3407)
    assert all(torch.equal(first[name], value) for name, value in other.named_parameters() if "lora_" in name)


@pytest.mark.parametrize(
    ("arguments", "targets", "layers"),
    [
        ({"finetune_mlp_modules": False}, ATTENTION, None),
        ({"finetune_attention_modules": False}, {"gate_proj", "up_proj", "down_proj"}, None),
        ({"finetune_mlp_modules": False, "target_modules": ["q_proj", "up_proj"]}, {"q_proj"}, None),
        ({"finetune_mlp_modules": False, "target_modules": "all-linear"}, ATTENTION, None),
        ({"finetune_last_n_layers": 2}, SEVEN, [3, 4]),
    ],
)  # fmt: skip
def test_parts_of_the_model(arguments, targets, layers, small):
    config = get_peft_model(small, **arguments).peft_config["default"]
    assert set(config.target_modules) == targets and config.layers_to_transform == layers


def test_all_mistakes_of_the_adapter_at_once_under_the_names_used_here(small, capsys):
    found = problems(
        get_peft_model, small, r=0, lora_alpha=0, lora_dropout=2, target_modules=["q_prj"], init_lora_weights="gausian",
        lora_alhpa=3, qat_scheme="int4", task_type="SEQ_CLS", finetune_language_layers=False, layers_to_transform=[1],
        finetune_last_n_layers=3, use_gradient_checkpointing="on",
    )  # fmt: skip
    text = "\n".join(found)
    for name in ("r", "lora_alpha", "lora_dropout", "target_modules", "init_lora_weights", "qat_scheme", "task_type",
                 "finetune_language_layers", "finetune_last_n_layers", "use_gradient_checkpointing"):  # fmt: skip
        assert f"get_peft_model {name}: " in text, name
    assert "unknown argument 'lora_alhpa'; did you mean 'lora_alpha'?" in text and "'q_proj'" in text
    assert len(found) == 11 and said(capsys) == [] and not hasattr(small, "peft_config")


def test_idle_arguments_of_the_adapter(small, capsys):
    get_peft_model(
        small, temporary_location="buffers", max_seq_length=1024, finetune_vision_layers=True, offload_layers=4,
        loftq_config={"loftq_bits": 4}, ensure_weight_tying=True,
    )  # fmt: skip
    lines = said(capsys)
    assert len(lines) == 5
    for name in ("temporary_location", "max_seq_length", "finetune_vision_layers", "offload_layers", "loftq_config"):
        assert sum(name in line for line in lines) == 1, name


def test_loftq_is_4_bits_and_one_step(folder, small):
    assert len(problems(get_peft_model, small, init_lora_weights="loftq", loftq_config={"loftq_bits": 2})) == 2
    nf4, _ = from_pretrained(folder)
    model = get_peft_model(nf4, init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1})
    assert model.base_model.model.model.layers[0].mlp.up_proj.lora_B["default"].weight.abs().max() > 0


@pytest.mark.parametrize("head", [False, True])
def test_embeddings_named_as_targets_are_trained_whole(head, small, capsys):
    targets = ["q_proj", "embed_tokens"] + ["lm_head"] * head
    model = get_peft_model(small, target_modules=targets, use_gradient_checkpointing=True)
    (line,) = said(capsys)
    assert ("embed_tokens and lm_head" if head else "embed_tokens of") in line
    ids = torch.arange(5, 25)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    grads = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert any("embed_tokens.modules_to_save" in name for name in grads) and len(grads) == 6  # A is zero-gradient
    base = base_model(model)
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight  # the tied head stays tied


def test_a_second_call_goes_on_with_the_same_adapter_and_refuses_another(small, capsys):
    model = get_peft_model(small, r=8, target_modules=["q_proj"])
    assert get_peft_model(model, r=8, target_modules=("q_proj",)) is model
    assert len(said(capsys)) == 1
    found = problems(get_peft_model, model, r=16, target_modules=["q_proj", "v_proj"])
    assert [text.split(":")[0] for text in found] == ["get_peft_model r", "get_peft_model target_modules"]


def test_full_finetuning_needs_no_adapter(folder, capsys):
    model, _ = from_pretrained(folder, full_finetuning=True, load_in_4bit=False)
    assert get_peft_model(model, r=8) is model and not hasattr(model, "peft_config")
    assert all(p.requires_grad for p in model.parameters()) and len(said(capsys)) == 1
    assert "unknown argument" in problems(get_peft_model, model, lora_alhpa=3)[0]


# -- modes
@pytest.mark.parametrize(
    ("at_load", "at_adapter", "plan"),
    [
        ("unsloth", None, "min"),
        (True, None, "min"),
        (False, None, "keep"),
        (False, "unsloth", "min"),
        ("unsloth", False, "keep"),
    ],
)  # fmt: skip
def test_gradient_checkpointing_is_the_memory_plan(at_load, at_adapter, plan, folder):
    model, _ = from_pretrained(folder, load_in_4bit=False, use_gradient_checkpointing=at_load)
    model = get_peft_model(model, use_gradient_checkpointing=at_adapter)
    assert get_state(model).plan == plan
    assert compile_layers(model, backend="eager") is model and fastft.report(model).plan == plan
    compile_layers(model, plan="keep" if plan == "min" else "min", backend="eager")
    assert fastft.report(model).plan != plan  # what compile is told goes first
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_without_the_familiar_names_the_plan_is_the_default_of_compile(folder):
    model, _ = fastft.load(folder)
    assert fastft.report(compile_layers(model, backend="eager")).plan == "auto"


def test_modes(folder, capsys):
    model, tokenizer = from_pretrained(folder, load_in_4bit=False)
    model = compile_layers(get_peft_model(model, lora_dropout=0.5), backend="eager")
    assert FastLanguageModel.for_inference(model) is model
    assert not any(module.training for module in model.modules())
    assert tokenizer.padding_side == "left" and model.config.use_cache is True
    assert model(input_ids=torch.arange(4, 8)[None]).past_key_values is not None
    assert FastLanguageModel.for_training(model) is model
    assert all(module.training for module in model.modules())
    assert tokenizer.padding_side == "right" and model.config.use_cache is False
    assert model(input_ids=torch.arange(4, 8)[None]).past_key_values is None
    assert get_state(model).plan == "min" and said(capsys) == []
    FastLanguageModel.for_training(model, use_gradient_checkpointing=False)
    assert get_state(model).plan == "keep"
    (line,) = said(capsys)
    assert "'min'" in line and "fastft.compile(model)" in line


@pytest.mark.parametrize("call", [FastLanguageModel.for_inference, FastLanguageModel.for_training, get_peft_model])
def test_a_tokenizer_in_place_of_the_model_is_refused(call, folder):
    tokenizer = load_tokenizer(Path(folder))
    assert "tokenizer" in problems(call, tokenizer)[0]


def test_vision_is_refused_plainly(folder):
    for call in (FastVisionModel.from_pretrained, FastVisionModel.get_peft_model, FastVisionModel.for_inference):
        assert "not supported yet" in problems(call, folder, load_in_4bit=True)[0]


def test_bfloat16_follows_the_gpu(monkeypatch):
    for there, able, answer in [(False, False, True), (True, True, True), (True, False, False)]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True, able=able: able)
        assert is_bfloat16_supported() is answer
