"""The comparison of losses: what learns as an exact arm does is told from what does not."""

import itertools
import json
import math

import pytest
import torch

from benchmarks.cells import Cell
from benchmarks.convergence import WORDS, main, text_of, verdict

EXACT = [10.0, 8.0, 5.0, 2.0, 1.0]


@pytest.mark.parametrize(
    ("losses", "ok"),
    [
        ([10.1, 8.2, 5.1, 2.1, 1.0], True),
        ([10.0, 8.0, 5.0, 2.6, 1.0], False),  # one step, 6 % of the first loss away
        ([10.4, 8.4, 5.4, 2.4, 1.4], False),  # 4 % at every step
        ([10.0, 8.0, 5.0, 2.0, math.nan], False),
    ],
)
def test_verdict(losses, ok):
    told = verdict(EXACT, losses)
    assert told["ok"] is ok and told["learnt_to"] == 0.1
    if ok:
        assert told["farthest"] == pytest.approx(0.02) and told["mean"] == pytest.approx(0.01)


def test_nothing_is_said_where_nothing_was_learnt():
    flat = [10.0, 9.0, 8.0, 7.0, 6.0]
    assert verdict(flat, flat) == {"ok": False, "farthest": 0.0, "mean": 0.0, "learnt_to": 0.6}


def test_every_word_has_one_that_follows_it():
    cell = Cell("tiny", "nf4", 3, 300)
    pairs = {}
    for index in range(3):
        batch = text_of(cell, index, "cpu")
        assert torch.equal(batch["input_ids"], batch["labels"]) and batch["labels"].shape == (3, 300)
        for row in batch["input_ids"].tolist():
            for one, other in itertools.pairwise(row):
                assert pairs.setdefault(one, other) == other
    assert len(pairs) == WORDS and len(set(pairs.values())) == WORDS
    assert not torch.equal(text_of(cell, 0, "cpu")["labels"], text_of(cell, 1, "cpu")["labels"])


def test_fp8_learns_as_exact_does_and_an_arm_with_other_gradients_does_not(capsys, monkeypatch):
    """An arm that goes the other way in a third of the weights: its curve is another."""
    from benchmarks.arms import Trainee, fastft

    own = fastft.prepare

    def prepare(task, options, device):
        made = own(task, options, device)
        if "fp8" in options[1:]:
            return made
        for number, parameter in enumerate(made.model.parameters()):
            if parameter.requires_grad and number % 3 == 0 and task.arm == "fastft:min":
                parameter.register_hook(lambda gradient: -gradient)
        return Trainee(made.model, made.loss, made.facts)

    monkeypatch.setattr(fastft, "prepare", prepare)
    given = ["--arms", "fastft,fastft-fp8,fastft:min", "--shape", "tiny", "--backend", "aot_eager", "--length", "96"]
    code = main([*given, "--steps", "36", "--rate", "4e-3", "--head-scale", "8"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert code == 1 and [line["arm"] for line in lines[:3]] == ["fastft", "fastft-fp8", "fastft:min"]
    assert all(len(line["losses"]) == 36 for line in lines[:3])
    right, wrong = lines[3:]
    assert right["verdict"] == "fastft-fp8" and right["ok"] and right["learnt_to"] < 0.5
    assert wrong["verdict"] == "fastft:min" and not wrong["ok"]
