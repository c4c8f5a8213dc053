"""Rows of preferences in the forms that people have them, as the trainers take them."""

import json

import pytest
from datasets import Dataset

import fastft
from fastft.errors import DataError
from fastft.train.preference.data import PAIRS, VERDICTS, mixed_verdicts, preference_dataset

USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "w1"), ("assistant", "w2"), ("assistant", "w3"))
)
WHOLE = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
SHAREGPT = {
    "prompt": [{"from": "human", "value": "w1"}],
    "chosen": [{"from": "gpt", "value": "w2"}],
    "rejected": [{"from": "gpt", "value": "w3"}],
}
FORMS = {
    "texts": {"prompt": "w1", "chosen": "w2", "rejected": "w3"},
    "turns": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "whole": WHOLE,
    "sharegpt": SHAREGPT,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [list, Dataset.from_list])
def test_pairs(form, kind, tokenizer):
    made = preference_dataset(kind([FORMS[form]] * 2), tokenizer, [PAIRS], "train")
    for column, answer in (("chosen", GOOD), ("rejected", BAD)):
        assert [dict(turn) for turn in made[0][column]] == [USER, answer]


def test_texts_stay_texts_without_a_template(tokenizer):
    tokenizer.chat_template = None
    assert preference_dataset([FORMS["texts"]], tokenizer, [PAIRS], "train")[0] == FORMS["texts"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_tokens(form, tokenizer, build_model, settings):
    """Prompt `<|user|> w1 </s> <|assistant|>`, then the answer."""
    rows = preference_dataset(Dataset.from_list([FORMS[form]] * 2), tokenizer, [PAIRS], "train")
    args = fastft.DPOConfig(**settings)
    made = fastft.DPOTrainer(
        build_model(), args=args, train_dataset=rows, processing_class=tokenizer, compile=False
    ).train_dataset
    words = {name: tokenizer.convert_ids_to_tokens(made[0][f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")}
    assert words == {
        "prompt": ["<|user|>", "w1", "</s>", "<|assistant|>"],
        "chosen": ["w2", "</s>"],
        "rejected": ["w3", "</s>"],
    }


def test_rows_of_a_file_are_named_by_file_and_line(tokenizer, tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [FORMS["texts"], {**FORMS["texts"], "chosen": ""}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"pairs.jsonl, line 2"):
        preference_dataset(path, tokenizer, [PAIRS], "train")
    with pytest.raises(DataError, match=r"train row 1"):
        preference_dataset(rows, tokenizer, [PAIRS], "train")


@pytest.mark.parametrize("value", [None, 5, float("nan")])
def test_an_answer_that_is_no_text_among_texts(value, tokenizer):
    with pytest.raises(DataError) as caught:
        preference_dataset([FORMS["texts"], {**FORMS["texts"], "chosen": value}], tokenizer, [PAIRS], "train")
    (problem,) = caught.value.problems
    assert problem.where == "train row 1, chosen" and problem.expected == "a text, or a list of {'role', 'content'}"
    assert problem.remedy


def test_a_line_that_is_no_row_is_told_with_the_others_mistakes(tokenizer, tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [FORMS["texts"], [1], {**FORMS["texts"], "chosen": ""}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError) as caught:
        preference_dataset(path, tokenizer, [PAIRS], "train")
    assert [problem.where for problem in caught.value.problems] == [f"{path}, line 2", f"{path}, line 3, chosen"]
    verdicts = [{"prompt": "w1", "completion": "", "label": True}, [1]]  # no prompts with completions to learn
    path.write_text("".join(json.dumps(row) + "\n" for row in verdicts))
    with pytest.raises(DataError) as caught:
        preference_dataset(path, tokenizer, [VERDICTS, PAIRS], "train")
    assert [problem.where for problem in caught.value.problems] == [f"{path}, line 2"]


def test_verdicts(tokenizer):
    rows = [{"prompt": f"w{n}", "completion": "w9", "label": n % 2 == 0} for n in range(8)]
    made = preference_dataset(rows, tokenizer, [VERDICTS, PAIRS], "train")
    assert made[1]["prompt"] == [{"role": "user", "content": "w1"}] and made[1]["label"] is False
    assert made[1]["completion"] == [{"role": "assistant", "content": "w9"}]


def test_pairs_become_verdicts_in_a_random_order(tokenizer):
    rows = [{"prompt": f"w{n}", "chosen": "w20", "rejected": "w30"} for n in range(16)]
    made = mixed_verdicts(preference_dataset(rows, tokenizer, [VERDICTS, PAIRS], "train"), seed=1)
    assert len(made) == 32 and sum(made["label"]) == 16
    assert 2 <= sum(made["label"][:16]) <= 14  # TRL's own order would be 16
    assert all((row["completion"][0]["content"] == "w20") == row["label"] for row in made)
    assert sorted(row["prompt"][0]["content"] for row in made) == sorted(f"w{n}" for n in range(16) for _ in range(2))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "w1", "chosen": "w2"}], "'chosen', 'rejected'"),
        ([{"prompt": "w1", "chosen": "w2", "rejected": "w2"}], "two that differ"),
        ([], "no rows|empty|at least one"),
    ],
)
def test_rows_that_cannot_be_used(rows, said, tokenizer):
    with pytest.raises(DataError, match=said):
        preference_dataset(rows, tokenizer, [PAIRS], "train")


def test_a_misspelt_column_is_told_with_the_right_name(tokenizer):
    rows = [{"prompt": "w1", "choosen": "w2", "rejected": "w3"}]
    with pytest.raises(DataError) as caught:
        preference_dataset(rows, tokenizer, [PAIRS], "train")
    assert str(caught.value).endswith("did you mean 'chosen' by 'choosen'?")
    with pytest.raises(DataError) as caught:
        preference_dataset([{"prompt": "w1", "completion": "w2", "lable": True}], tokenizer, [VERDICTS, PAIRS], "train")
    assert str(caught.value).endswith("did you mean 'label' by 'lable'?")
