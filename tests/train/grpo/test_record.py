"""What a GRPO run leaves behind, and what it says."""

import json
from pathlib import Path

import pytest
import transformers
from grpo_runs import PROMPTS, GivenRollouts, even, length_of, rows_of

import fastft
from fastft.rewards import combine
from fastft.train.grpo import telling
from fastft.train.grpo.telling import step_line


def test_record(trainer, config):
    made = trainer(GivenRollouts(logprob=None), max_steps=3, keep_completions=2)
    made.train()
    folder = Path(config["output_dir"])
    for row in rows_of(folder):
        assert set(row["phases"]) == {"rollout", "hand_over", "rewards", "update"}
        assert sum(row["phases"].values()) == pytest.approx(row["train_seconds"], rel=1e-6)
        assert row["peak_memory_bytes"] > 1e6
    record = json.loads((folder / "run.json").read_text())
    assert record["method"] == "grpo" and record["engine"] == "given" and record["status"] == "finished"
    assert record["logprobs"]["layout"] in ("shared", "packed", "padded")
    assert record["phases"]["update"] > 0 and record["memory"]["measured_peak_bytes"] > 1e6
    assert record["tokens"]["loss_bearing"] == sum(round(r["completions/mean_length"] * 4) for r in rows_of(folder))
    assert (folder / "reward.png").stat().st_size > 5000
    assert "![curves](reward.png)" in (folder / "README.md").read_text()
    kept = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    assert [line["step"] for line in kept] == [1, 1, 2, 2, 3, 3]
    for line in kept:
        words = [int(word[1:]) + 7 for word in line["completion"].split()]  # w0 has the id 7
        ended = len(words) < config["max_completion_length"]
        share = (sum(word % 2 == 0 for word in words) + ended) / (len(words) + ended)  # the end's id is 2
        assert line["rewards"]["even"] == pytest.approx(share)
        assert line["prompt"] in PROMPTS and isinstance(line["advantage"], float)


def test_failures_of_rewards_are_counted(trainer, config):
    """Failed and missing rows of every reward, the parts of sums too, over the two generations of a log line."""

    def fails(prompts, completions, trainer_state, **columns):
        return [1.0, float("nan"), None, 2.0] if trainer_state.global_step else [1.0] * 4

    summed = combine({fails: 2.0}, name="summed")
    made = trainer(GivenRollouts(), rewards=[even, fails, summed], max_steps=4, logging_steps=2)
    made.train()
    first, second = [row for row in rows_of(config["output_dir"]) if "loss" in row]
    assert (first["rewards/fails/failures"], first["rewards/fails/missing"]) == (2, 4)  # step 2: alone, and in the sum
    assert (second["rewards/fails/failures"], second["rewards/fails/missing"]) == (4, 8)
    assert first["rewards/summed/missing"] == 2 and second["rewards/summed/missing"] == 4
    assert "rewards/summed/failures" not in second
    assert not any(key.startswith("rewards/even/") and key.endswith(("failures", "missing")) for key in second)


def test_a_missing_reward_is_null(trainer, config):
    def second(prompts, completions, **columns):
        return [None, float("nan"), 0.5, 1.0]

    trainer(GivenRollouts(), rewards=[even, second], max_steps=1).train()
    lines = (Path(config["output_dir"]) / "completions.jsonl").read_text().splitlines()
    assert [json.loads(line)["rewards"]["second"] for line in lines] == [None, None, 0.5, 1.0]


