"""fast_generate, save_lora and load_lora, as scripts call them, without vLLM."""

import pytest
import torch

import fastft
from fastft.errors import LoadError, UsageError
from fastft.facade.inference import SERVED
from fastft.facade.models import FastLanguageModel
from fastft.rollout import make_engine

QUESTION = [{"role": "user", "content": "What is 12 + 13?"}]
GREEDY = fastft.vLLMSamplingParams(temperature=0.0, max_tokens=8)


@pytest.fixture
def loaded(folder, monkeypatch, capsys):
    monkeypatch.setattr("fastft.facade.inference.installed", lambda package: False)
    model, tokenizer = FastLanguageModel.from_pretrained(
        folder, max_seq_length=128, load_in_4bit=False, dtype=torch.float32, fast_inference=True,
        max_lora_rank=16, gpu_memory_utilization=0.6,
    )  # fmt: skip
    return FastLanguageModel.get_peft_model(model, r=4), tokenizer


def spoil(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def test_without_vllm_it_is_said_once_and_transformers_samples(loaded, capsys):
    assert capsys.readouterr().out.count("vLLM is not installed") == 1
    model, tokenizer = loaded
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    (answer,) = model.fast_generate(text, sampling_params=GREEDY)
    (output,) = answer.outputs
    assert answer.prompt == text and answer.prompt_token_ids == tokenizer(text)["input_ids"]
    assert output.text == fastft.generate(model, tokenizer, text, max_new_tokens=8)[0]
    assert tokenizer.decode(output.token_ids, skip_special_tokens=True) == output.text
    assert output.finish_reason == ("stop" if output.token_ids[-1] == tokenizer.eos_token_id else "length")
    assert output.cumulative_logprob == pytest.approx(sum(output.logprobs)) and output.cumulative_logprob < 0
    (again,) = model.fast_generate([QUESTION], sampling_params=GREEDY)
    (third,) = model.fast_generate({"prompt_token_ids": answer.prompt_token_ids}, GREEDY)
    assert again.outputs[0].token_ids == third.outputs[0].token_ids == output.token_ids
    assert capsys.readouterr().out == ""


def test_the_adapter_answers_only_when_it_is_asked_for(loaded, tmp_path):
    model, tokenizer = loaded
    ask = lambda lora=None: model.fast_generate(["What is 12", "Hello"], GREEDY, lora_request=lora)  # noqa: E731
    before = ask()
    spoil(model)
    model.save_lora(tmp_path / "lora")
    trained = fastft.generate(model, tokenizer, ["What is 12", "Hello"], max_new_tokens=8)
    adapted = ask(model.load_lora(tmp_path / "lora"))
    assert [a.outputs[0].text for a in adapted] == trained
    assert ask() == before and before != adapted
    spoil(model, seed=1)  # trained on: the saved adapter is what answers
    assert ask(model.load_lora(tmp_path / "lora", load_tensors=False)) == adapted


def test_the_model_trains_on_as_before(loaded, tmp_path):
    model, _ = loaded
    spoil(model)
    model.save_lora(tmp_path / "lora")
    weights = {name: p.clone() for name, p in model.named_parameters()}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    modes = {name: module.training for name, module in model.named_modules()}
    for lora in (None, model.load_lora(tmp_path / "lora")):
        model.fast_generate("Hello", GREEDY, lora_request=lora)
        assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
        assert {name: module.training for name, module in model.named_modules()} == modes
        assert model.active_adapter == "default" and list(model.peft_config) == ["default"]
        assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_an_adapter_on_a_model_without_one(loaded, folder, tmp_path):
    model, _ = loaded
    spoil(model)
    model.save_lora(tmp_path / "lora")
    expected = model.fast_generate("Hello", GREEDY, lora_request=model.load_lora(tmp_path / "lora"))
    plain, _ = FastLanguageModel.from_pretrained(folder, 128, torch.float32, load_in_4bit=False)
    names = [name for name, _ in plain.named_parameters()]
    base = plain.fast_generate("Hello", GREEDY)
    assert plain.fast_generate("Hello", GREEDY, lora_request=plain.load_lora(tmp_path / "lora")) == expected
    assert [name for name, _ in plain.named_parameters()] == names
    assert plain.fast_generate("Hello", GREEDY) == base != expected


def test_sampling_parameters_are_vllms(loaded):
    model, tokenizer = loaded
    many = fastft.vLLMSamplingParams(n=3, temperature=1.5, top_k=-1, top_p=0.95, min_p=0.01, seed=3, max_tokens=12)
    (answer,) = model.fast_generate("Once", many)
    assert [output.index for output in answer.outputs] == [0, 1, 2]
    assert len({tuple(output.token_ids) for output in answer.outputs}) > 1
    assert model.fast_generate("Once", many)[0] == answer
    assert len(model.fast_generate("Once")[0].outputs[0].token_ids) <= 16
    whole = model.fast_generate("What is 12", {**GREEDY, "ignore_eos": True, "max_tokens": 30})[0].outputs[0]
    assert len(whole.token_ids) == 30 and whole.finish_reason == "length"
    stop = whole.text[6:8]
    cut = model.fast_generate("What is 12", {**GREEDY, "ignore_eos": True, "max_tokens": 30, "stop": stop})[0].outputs[
        0
    ]
    assert cut.text == whole.text[: whole.text.index(stop)] and cut.finish_reason == "stop"
    assert tokenizer.decode(cut.token_ids, skip_special_tokens=True).startswith(cut.text + stop)
    assert len(cut.token_ids) == len(cut.logprobs) < 30


def test_what_cannot_be_served_is_told(loaded, tmp_path):
    model, _ = loaded
    with pytest.raises(UsageError) as error:
        model.fast_generate("Hello", {"max_token": 3, "best_of": 4})
    assert "did you mean 'max_tokens'" in str(error.value) and "best_of" in str(error.value)
    with pytest.raises(LoadError, match="save_lora"):
        model.load_lora(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="below the 128 tokens"):
        model.fast_generate("Hello", {"max_tokens": 400})
    assert SERVED["max_tokens"] == 16


def test_a_trainer_takes_the_engine_of_the_model(loaded):
    model, tokenizer = loaded
    model.fast_generate("Hello", GREEDY)
    engine = fastft.state.get_state(model).rollouts.engine
    assert make_engine("transformers", model, tokenizer) is engine and make_engine("auto", model, tokenizer) is engine
