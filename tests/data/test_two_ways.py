"""`chat_dataset` and `train_on_responses_only` let the same tokens bear loss, in every format."""

from copy import deepcopy

import pytest
from transformers import AutoTokenizer

from fastft.chat_templates import get_chat_template
from fastft.data.chat import chat_dataset
from fastft.data.responses import train_on_responses_only
from fastft.demo import MODEL_FOLDER
from fastft.registry.chat import chat_format, chat_formats

TURNS = [
    {"role": "user", "content": "first question"},
    {"role": "assistant", "content": "first answer"},
    {"role": "user", "content": "second question"},
    {"role": "assistant", "content": "second answer"},
]
THOUGHT = [*TURNS[:3], {**TURNS[3], "reasoning_content": "because"}]
CASES = [
    (form.name, turns) for form in chat_formats() for turns in (TURNS[:2], TURNS, *([THOUGHT] if form.thinking else []))
]


@pytest.fixture(scope="module")
def in_format(build_tokenizer):
    base = build_tokenizer()

    def made(name):
        form, tokenizer = chat_format(name), deepcopy(base)
        own = {*form.stop_tokens, form.bos, form.eos, "<|start|>", "<|channel|>", "<|message|>", "<|end|>"} - {""}
        tokenizer.add_special_tokens({"additional_special_tokens": sorted(own)})
        tokenizer.eos_token = form.eos or tokenizer.eos_token
        return get_chat_template(tokenizer, name)

    return made


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name, turns", CASES)
def test_the_same_tokens(name, turns, last, in_format):
    tokenizer, rows = in_format(name), [{"messages": turns}]
    expected = chat_dataset(rows, tokenizer, "last" if last else "assistant")
    found = train_on_responses_only(chat_dataset(rows, tokenizer, "all"), tokenizer=tokenizer, last_response_only=last)
    assert found[0]["labels"] == expected[0]["labels"]


def test_gpt_oss_on_a_vocabulary_without_its_markers(build_tokenizer):
    tokenizer = get_chat_template(build_tokenizer(), "gpt-oss")
    assert len(tokenizer("<|end|>", add_special_tokens=False)["input_ids"]) > 1
    for turns in (TURNS, THOUGHT):
        rows = [{"messages": turns}]
        expected = chat_dataset(rows, tokenizer)[0]["labels"]
        found = train_on_responses_only(chat_dataset(rows, tokenizer, "all"), tokenizer=tokenizer)[0]["labels"]
        assert found == expected
        text = "".join(tokenizer.decode([label]) if label != -100 else "_" for label in expected)
        first, second = (part for part in text.split("_") if part)
        assert first == "<|channel|>final<|message|>first answer"  # its <|end|> is not what the model samples there
        assert second.endswith("<|channel|>final<|message|>second answer<|return|>")


def test_a_token_of_an_earlier_answer_and_the_marker_behind_it_is_not_learnt():
    tokenizer = get_chat_template(AutoTokenizer.from_pretrained(MODEL_FOLDER), "gpt-oss")
    assert ".<|" in tokenizer.get_vocab()
    rows = [{"messages": [{**turn, "content": turn["content"] + "."} for turn in TURNS]}]
    expected = chat_dataset(rows, tokenizer)[0]["labels"]
    found = train_on_responses_only(chat_dataset(rows, tokenizer, "all"), tokenizer=tokenizer)[0]["labels"]
    assert found == expected
    text = tokenizer.decode([label for label in expected if label != -100])
    ends = "first answer", "second answer.<|return|>"
    assert text == "".join(f"<|channel|>final<|message|>{end}" for end in ends)


def test_what_gpt_oss_learns(in_format):
    tokenizer = in_format("gpt-oss")
    row = train_on_responses_only(chat_dataset([{"messages": THOUGHT}], tokenizer, "all"), tokenizer=tokenizer)[0]
    text = "".join(tokenizer.decode([label]) if label != -100 else "_" for label in row["labels"])
    first, second = (part for part in text.split("_") if part)
    assert first == "<|channel|>final<|message|>first answer"  # <|end|> stands there where <|return|> was sampled
    assert second.startswith(
        "<|channel|>analysis<|message|>because<|end|><|start|>assistant<|channel|>final<|message|>"
    )
    assert second.endswith("second answer<|return|>")
