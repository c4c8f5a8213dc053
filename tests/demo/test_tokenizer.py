"""The demo model's tokenizer and chat template."""

import pytest
import transformers

from fastft.demo import HELD_OUT_TEXT, MODEL_FOLDER, lesson, tasks
from fastft.demo.tokenizer import SPECIAL, VOCABULARY, segments, train_tokenizer

CHAT = [
    {"role": "system", "content": "Be polite."},
    {"role": "user", "content": "What is 27 + 48?"},
    {"role": "assistant", "content": "27 + 48 = 75."},
    {"role": "user", "content": "  Spaces,\n\nlines and Ünïcödé 漢字.  "},
    {"role": "assistant", "content": "Two\nlines."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(MODEL_FOLDER)


def test_text_survives_the_round_trip(tokenizer):
    texts = [
        HELD_OUT_TEXT.read_text("utf-8"),
        "\t x\r\n\r\n  y  ",
        "naïve 漢字 🎉 \x00",
        "def f(x):\n    return x ** 2",
    ]
    for text in texts:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_digits_are_single_tokens(tokenizer):
    tokens = tokenizer.tokenize("7 42 1905 x3y")
    assert [token for token in tokens if any(c.isdigit() for c in token)] == [*"7421905", "3"]
    with_two = [token for token in tokenizer.get_vocab() if sum(c.isdigit() for c in token) > 1]
    assert with_two == []


def test_special_tokens(tokenizer):
    assert len(tokenizer) == VOCABULARY == 2048
    assert tokenizer.convert_tokens_to_ids(SPECIAL) == [0, 1, 2, 3]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 2, 3)


def test_template_renders_as_chatml(tokenizer):
    text = tokenizer.apply_chat_template(CHAT[:3], tokenize=False)
    assert text == (
        "<|im_start|>system\nBe polite.<|im_end|>\n<|im_start|>user\nWhat is 27 + 48?<|im_end|>\n"
        "<|im_start|>assistant\n27 + 48 = 75.<|im_end|>\n"
    )
    prompt = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == text.split("27 + 48 = 75.")[0]


def test_mask_covers_answers_and_their_stop_tokens_only(tokenizer):
    out = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    runs, previous = [], 0
    for token, learnt in zip(out["input_ids"], out["assistant_masks"]):
        if learnt and not previous:
            runs.append([])
        if learnt:
            runs[-1].append(token)
        previous = learnt
    assert [tokenizer.decode(run) for run in runs] == ["27 + 48 = 75.<|im_end|>", "Two\nlines.<|im_end|>"]


def test_segments_give_the_templates_tokens_and_mask(tokenizer):
    chats = [*tasks.conversations(200, seed=3), *(row["messages"] for row in lesson.rows(50, seed=3)), CHAT]
    for chat in chats:
        pairs = [
            (token, int(learn))
            for text, learn in segments(chat)
            for token in tokenizer(text, add_special_tokens=False)["input_ids"]
        ]
        out = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        assert [token for token, _ in pairs] == out["input_ids"]
        assert [learn for _, learn in pairs] == out["assistant_masks"]


def test_training_a_tokenizer_is_repeatable(tokenizer, tmp_path):
    texts = HELD_OUT_TEXT.read_text("utf-8").split("\n\n")
    first, second = (train_tokenizer(texts, 512) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    assert len(first) <= VOCABULARY
    assert first.convert_tokens_to_ids(SPECIAL) == [0, 1, 2, 3]
