"""Formats, lengths, JSON and sums of rewards: exact values, and wrong use told."""

import json
import re

import pytest
import torch

from fastft.errors import DataError, UsageError
from fastft.rewards import combine, json_schema, length, matches, number


def score(reward, *texts, **columns):
    return reward(prompts=[""] * len(texts), completions=list(texts), **columns)


THINK = r"<think>.*</think>\s*<answer>.*</answer>"


def test_matches():
    good, bad = "<think>a\nb</think>\n<answer>1</answer>\n", "so <think>a</think><answer>1</answer>"
    assert score(matches(THINK), good, bad) == [1.0, 0.0]
    assert score(matches(THINK, where="anywhere", reward=0.5, otherwise=-1.0), good, bad, "") == [0.5, 0.5, -1.0]
    assert score(matches("so", where="start"), good, bad) == [0.0, 1.0]
    assert score(matches(re.compile("a.b")), "a\nb") == [0.0]
    assert matches(THINK, name="thinks").__name__ == "thinks"
    with pytest.raises(UsageError, match="expected a regular expression"):
        matches("(")
    with pytest.raises(UsageError, match="'whole', 'start' or 'anywhere'"):
        matches("a", where="end")


def test_length_within_a_limit():
    reward = length(limit=10, buffer=4)
    ids = [[0] * n for n in (0, 6, 7, 9, 10, 99)]
    assert score(reward, *[""] * 6, completion_ids=ids) == [0.0, 0.0, -0.25, -0.75, -1.0, -1.0]
    assert score(length(limit=3, unit="characters"), "abc", "abcd") == [0.0, -1.0]


def test_length_near_a_target():
    assert score(length(target=4, unit="words"), "a b c d", "a b", "", "a b c d e", "a " * 9) == [1, 0.5, 0, 0.75, 0]


@pytest.mark.parametrize(
    "arguments", [{}, {"limit": 1, "target": 1}, {"limit": 0}, {"target": 2, "buffer": 1}, {"limit": 2, "buffer": 3}]
)
def test_length_wrong_use(arguments):
    with pytest.raises(UsageError):
        length(**arguments)


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
}


def test_json_schema():
    pytest.importorskip("jsonschema")
    right = json.dumps({"name": "a", "age": 3})
    texts = {
        right: 1.0,
        f"Here:\n```json\n{right}\n```\nDone.": 1.0,
        f"<answer>{right}</answer>": 1.0,
        f"```json\n{{}}\n```\n```json\n{right}\n```": 1.0,
        '{"name": "a", "age": -1}': 0.25,
        '{"name": "a", "age": NaN}': 0.0,
        '{"name": "a", "age": 3': 0.0,
        "[" * 100_000: 0.0,
        '{"name": "a", "age": ' + "9" * 5000 + "}": 0.0,
        "": 0.0,
    }
    assert score(json_schema(SCHEMA, valid_json=0.25), *texts) == list(texts.values())


def test_json_schema_wrong_use(monkeypatch):
    pytest.importorskip("jsonschema")
    with pytest.raises(UsageError, match="properties/a/type"):
        json_schema({"properties": {"a": {"type": "number of sheep"}}})
    monkeypatch.setattr("fastft.rewards.schemas.installed", lambda package: False)
    with pytest.raises(UsageError, match=r"fastft\[rewards\]"):
        json_schema(SCHEMA)


def test_a_schema_elsewhere_is_not_fetched():
    pytest.importorskip("jsonschema")
    reward = json_schema({"$ref": "https://example.com/schema.json"})
    with pytest.raises(Exception, match=r"example\.com"):
        score(reward, "{}")


def test_combine():
    both = combine({number(): 2.0, matches("<a>.*</a>"): 0.5})
    assert both.__name__ == "number+matches"
    texts = ["<a>1</a>", "1", "<a>2</a>", "2"]
    assert score(both, *texts, answer=[1, 1, 1, None]) == [2.5, 2.0, 0.5, 0.0]


def test_combine_leaves_out_what_is_missing():
    def broken(completions, **columns):
        return [1 / int(text) for text in completions]

    both = combine([(broken, 1.0), (length(target=1, unit="characters"), 3.0)], name="both")
    assert score(both, "2", "0") == [3.5, 3.0]
    assert score(combine({number(): 1.0}), "1", answer=[None]) == [None]


@pytest.mark.parametrize(
    "weights",
    [{}, {number(): float("nan")}, {number(): True}, [("number", 1.0)], {torch.nn.Linear(1, 1): 1.0}],
    ids=["none", "nan", "bool", "text", "model"],
)
def test_combine_wrong_use(weights):
    with pytest.raises(UsageError):
        combine(weights)


def test_columns_that_do_not_fit_the_rows():
    reward = number("answer")
    for values, told in (([1], "'1 values'"), (3, "got 3"), ("12", "got '12'")):
        with pytest.raises(DataError, match=f"number: column 'answer'.*2 values.*{told}"):
            score(reward, "1", "2", answer=values)
    with pytest.raises(DataError, match="2 values"):
        score(length(limit=3), "a", "b", completion_ids=[[1]])
    with pytest.raises(
        UsageError, match=re.escape("data's columns ('answers'), got 'answer'. did you mean 'answers'?")
    ):
        score(reward, "1", answers=[1], completion_ids=[[1]], log_extra=print, log_metric=print, trainer_state=None)


def test_sums_without_weights_are_told_together():
    with pytest.raises(UsageError, match=r"combine\(\{reward: 1.0\}\)") as caught:
        combine([number("a"), number("b")])
    assert len(caught.value.problems) == 2
    with pytest.raises(UsageError, match="pairs of a reward and its weight"):
        combine(number("a"))
