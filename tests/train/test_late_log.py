"""A line of the log that is read while the next step runs says what it would have said at once."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from fastft.train.late_log import on_its_way
from fastft.train.record import kept_lines
from fastft.train.sft.config import SFTConfig
from fastft.train.sft.trainer import SFTTrainer


class Late(SFTTrainer):
    """Logs late on a CPU, too, and notes which lines were."""

    logs_late = True

    def __init__(self, *args, **kwargs):
        self.late = []
        super().__init__(*args, **kwargs)

    def _log_line(self):
        self.late += [self.state.global_step] * (self._line is not None)
        super()._log_line()


def made(kind, build_model, tokenizer, dataset, settings, callbacks=(), **changes):
    config = {**settings, "num_train_epochs": 2, "max_steps": -1, "logging_steps": 1, **changes}
    given = {"train_dataset": dataset, "eval_dataset": dataset, "processing_class": tokenizer, "compile": False}
    return kind(build_model(), SFTConfig(**config), callbacks=list(callbacks), **given)


def timeless(lines):
    """Return lines of a log without what says how long something took."""
    spent = ("runtime", "per_second", "train_seconds", "wall_seconds", "peak_memory_bytes")
    return [{name: value for name, value in line.items() if not name.endswith(spent)} for line in lines]


def rows(trainer):
    return timeless(kept_lines(Path(trainer.args.output_dir) / "metrics.jsonl", 999))


def history(trainer):
    return timeless(row for row in trainer.state.log_history if "train_loss" not in row)


@pytest.mark.parametrize("changes", [
    {},
    {"gradient_accumulation_steps": 2, "logging_steps": 2},
    {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 4},
    {"eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch"},
    {"max_grad_norm": 0.0, "max_steps": 5, "include_num_input_tokens_seen": "all"},
])  # fmt: skip
def test_its_lines_are_those_of_one_that_waits(changes, build_model, tokenizer, dataset, settings, tmp_path):
    trainers = []
    for kind in (SFTTrainer, Late):
        folder = str(tmp_path / kind.__name__)
        trainer = made(kind, build_model, tokenizer, dataset, {**settings, "output_dir": folder}, **changes)
        trainer.train()
        trainers.append(trainer)
    waits, late = trainers
    assert history(late) == history(waits) and rows(late) == rows(waits)
    assert late.state.global_step == waits.state.global_step and late.state.total_flos == waits.state.total_flos
    records = [json.loads((Path(one.args.output_dir) / "run.json").read_text()) for one in trainers]
    assert records[0]["tokens"] == records[1]["tokens"] and records[0]["loss"] == records[1]["loss"]
    ends = {row["step"] for row in history(waits) if float(row["epoch"]).is_integer()}
    others = {name for name in ("eval_steps", "save_steps") if name in changes}
    followed = {step for step in range(99) for name in others if step % changes[name] == 0}
    lines = {row["step"] for row in history(waits) if "loss" in row}
    expected = sorted(lines - ends - followed - {waits.state.max_steps})
    assert sorted(late.late) == expected and (expected or changes.get("logging_strategy"))


def test_a_line_comes_before_the_next_step_changes_the_weights(build_model, tokenizer, dataset, settings):
    seen = []

    class Watched(Late):
        def log(self, logs, start_time=None):
            weights = sum(weight.double().sum().item() for weight in self.model.parameters() if weight.requires_grad)
            seen.append((self.state.global_step, weights, len(self.optimizer.state)))
            super().log(logs, start_time)

    class Waiting(Watched):
        logs_late = False

    for kind in (Waiting, Watched):
        made(kind, build_model, tokenizer, dataset, settings, max_steps=3).train()
    half = len(seen) // 2
    assert seen[:half] == seen[half:] and [step for step, *_ in seen[:3]] == [1, 2, 3]


class Stops(TrainerCallback):
    """Ends the run by what a line says."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        control.should_training_stop |= state.global_step == 2


def test_a_users_callback_sees_a_line_when_the_step_is_done(build_model, tokenizer, dataset, settings):
    trainer = made(Late, build_model, tokenizer, dataset, settings, [Stops()])
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.late == []
    other = made(Late, build_model, tokenizer, dataset, settings, [TrainerCallback()], max_steps=3)
    other.train()
    assert other.late


def test_the_line_of_the_last_whole_step_is_there_where_the_next_one_fails(
    build_model, tokenizer, dataset, settings, tmp_path
):
    class Failing(Late):
        def compute_loss(self, *args, **kwargs):
            if self.state.global_step == 2:
                raise RuntimeError("this step fails")
            return super().compute_loss(*args, **kwargs)

    trainer = made(Failing, build_model, tokenizer, dataset, {**settings, "output_dir": str(tmp_path)})
    with pytest.raises(RuntimeError, match="this step fails"):
        trainer.train()
    assert [row["step"] for row in rows(trainer)] == [1, 2] == [row["step"] for row in trainer.state.log_history]
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["status"] == "failed" and record["steps"] == 2 and record["loss"]["last"] == rows(trainer)[1]["loss"]


def test_losses_that_are_no_numbers_are_told_with_their_line(build_model, tokenizer, dataset, settings, capsys):
    class Unlucky(Late):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss + (math.nan if self.state.global_step in (1, 2) else 0.0)

    class Waiting(Unlucky):
        logs_late = False

    told, losses = [], []
    for kind in (Waiting, Unlucky):
        trainer = made(kind, build_model, tokenizer, dataset, settings, max_steps=4)
        trainer.train()
        told.append([line for line in capsys.readouterr().out.splitlines() if "was not a number" in line])
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert told[0] == told[1] and len(told[0]) == 1 and losses[0] == losses[1]


def test_sft_logs_late_on_a_gpu_alone_and_not_for_a_subclass_that_adds_to_a_line(
    build_model, tokenizer, dataset, settings, monkeypatch
):
    class Adds(SFTTrainer):
        def log(self, logs, start_time=None):
            super().log({**logs, "more": 1.0}, start_time)

    plain, adds = (made(kind, build_model, tokenizer, dataset, settings) for kind in (SFTTrainer, Adds))
    on_gpu = torch.cuda.is_available()
    assert plain.logs_late is on_gpu and adds.logs_late is False
    monkeypatch.setattr(SFTConfig, "device", torch.device("cuda"))
    assert plain.logs_late is True and adds.logs_late is False


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"
))])  # fmt: skip
def test_a_number_on_its_way_is_what_it_was_when_it_was_sent(device):
    number = torch.full((3,), 2.5, device=device)
    read = on_its_way(number)
    number.zero_()
    assert read().tolist() == [2.5, 2.5, 2.5] and read().device.type == "cpu"
