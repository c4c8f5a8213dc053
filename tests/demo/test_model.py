"""The shipped model: small enough, as its card says, and able to do what the card says."""

import json
import re
from itertools import pairwise

import pytest
import torch
import transformers

from fastft.demo import HELD_OUT_TEXT, MODEL_FOLDER, evaluate, lesson, tasks
from fastft.demo.card import LIMIT, render
from fastft.demo.pretrain import Recipe, batch_maker, learning_rate

CARD = (MODEL_FOLDER / "README.md").read_text("utf-8")


@pytest.fixture(scope="module")
def shipped():
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_FOLDER, padding_side="left")
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32)
    return model.eval(), tokenizer


def stated(row):
    return float(re.search(rf"^\| {row}.*\| ([\d.]+)%? \|$", CARD, re.MULTILINE).group(1))


def test_folder_is_small_and_complete():
    files = {path.name: path.stat().st_size for path in MODEL_FOLDER.iterdir()}
    assert sum(files.values()) < LIMIT == 10_000_000
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(files)


def test_shapes_fit_quantisation_blocks(shipped):
    model, _ = shipped
    linears = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 5 * 7 + 1 and all(linear.in_features % 256 == 0 for linear in linears)
    assert sum(p.numel() for p in model.parameters()) == 4_459_264
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == [2, 0]


def test_perplexity_is_the_cards(shipped):
    model, tokenizer = shipped
    ids = tokenizer(HELD_OUT_TEXT.read_text("utf-8"), add_special_tokens=False)["input_ids"]
    perplexity = evaluate.perplexity(model, ids, tokenizer.bos_token_id)
    assert perplexity == pytest.approx(stated("perplexity per token"), rel=0.02)


def test_perplexity_of_a_model_that_knows_nothing(shipped):
    config = shipped[0].config
    blank = transformers.AutoModelForCausalLM.from_config(config)
    torch.nn.init.zeros_(blank.lm_head.weight)
    assert evaluate.perplexity(blank, list(range(4, 704)), 0) == pytest.approx(2048, rel=1e-4)


def test_adds_as_the_card_says(shipped):
    plain, _ = evaluate.addition_accuracy(*shipped, tasks.plain_addition, count=30)
    story, _ = evaluate.addition_accuracy(*shipped, lesson.story, count=30)
    assert abs(100 * plain - stated("held-out two-digit sums in the phrasings")) <= 5
    assert abs(100 * story - stated("held-out two-digit sums told as a story")) <= 5


def test_answers_small_questions(shipped):
    given = evaluate.answers(*shipped, ["What is the capital of Italy?", "What is the opposite of hot?"])
    assert given == ["The capital of Italy is Rome.", "The opposite of hot is cold."]


def test_answers_do_not_depend_on_the_batch(shipped):
    questions = ["Hello!", "Reverse the order of these words: river garden stone", "What is 11 + 22?"]
    assert evaluate.answers(*shipped, questions) == [evaluate.answers(*shipped, [q])[0] for q in questions]


def test_card_is_what_the_measurements_give():
    measured = json.loads((MODEL_FOLDER / "training.json").read_text("utf-8"))
    assert render(measured, measured["data"], 4_459_264) == CARD
    assert not measured["plain"] and "fastft.compile" in CARD


def test_last_number_decides():
    assert evaluate.contains_number("27 + 48 = 75. That be 75 apples", 75)
    assert not evaluate.contains_number("27 + 48 = 75, or 76?", 75)
    assert not evaluate.contains_number("none", 0)
    assert evaluate.share_right(["1", "2", "x", "4"], [1, 2, 3, 5]) == 0.5


def test_learning_rate_rises_and_falls():
    recipe = Recipe(steps=1000, warmup=100, peak_lr=1.0, final_lr=0.1)
    rates = [learning_rate(step, recipe) for step in range(1001)]
    assert rates[0] == 0.01 and rates[99] == 1.0 == max(rates)
    assert rates[550] == pytest.approx(0.55) and rates[1000] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[100:]))


def test_batches_repeat_and_mask(tmp_path):
    import numpy as np

    from fastft.demo.arrays import NO_LOSS, ROW

    np.save(tmp_path / "text.npy", np.arange(2000, dtype=np.uint16))
    np.save(tmp_path / "code.npy", np.arange(2000, dtype=np.uint16))
    chat = np.arange(7, dtype=np.uint16)[:, None].repeat(ROW, 1)
    chat[:, : ROW // 2] |= NO_LOSS
    np.save(tmp_path / "chat.npy", chat)
    recipe = Recipe(rows=8, text_share=0.25, code_share=0.25)
    make, again = (batch_maker(tmp_path, recipe, "cpu") for _ in range(2))
    seen = []
    for step in range(7):
        batch, other = make(step), again(step)
        assert all(torch.equal(batch[name], other[name]) for name in ("input_ids", "labels"))
        text, rows = batch["input_ids"][:4], batch["input_ids"][4:]
        assert torch.equal(text[:, 1:], text[:, :-1] + 1) and torch.equal(batch["labels"][:4], text)
        assert (batch["labels"][4:, : ROW // 2] == -100).all()
        assert torch.equal(batch["labels"][4:, ROW // 2 :], rows[:, ROW // 2 :])
        seen += rows[:, 0].tolist()
    assert sorted(seen) == sorted(list(range(7)) * 4)  # 28 rows: four whole epochs
