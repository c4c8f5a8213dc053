"""scripts/bench_rollout measures, and its judge sees log-probabilities that are not the model's."""

import json
import sys

from benchmarks import rollout
from fastft.rollout.base import Completion
from fastft.rollout.hf import TransformersEngine

ARGUMENTS = [
    "bench_rollout", "--engine", "transformers", "--shape", "tiny", "--prompts", "3", "--completions", "2",
    "--prompt-tokens", "8", "--new-tokens", "6",
]  # fmt: skip


def run(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ARGUMENTS)
    code = rollout.main()
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_it_measures(monkeypatch, capsys):
    code, result = run(monkeypatch, capsys)
    assert code == 0 and result["good"] and result["answers_change"]
    assert result["mean_difference"] < 0.02 and result["largest_difference"] < 0.2
    assert result["tokens_per_s"] > 0 and result["hand_over_s"] > 0 and result["versions"]["torch"]


def test_the_judge_sees_wrong_log_probabilities(monkeypatch, capsys):
    class Wrong(TransformersEngine):
        def generate(self, *args, **kwargs):
            rows = super().generate(*args, **kwargs)
            return [[Completion(c.ids, tuple(p - 0.2 for p in c.logprobs)) for c in row] for row in rows]

    monkeypatch.setattr("fastft.rollout.hf.TransformersEngine", Wrong)
    code, result = run(monkeypatch, capsys)
    assert code == 1 and not result["good"] and 0.15 < result["mean_difference"] < 0.25
