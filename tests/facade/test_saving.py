"""The saving methods that FastLanguageModel puts on its models."""

import copy
import json
import pickle

import peft
import pytest
import torch
import transformers

from fastft import FastLanguageModel
from fastft.errors import UsageError
from fastft.facade.saving import METHODS


@pytest.fixture
def trained(folder):
    model, tokenizer = FastLanguageModel.from_pretrained(folder, load_in_4bit=True, dtype="float32")
    model = FastLanguageModel.get_peft_model(model, r=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.01)
    return model.eval(), tokenizer


IDS = torch.arange(3, 40)[None]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits.double()


def relative(truth, value):
    return ((value - truth).norm() / truth.norm()).item()


def test_methods_are_the_objects_own(trained):
    model, _ = trained
    for function in METHODS:
        assert function.__name__ in vars(model)
        assert not hasattr(type(model), function.__name__)
        assert not hasattr(transformers.PreTrainedModel, function.__name__)
        assert not hasattr(peft.PeftModel, function.__name__)
    # a copy's methods are the copy's, not the first one's
    other = copy.deepcopy(model)
    assert other.save_pretrained_merged.args == (other,)
    assert pickle.loads(pickle.dumps(model.save_pretrained_merged)).args[0] is not model
    assert set(other.state_dict()) == set(model.state_dict())


def test_merged_16bit(trained, tmp_path):
    model, tokenizer = trained
    model.save_pretrained_merged(tmp_path / "a", tokenizer, save_method="merged_16bit")
    model.save_pretrained_merged(str(tmp_path / "b"), tokenizer, dtype="float32")
    for name, dtype, error in (("a", torch.bfloat16, 0.01), ("b", torch.float32, 3e-6)):
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert merged.dtype is dtype
        assert relative(logits(model), logits(merged.float())) < error
        transformers.AutoTokenizer.from_pretrained(tmp_path / name)


def test_lora(trained, tmp_path, folder):
    model, tokenizer = trained
    model.save_pretrained_merged(tmp_path / "a", tokenizer, save_method="lora")
    again, _ = FastLanguageModel.from_pretrained(str(tmp_path / "a"), load_in_4bit=True, dtype="float32")
    assert torch.equal(logits(model), logits(again.eval()))
    again.save_pretrained_merged(tmp_path / "b", save_method="merged_4bit_forced")
    config = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert (config["load_in_4bit"], config["bnb_4bit_quant_type"]) == (True, "nf4")


def test_fp8(trained, tmp_path):
    model, tokenizer = trained
    model.save_pretrained_torchao(tmp_path / "a", tokenizer)
    assert (
        json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]["format"] == "float-quantized"
    )
    with pytest.raises(UsageError, match="torchao_config"):
        model.save_pretrained_torchao(tmp_path / "b", torchao_config="int4")


def test_gguf(trained, tmp_path, capsys):
    model, tokenizer = trained
    model.save_pretrained_gguf(tmp_path / "a", tokenizer, quantization_method=["not_quantized", "q8_0"])
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {"model-f16.gguf", "model-q8_0.gguf", "Modelfile.model-f16", "Modelfile.model-q8_0"}
    model.save_pretrained_gguf(tmp_path / "b", tokenizer)
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"model-q8_0.gguf", "Modelfile"}
    model.save_pretrained_gguf(tmp_path / "c", tokenizer, save_method="lora")
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["adapter.gguf"]
    other = copy.copy(tokenizer)
    other.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} ~{% endfor %}"
    capsys.readouterr()
    model.save_pretrained_gguf(tmp_path / "d", other, "f16")
    assert "no Modelfile was written: Modelfile: the tokenizer's chat template is none" in capsys.readouterr().out
    with pytest.raises(UsageError, match="quants: expected one of"):
        model.save_pretrained_gguf(tmp_path / "e", tokenizer, "q4_9")
    with pytest.raises(UsageError, match="quants: expected one or several of f32"):
        model.save_pretrained_gguf(tmp_path / "e", tokenizer, 4)
    made = model.save_pretrained_gguf(tmp_path / "e", tokenizer, None)
    assert [file.quant for file in made.files] == ["q8_0"]


def test_the_adapter_as_gguf(trained, tmp_path):
    model, tokenizer = trained
    # the demo's head is tied and bears no adapter
    made = model.save_pretrained_gguf(tmp_path / "a" / "b", tokenizer, ["f16"], save_method="lora")
    assert made == tmp_path / "a" / "b" / "adapter.gguf"
    assert made.read_bytes()[:4] == b"GGUF"
    for wrong in ("q8_0", ["f16", "f32"], [["f16"]]):
        with pytest.raises(UsageError, match=r"quant.*: expected one of"):
            model.save_pretrained_gguf(tmp_path / "c", tokenizer, wrong, save_method="lora")
    assert not (tmp_path / "c").exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="this is a file"):
        model.save_pretrained_gguf(tmp_path / "file", tokenizer, save_method="lora")


def test_4bit_is_refused_unless_forced(trained, tmp_path):
    model, tokenizer = trained
    with pytest.raises(UsageError, match="merged_4bit_forced"):
        model.save_pretrained_merged(tmp_path / "a", tokenizer, save_method="merged_4bit")
    with pytest.raises(UsageError, match="did you mean 'merged_16bit'"):
        model.save_pretrained_merged(tmp_path / "a", tokenizer, save_method="merged_16bits")
    with pytest.raises(UsageError, match="dtype"):
        model.save_pretrained_merged(tmp_path / "a", tokenizer, dtype="int3")
    with pytest.raises(UsageError, match=r"push_to_hub.*to be left out"):
        model.save_pretrained_merged(tmp_path / "a", tokenizer, push_to_hub=True)
    with pytest.raises(UsageError, match="did you mean 'save_method'"):
        model.save_pretrained_merged(tmp_path / "a", tokenizer, savemethod="lora")
    assert not (tmp_path / "a").exists()


def test_idle_arguments_are_told(trained, tmp_path, capsys):
    model, tokenizer = trained
    model.save_pretrained_merged(tmp_path / "a", tokenizer, maximum_memory_usage=0.5, push_to_hub=False, token="hf_x")
    told = capsys.readouterr().out
    assert "maximum_memory_usage=0.5) has no effect" in told
    assert "token='(not shown)') has no effect: nothing is sent here" in told
    assert "hf_x" not in told


@pytest.mark.parametrize("method", ["push_to_hub_merged", "push_to_hub_gguf"])
def test_pushing_is_refused_before_any_work(trained, method, monkeypatch):
    import huggingface_hub

    import fastft.export.merge as merging
    from fastft.export import hub

    model, tokenizer = trained
    monkeypatch.setattr(merging, "merge", lambda *a, **k: pytest.fail("merged before the hub was asked"))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UsageError, match="there is no token"):
        getattr(model, method)("me/mine", tokenizer)
    monkeypatch.setattr(hub, "hub_offline", lambda: True)
    with pytest.raises(UsageError, match="switched off"):
        getattr(model, method)("me/mine", tokenizer, token="t")


def test_pushing_sends_what_saving_writes(trained, monkeypatch):
    from fastft.export import hub

    model, tokenizer = trained
    sent = []
    monkeypatch.setattr(hub, "check_push", lambda *a: None)

    def keep(folder, repo, **how):
        sent.append((repo, how["private"], sorted(path.name for path in folder.iterdir())))

    monkeypatch.setattr(hub, "push", keep)
    model.push_to_hub_merged("me/mine", tokenizer, private=True)
    repo, private, names = sent[0]
    assert (repo, private) == ("me/mine", True)
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(names)
