"""The demonstration of GRPO: what it teaches, what it leaves behind, what it says."""

import json

import pytest

from fastft.cli.main import main
from fastft.demo import phrasings, reinforce, tasks
from fastft.environment import installed
from fastft.errors import UsageError

STEPS = 20  # the demonstration itself takes 32


def test_no_held_out_sum_is_trained_on():
    trained = {row["prompt"] for row in phrasings.rows(4000, 0)}
    asked = phrasings.held_out_rows(200)
    assert not trained & {row["prompt"] for row in asked}
    for row in [*phrasings.rows(50, 1), *asked]:
        a, b = (int(word.strip("?")) for word in row["prompt"].split() if word.strip("?").isdigit())
        assert row["answer"] == a + b and tasks.is_held_out(a, b) == (row in asked)


def check_taught(shown, folder, engine):
    """The thresholds of the demonstration, and everything that it leaves behind."""
    assert shown.reward_first < 0.4 and shown.reward_last > 0.8, shown.rewards
    assert shown.accuracy_after > max(0.7, shown.accuracy_before + 0.2)
    assert shown.kl[0][1] < 1e-3 < 0.02 < shown.kl[-1][1]  # it begins at the reference, and leaves it
    assert all(2 < length <= 24 for _, length in shown.lengths)
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "finished" and record["engine"] == shown.engine == engine
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "reward" in line]
    assert [(line["step"], line["reward"]) for line in steps] == list(shown.rewards)
    assert all(line["logprob_difference/mean"] < 0.05 for line in steps)
    samples = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    assert len(samples) == 8 * len(steps)
    assert {row["rewards"]["number"] for row in samples} == {0.0, 1.0}
    assert (folder / "reward.png").stat().st_size > 1000


@pytest.mark.slow
def test_rewards_teach_the_model(tmp_path):
    heard = []
    shown = reinforce.run_grpo_demo(tmp_path, steps=STEPS, engine="transformers", say=heard.append)
    check_taught(shown, tmp_path, "transformers")
    assert shown.answer_after.endswith("75.") and "75" not in shown.answer_before
    text = "".join(heard)
    assert f"Answers in step {STEPS}:\n" in text and f"{shown.reward_last:.2f} in the last" in text


@pytest.mark.vllm
@pytest.mark.skipif(not installed("vllm"), reason="vLLM is not installed; `scripts/test --vllm` runs these")
def test_rewards_teach_the_model_through_vllm(tmp_path):
    check_taught(reinforce.run_grpo_demo(tmp_path, steps=STEPS, engine="vllm"), tmp_path, "vllm")


def shown(first, last):
    curves = {name: ((1, first), (2, last)) for name in ("rewards", "kl", "lengths")}
    texts = dict.fromkeys(("question", "answer_before", "answer_after", "engine", "folder"), "x")
    texts |= dict.fromkeys(("curve", "completions", "record"), "x")
    return reinforce.GrpoDemoResult(
        **curves,
        **texts,
        accuracy_before=0.0,
        accuracy_after=0.0,
        sums=1,
        reward_first=first,
        reward_last=last,
        seconds=1,
    )


def test_a_run_too_short_to_tell_is_refused(tmp_path):
    with pytest.raises(UsageError, match="at least 8, got 3"):
        reinforce.run_grpo_demo(tmp_path, steps=3)


def test_the_command_refuses_it_as_wrong_use(monkeypatch, capsys):
    monkeypatch.setattr(reinforce, "run_grpo_demo", lambda **options: pytest.fail("it began"))
    assert main(["demo", "--grpo", "--steps", "6"]) == 3
    assert "steps of the demo with rewards: expected at least 8, got 6." in capsys.readouterr().err


@pytest.mark.parametrize(("first", "last", "status"), [(0.3, 0.9, 0), (0.3, 0.3, 2)])
def test_the_command_fails_where_no_reward_rose(monkeypatch, capsys, first, last, status):
    given = {}
    monkeypatch.setattr(reinforce, "run_grpo_demo", lambda **options: given.update(options) or shown(first, last))
    assert main(["demo", "--grpo", "--steps", "8", "--json"]) == status
    said = capsys.readouterr()
    assert given == {"steps": 8, "resume": False, "chat": False}
    assert json.loads(said.out)["rewards"] == [[1, first], [2, last]]
    assert ("the mean reward did not rise: 0.300 at first, 0.300 at last" in said.err) == bool(status)
