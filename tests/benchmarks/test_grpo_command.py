"""The comparison of GRPO as a user runs it: arms in processes of their own, one JSON line a cell."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.grpo.job import PHASES, Deadline, Job, dataset_of, summary, tokenizer_of

ROOT = Path(__file__).parents[2]


def bench(*arguments):
    command = [sys.executable, str(ROOT / "scripts/bench_grpo"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_both_arms_do_the_same_work(tmp_path):
    out = tmp_path / "lines.jsonl"
    run = bench(
        "--arms", "fastft,trl", "--shape", "tiny", "--steps", 3, "--prompts", 2, "--generations", 2, "--prompt", 8,
        "--completion", 6, "--rows", 2, "--engine", "transformers", "--backend", "aot_eager", "--output", out,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert [line["arm"] for line in lines] == ["fastft", "trl"]
    assert [json.loads(line) for line in out.read_text().splitlines()] == lines
    for line in lines:
        assert line["completion_tokens"] == [6.0] * 3 and len(line["all_steps"]) == 3
        assert len(set(line["reward"])) > 1 and all(0 < reward < 1 for reward in line["reward"])
        for step in line["all_steps"]:
            parts = sum(step.get(phase, 0.0) for phase in PHASES)
            assert parts == pytest.approx(step["seconds"], abs=1e-3) and step["rollout"] > 0 and step["update"] > 0
        assert line["measured_steps"] == 1 and line["rollout_tokens_per_second"] > 0
    assert max(lines[0]["logprob_difference"]["mean"]) < 0.02


def test_the_last_step_is_the_one_that_ends_behind_the_limit():
    for until, stops in ((0.0, False), (time.time() + 60, False), (time.time() - 1, True)):
        control = SimpleNamespace(should_training_stop=False)
        Deadline(until).on_step_end(None, None, control)
        assert control.should_training_stop is stops


@pytest.mark.slow
def test_a_limit_on_the_seconds_leaves_what_was_done():
    run = bench(
        "--arms", "fastft", "--shape", "tiny", "--steps", 9, "--prompts", 1, "--generations", 2, "--prompt", 8,
        "--completion", 4, "--rows", 2, "--engine", "transformers", "--backend", "eager", "--seconds", 0.1,
    )  # fmt: skip
    (line,) = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode == 0 and len(line["all_steps"]) == line["measured_steps"] == 1, run.stderr


def test_an_arm_that_fails_is_a_line_with_the_error():
    run = bench("--arms", "fastft", "--shape", "tiny", "--steps", 1, "--prompts", 1, "--generations", 3, "--rows", 2)
    (line,) = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode == 1 and line["arm"] == "fastft" and "num_generations" in line["error"]


def test_unknown_arms_are_told():
    run = bench("--arms", "fastft,trll")
    assert run.returncode == 2 and "no arm trll" in run.stderr


def test_prompts_are_exactly_as_long_as_asked():
    job = Job("fastft", "tiny", "bf16", 2, prompts=3, prompt=17)
    rows, tokenizer = dataset_of(job), tokenizer_of(2048)
    lengths = [len(ids) for ids in tokenizer(list(rows["prompt"]))["input_ids"]]
    assert lengths == [17] * 6 and len(set(rows["prompt"])) == 6


def test_medians_leave_the_warm_up_out():
    steps = [{"seconds": seconds, "rollout": seconds / 2} for seconds in (100.0, 50.0, 3.0, 1.0, 2.0)]
    made = summary(steps)
    assert made["median"]["seconds"] == 2.0 and made["median"]["rollout"] == 1.0 and made["median"]["update"] == 0.0
    assert made["first_seconds"] == 100.0 and made["measured_steps"] == 3
