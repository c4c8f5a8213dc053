"""Checkpoints of GRPO runs: going on from them, and what is left after a failure."""

import json
import logging
import signal
import time
import traceback
from pathlib import Path

import pytest
import torch
import trl
from grpo_runs import GivenRollouts, as_second, trained
from transformers import TrainerCallback

import fastft
from fastft.errors import EngineError, RewardError, UsageError
from fastft.train import checkpoint


@pytest.mark.parametrize(
    ("at", "settings"),
    [
        (3, {"steps_per_generation": 2}),
        (1, {"steps_per_generation": 4, "gradient_accumulation_steps": 2}),
        (2, {}),
        (3, {"num_iterations": 2}),
        (4, {"gradient_accumulation_steps": 2}),
    ],
    ids=["within a generation", "within one put together", "between", "within iterations", "between epochs"],
)
def test_resumed_is_as_if_never_interrupted(trainer, config, at, settings, tmp_path):
    """Rollouts of the transformers engine, whose random state comes with the checkpoint: the same steps, to the bit."""
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": at, **settings}
    whole = trainer("transformers", **settings)
    whole.train()
    again = trainer("transformers", **settings)
    torch.manual_seed(99)
    again.train(resume_from_checkpoint=str(Path(config["output_dir"]) / f"checkpoint-{at}"))
    names = ("loss", "grad_norm", "reward", "entropy", "completions/mean_length")
    wanted = [[row.get(name) for name in names] for row in whole.state.log_history if "loss" in row]
    got = [[row.get(name) for name in names] for row in again.state.log_history if "loss" in row]
    assert len(wanted) == 6 and got == wanted
    end = trained(again.model)
    assert all(torch.equal(value, end[name]) for name, value in trained(whole.model).items())