def test_a_run_without_any_reward_says_that_nothing_was_learnt(build_model, tokenizer, tmp_path, capsys):
    def never(prompts, completions, **columns):
        return [None, float("nan")] * (len(completions) // 2)

    def late(prompts, completions, trainer_state, **columns):
        return [None] * (len(completions) - 1) + [0.5 if trainer_state.global_step else None]

    def run(reward, name, **more):
        options = {"generations": 4, "steps": 2, "max_new_tokens": 6, "save_every": 2, "accumulate": 1} | more
        folder = tmp_path / name
        model = build_model()
        made = fastft.grpo(model, tokenizer, PROMPTS, reward, folder, engine=GivenRollouts(), compile=False, **options)
        record = json.loads((folder / "run.json").read_text())
        assert record == json.loads(json.dumps(made.record)) and tuple(record["notes"]) == made.notes
        lines = capsys.readouterr().out.splitlines()
        said = [line for line in lines if line.startswith("fastft: nothing was learnt")]
        return made, record, (folder / "README.md").read_text(), said

    made, record, card, said = run(never, "never")
    note = "nothing was learnt: none of the 8 completions had a reward"
    assert made.notes == (note,) and note in repr(made) and not made.rewards
    assert record["status"] == "finished" and "reward" not in record
    assert f"| notes | {note} |" in card
    assert said == [f"fastft: {note}; {tmp_path / 'never' / 'run.json'} says so, too."]
    made, record, card, said = run(late, "late")
    assert (made.notes, record["notes"], said) == ((), [], []) and "| notes |" not in card
    made, *_ = run(never, "late", steps=3, resume=True)
    assert made.notes == ("nothing was learnt after step 2: none of the 4 completions had a reward",)


def test_a_process_that_is_not_the_main_one_knows_the_notes_and_has_no_record(
    build_model, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(transformers.Trainer, "is_world_process_zero", lambda self: False)
    options = {"generations": 4, "steps": 1, "max_new_tokens": 6, "accumulate": 1, "save_strategy": "no"}
    reward = lambda prompts, completions, **columns: [None] * len(completions)  # noqa: E731
    made = fastft.grpo(
        build_model(), tokenizer, PROMPTS, reward, tmp_path, engine=GivenRollouts(), compile=False, **options
    )
    assert made.notes == ("nothing was learnt: none of the 4 completions had a reward",) and made.record == {}


def test_the_card_tells_of_rewards(trainer, config):
    made = trainer(GivenRollouts(), rewards=[even, length_of], max_steps=3)
    made.train()
    means = [row["reward"] for row in rows_of(config["output_dir"]) if "loss" in row]
    run = json.loads((Path(config["output_dir"]) / "run.json").read_text())
    assert run["rewards"] == ["even", "length_of"] and run["reward"] == {"first": means[0], "last": means[-1]}
    card = (Path(config["output_dir"]) / "README.md").read_text()
    assert "| rewards | even, length_of |" in card and "| engine | given |" in card
    assert f"| mean reward, first to last | {means[0]:.4f} to {means[-1]:.4f} |" in card
    assert "loss, first to last" not in card


def test_the_function(build_model, tokenizer, tmp_path):
    result = fastft.grpo(
        build_model(),
        tokenizer,
        PROMPTS,
        [even],
        tmp_path / "run",
        engine="transformers",
        generations=4,
        accumulate=2,
        steps=2,
        max_new_tokens=6,
        kl=0.1,
        compile=False,
        disable_tqdm=True,
    )
    assert [step for step, _ in result.rewards] == [1, 2] and len(result.kl) == 2
    assert all(0 <= reward <= 1 for _, reward in result.rewards)
    assert all(1 <= length <= 6 for _, length in result.lengths)
    assert result.record["config"]["per_device_train_batch_size"] == 4
    kept = (tmp_path / "run" / "completions.jsonl").read_text().splitlines()
    assert json.loads(kept[0])["prompt"][0]["role"] == "user"  # a text is what the user says
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_a_step_is_one_line(trainer, capsys):
    """Reward and KL of every step, a line each, instead of transformers' line of all metrics."""

    def long(prompts, completions, completion_ids, **columns):
        return [float(len(ids)) for ids in completion_ids]

    made = trainer(GivenRollouts(logprob=-4.5), rewards=(even, long), beta=0.1, max_logprob_difference=None)
    made.train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 2
    for line, row in zip(lines, rows_of(made.args.output_dir)):
        assert line.startswith(
            f"step {row['step']:4d}  reward {row['reward']:.3f}  (even {row['rewards/even/mean']:.3f}, "
        )
        assert f"KL {row['kl']:.4f}" in line and f"engine off by {row['logprob_difference/mean']:.2g} nats" in line
        assert "clip_ratio" not in line


def test_a_step_without_rewards_is_told_in_a_line():
    logs = {"reward": None, "rewards/a/mean": None, "rewards/b/mean": 0.5, "completions/mean_length": 3.0}
    assert step_line(2, logs) == "step    2  reward missing  (a missing, b 0.500)  length 3.0"
    told = step_line(2, logs | {"grad_norm": 0.0, "frac_reward_zero_std": 0.5})
    assert told.endswith("  nothing was learnt: no prompt has two completions with rewards that differ")
    assert telling.line(4, {f"eval_{name}": value for name, value in logs.items()}) == (
        "step    4  evaluation: reward missing  (a missing, b 0.500)  length 3.0"
    )
    again = {"loss": 0.03, "grad_norm": 0.55, "kl": 0.0123, "clip_ratio/region_mean": 0.03, "learning_rate": 1e-5}
    assert telling.line(3, again) == "step    3  from the same completions  KL 0.0123  clipped 3.0%  gradient 0.55"
    told = step_line(2, {"reward": 1.0, "completions/mean_length": 3.0, "frac_reward_zero_std": 1.0})
    assert told.endswith("nothing to learn: every prompt's completions earn alike")