def test_interrupted_within_a_generation_it_goes_on_as_if_never(trainer, config):
    class Ring(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                signal.raise_signal(signal.SIGINT)

    settings = {"max_steps": 6, "steps_per_generation": 2}
    first = trainer("transformers", **settings)
    first.add_callback(Ring())
    with pytest.raises(KeyboardInterrupt, match=r"^stopped after step 3 of 6; saved in .*checkpoint-3; resume=True"):
        first.train()
    again = trainer("transformers", **settings)
    torch.manual_seed(99)
    again.train(resume_from_checkpoint=True)
    whole = trainer("transformers", **settings, output_dir=config["output_dir"] + "-whole")
    whole.train()
    end = trained(again.model)
    assert all(torch.equal(value, end[name]) for name, value in trained(whole.model).items())


def test_killed_engine_leaves_a_checkpoint_to_go_on_from(trainer, config):
    """The third generation fails: two steps are saved, and go on to the weights of a run that never failed."""
    with pytest.raises(EngineError, match=r"killed\n.*checkpoint-2; resume='.*checkpoint-2' goes on") as caught:
        trainer(GivenRollouts(fail_at=3), max_steps=4).train()
    assert isinstance(caught.value, EngineError)
    folder = Path(config["output_dir"])
    run = json.loads((folder / "run.json").read_text())
    assert run["status"] == "failed" and run["steps"] == 2 and run["reward"]["last"] is not None
    assert (folder / "reward.png").is_file()
    assert [path.name for path in checkpoint.checkpoints(folder)] == ["checkpoint-2"]
    again = trainer(GivenRollouts(), max_steps=4)
    again.train(resume_from_checkpoint=True)
    whole = trainer(GivenRollouts(), max_steps=4)
    whole.train()
    end = trained(again.model)
    assert all(torch.equal(value, end[name]) for name, value in trained(whole.model).items())


def test_hung_reward_leaves_a_checkpoint(trainer, config):
    def hung(prompts, completions, trainer_state, **columns):
        if trainer_state.global_step == 1:
            time.sleep(600)
        return [float(len(text)) for text in completions]

    began = time.monotonic()
    with pytest.raises(RewardError, match=r"'hung'.*(?s:.*)checkpoint-1"):
        trainer(GivenRollouts(), rewards=[hung], reward_time_limit=2).train()
    assert time.monotonic() - began < 300
    assert [path.name for path in checkpoint.checkpoints(config["output_dir"])] == ["checkpoint-1"]


def test_failing_reward_is_one_error_from_its_exception(trainer, caplog):
    def fails(completions, **columns):
        return [1 / 0 for _ in completions]

    with pytest.raises(RewardError, match=r"'fails', row 0.*ZeroDivisionError(?s:.*)checkpoint-2") as caught:
        trainer(GivenRollouts(), rewards=[fails], max_steps=4).train()
    told = "".join(traceback.format_exception(caught.value))
    assert told.count("Traceback") == 2 and told.count("\nZeroDivisionError: division by zero") == 1
    assert told.count("RewardError: reward 'fails'") == 1
    (line,) = [record.getMessage() for record in caplog.records if "reward" in record.getMessage()]
    assert line.startswith("reward 'fails' failed for 4 of 4 rows")


def left_out(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if "have a reward from no function" in line]


def test_rows_that_all_rewards_leave_out_are_told_once(trainer, caplog, capsys):
    """By a line of fastft's; TRL's of each step, with all columns of a row, is kept back, and no other of its lines."""

    def never(completions, **columns):
        logging.getLogger(trl.GRPOTrainer.__module__).warning("another line")
        return [None] * len(completions)

    trainer(GivenRollouts(), rewards=[never, never], max_steps=2).train()
    assert left_out(capsys) == [
        "fastft: 4 of 4 completions have a reward from no function (None from all of them) and are not learnt from. "
        "This is said once; the log counts them as rewards/NAME/missing."
    ]
    assert caplog.messages.count("another line") == 4 and "All reward functions returned None" not in caplog.text


def test_rows_that_failed_are_not_told_as_left_out(trainer, caplog, capsys):
    def fails(completions, **columns):
        return [1.0, "none", 1.0, 1.0]

    trainer(GivenRollouts(), rewards=[fails], max_steps=1).train()
    assert "reward 'fails' failed for 1 of 4 rows" in caplog.text
    assert left_out(capsys) == [] and "All reward functions returned None" not in caplog.text


def test_a_row_that_all_leave_out_is_news_beside_one_that_failed(trainer, caplog, capsys):
    """Row 0 fails in one reward and is scored by the other; row 1 has no reward of either, and failed in none."""

    seen = []

    def one(completions, completion_ids, **columns):
        seen[:] = completion_ids
        return [1.0, None, 1.0, 1.0]

    def other(completions, completion_ids, **columns):
        if any(ids == seen[0] for ids in completion_ids):
            raise ValueError("row 0")
        return [None if ids == seen[1] else 1.0 for ids in completion_ids]

    trainer(GivenRollouts(), rewards=[one, other], max_steps=1).train()
    assert "reward 'other' failed for 1 of 4 rows" in caplog.text
    (line,) = left_out(capsys)
    assert line.startswith("fastft: 1 of 4 completions have a reward from no function")


def test_merging_is_no_other_batch_to_a_checkpoint(trainer, config, build_model, capsys):
    """Apart and then as one, as on a GPU with more memory free: nothing is told, the weights are those of one run."""
    settings = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 1}
    settings |= {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}

    def run(steps, merge, resume=False):
        model = fastft.compile(build_model(), plan="keep", backend="eager")
        made = trainer(
            GivenRollouts(), model=model, compile=True, max_steps=steps, merge_micro_batches=merge, **settings
        )
        made.train(resume_from_checkpoint=resume)
        return made

    apart = run(1, False)
    assert (apart.recorder.record["merged"], apart.args.per_device_train_batch_size) == (1, 4)
    capsys.readouterr()
    again = run(2, True, str(Path(config["output_dir"]) / "checkpoint-1"))
    told = capsys.readouterr().out
    assert again.recorder.record["merged"] == 2 and "as one of 8" in told and "other batches" not in told
    config["output_dir"] += "-whole"
    whole = run(2, True)
    for name, value in trained(whole.model).items():
        torch.testing.assert_close(trained(again.model)[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changes", [{"num_generations": 2}, {"gradient_accumulation_steps": 2}], ids=str)
def test_other_batches_are_told_between_generations(trainer, config, capsys, changes):
    trainer(GivenRollouts(), save_strategy="steps", save_steps=3, max_steps=3).train()
    engine = GivenRollouts()
    again = trainer(engine, max_steps=5, **changes)
    again.train(resume_from_checkpoint=True)
    ((name, value),) = changes.items()
    told = [line for line in capsys.readouterr().out.splitlines() if "other batches than in" in line]
    assert len(told) == 1 and f"checkpoint-3: {name} is {value} (there " in told[0]
    assert engine.calls == 2  # each of the two steps learns from one generation, all of it
    same = trainer(GivenRollouts(), max_steps=5)
    same.train(resume_from_checkpoint=str(Path(config["output_dir"]) / "checkpoint-3"))
    assert "other batches" not in capsys.readouterr().out


def test_damaged_rollouts_are_named_with_what_to_do(trainer, second, config):
    """Cut off, the file is no archive; with other bytes in its midst it is one that cannot be read."""
    trainer(GivenRollouts(), save_strategy="steps", save_steps=1, max_steps=2).train()
    folder = Path(config["output_dir"]) / "checkpoint-2"
    whole = (folder / "rollouts-0.pt").read_bytes()
    (folder / "rollouts-0.pt").write_bytes(whole[:100])
    with pytest.raises(UsageError, match=r"rollouts-0.pt is damaged \(100 bytes(?s:.*)resume='.*checkpoint-1' goes on"):
        trainer(GivenRollouts(), max_steps=3).train(resume_from_checkpoint=True)
    place = whole.index(b"orders")
    (folder / "rollouts-0.pt").write_bytes(whole[: place - 20] + b"\xff" * 60 + whole[place + 40 :])
    with pytest.raises(UsageError, match=r"rollouts-0.pt: expected .*a damaged file of .*Resume from another"):
        trainer(GivenRollouts(), max_steps=3).train(resume_from_checkpoint=True)
    (problem,) = second(max_steps=3).resume_problems(folder)  # of several processes none stops alone
    assert problem.where == str(folder / "rollouts-0.pt")


def test_completions_that_wait_are_not_learnt_from_in_other_batches(trainer, config):
    settings = {"steps_per_generation": 2}
    trainer(GivenRollouts(), save_strategy="steps", save_steps=3, max_steps=3, **settings).train()
    again = trainer(GivenRollouts(), max_steps=5, **settings, num_generations=2, num_iterations=2, optim="sgd")
    before = trained(again.model)
    with pytest.raises(UsageError, match=r"Completions wait in .*checkpoint-3") as caught:
        again.train(resume_from_checkpoint=True)
    told = [(problem.where, problem.value) for problem in caught.value.problems]
    waiting = [("GRPOConfig num_generations", 2), ("GRPOConfig num_iterations", 2)]
    assert told == [("GRPOConfig optim", "sgd"), *waiting]  # what every trainer asks comes first
    assert all(torch.equal(value, before[name]) for name, value in trained(again.model).items())


@pytest.fixture
def second(trainer, monkeypatch):
    """Make a trainer that takes itself for the second of two processes."""

    def make(**changes):
        made = as_second(trainer(GivenRollouts(), **changes))
        monkeypatch.setattr(made, "is_world_process_zero", lambda: False)
        return made

    return make


@pytest.mark.parametrize("waiting", [True, False])
def test_another_number_of_processes_is_another_batch(trainer, second, config, waiting, capsys):
    """The second process has no file of its own, and decides as the first does."""
    settings = {"steps_per_generation": 2, "save_strategy": "steps", "save_steps": 3 if waiting else 2}
    trainer(GivenRollouts(), max_steps=3, **settings).train()
    made = second(max_steps=5, **settings)
    if waiting:
        with pytest.raises(UsageError, match=r"Completions wait in .*checkpoint-3") as caught:
            made.train(resume_from_checkpoint=True)
        assert [(p.where, p.value) for p in caught.value.problems] == [("GRPOConfig world_size", 2)]
        return
    folder = Path(config["output_dir"]) / "checkpoint-2"
    assert made.resume_problems(folder) == [] and "other batches" not in capsys.readouterr().out
    made.is_world_process_zero = lambda: True
    assert made.resume_problems(folder) == []
    assert "checkpoint-2: world_size is 2 (there 1); the place" in capsys.readouterr().out


def test_a_process_without_its_completions_stops_all(second, trainer, config):
    settings = {"steps_per_generation": 2, "save_strategy": "steps", "save_steps": 3}
    trainer(GivenRollouts(), max_steps=3, **settings).train()
    folder, made = Path(config["output_dir"]) / "checkpoint-3", second(max_steps=5, **settings)
    kept = torch.load(folder / "rollouts-0.pt", weights_only=True)
    kept["batching"]["world_size"] = 2
    torch.save(kept, folder / "rollouts-0.pt")
    (problem,) = made.resume_problems(folder)
    assert problem.where == str(folder / "rollouts-1.pt") and "Completions wait in" in problem.remedy
    torch.save(kept, folder / "rollouts-1.pt")
    assert made.resume_problems(folder) == []
    (folder / "rollouts-0.pt").unlink()
    (problem,) = made.resume_problems(folder)
    assert problem.where == str(folder / "rollouts-0.pt")
