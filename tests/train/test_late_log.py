"""A line of the log that is read while the next step runs says what it would have said at once."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback
from transformers.training_args import ParallelMode

from fastft.train import finite, late_log, record, spent
from fastft.train.late_log import may_be_late, on_its_way
from fastft.train.record import kept_lines
from fastft.train.sft.config import SFTConfig
from fastft.train.sft.trainer import SFTTrainer


class Late(SFTTrainer):
    """Logs late on a CPU, too, and notes which lines were."""

    logs_late = True

    def __init__(self, *args, **kwargs):
        self.late = []
        super().__init__(*args, **kwargs)

    def log_late_line(self):
        self.late += [self.state.global_step] * (self._line is not None)
        super().log_late_line()


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


def test_nothing_is_read_before_the_next_step_is_launched(build_model, tokenizer, dataset, settings, monkeypatch):
    events = []

    def watched(tensor, send=on_its_way):
        read, what = send(tensor), len(events)
        events.append(("sent", what))
        return lambda: events.append(("read", what)) or read()

    for module in (late_log, finite, spent):
        monkeypatch.setattr(module, "on_its_way", watched)

    class Watched(Late):
        def training_step(self, *args, **kwargs):
            events.append(("step", self.state.global_step + 1))
            return super().training_step(*args, **kwargs)

        def compute_loss(self, *args, **kwargs):
            events.append(("launched", self.state.global_step + 1))
            return super().compute_loss(*args, **kwargs)

    made(Watched, build_model, tokenizer, dataset, settings, max_steps=3).train()
    second = events.index(("step", 2))
    sent = [what for event, what in events[:second] if event == "sent"]
    assert len(sent) == 4  # loss, gradient norm, tokens, losses that were no numbers
    assert not [event for event, _ in events[:second] if event == "read"]
    launched, third = events.index(("launched", 2)), events.index(("step", 3))
    assert sorted(what for event, what in events[launched:third] if event == "read") == sent
    assert not [event for event, _ in events[second:launched] if event == "read"]


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


def step_done(**changes):
    """Return what `may_be_late` asks of a trainer behind a step whose line may be late, but for `changes`."""
    args = {"auto_find_batch_size": False, "parallel_mode": ParallelMode.NOT_PARALLEL}
    flags = ("should_evaluate", "should_save", "should_training_stop", "should_epoch_stop")
    control = {"should_log": True, **dict.fromkeys(flags, False)}
    state = {"global_step": 3, "max_steps": 8, "epoch": 0.75}
    own = {"_globalstep_last_logged": 2, "callback_handler": SimpleNamespace(callbacks=changes.pop("callbacks", []))}
    parts = (SimpleNamespace(**{k: changes.pop(k, v) for k, v in part.items()}) for part in (args, control, state))
    made = dict(zip(("args", "control", "state"), parts, strict=True)) | own | changes
    return SimpleNamespace(**made)


class Begins(TrainerCallback):
    """Looks at the log as a step begins."""

    def on_step_begin(self, args, state, control, **kwargs):
        pass


@pytest.mark.parametrize("changes", [
    {"should_log": False}, {"should_evaluate": True}, {"should_save": True}, {"should_training_stop": True},
    {"should_epoch_stop": True}, {"global_step": 8}, {"epoch": 1.0}, {"auto_find_batch_size": True},
    {"parallel_mode": ParallelMode.DISTRIBUTED}, {"parallel_mode": ParallelMode.NOT_DISTRIBUTED},
    {"_globalstep_last_logged": 3}, {"callbacks": [Stops()]}, {"callbacks": [TrainerCallback(), Begins()]},
])  # fmt: skip
def test_where_a_line_cannot_wait(changes):
    assert may_be_late(step_done()) and may_be_late(step_done(callbacks=[TrainerCallback()]))
    assert not may_be_late(step_done(**changes))


class Endless(torch.utils.data.IterableDataset):
    """Says that it has more rows than it gives."""

    column_names = ("input_ids", "labels")

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return 2 * len(self.rows)

    def __iter__(self):
        return iter(self.rows)


@pytest.mark.parametrize("changes", [{"logging_strategy": "epoch"}, {"logging_steps": 1}])
def test_the_line_at_the_end_of_an_epoch_comes_with_it(changes, build_model, tokenizer, dataset, settings):
    histories = []
    for kind in (SFTTrainer, Late):
        trainer = made(kind, build_model, tokenizer, dataset, settings, **changes)
        trainer.train_dataset = Endless(list(dataset))
        histories.append((trainer.train().training_loss, timeless(trainer.state.log_history)))
    assert histories[0] == histories[1] and "train_loss" in histories[1][1][-1]
    assert trainer.state.global_step < trainer.state.max_steps


def test_what_is_asked_for_of_the_step_that_runs_stays_so(build_model, tokenizer, dataset, settings, tmp_path):
    class Asks(Late):
        """Asks for a checkpoint, an evaluation and a line of step 3 while it runs: before the line of step 2 is out."""

        def compute_loss(self, *args, **kwargs):
            if self.state.global_step == 2 and self.model.training:
                self.control.should_save = self.control.should_evaluate = self.control.should_log = True
            return super().compute_loss(*args, **kwargs)

    class Waits(Asks):
        logs_late = False

    found = []
    for kind in (Waits, Asks):
        own = {**settings, "output_dir": str(tmp_path / kind.__name__), "logging_steps": 2, "max_steps": 6}
        trainer = made(kind, build_model, tokenizer, dataset, own)
        trainer.args.logging_steps = trainer.state.logging_steps = 2
        trainer.train()
        saved = sorted(path.name for path in (tmp_path / kind.__name__).glob("checkpoint-*"))
        found.append((saved, [(row["step"], "eval_loss" in row) for row in history(trainer)]))
    assert found[0] == found[1] and "checkpoint-3" in found[1][0] and (3, True) in found[1][1]


def test_the_time_of_a_step_that_fails_is_none_of_the_line_before(
    build_model, tokenizer, dataset, settings, monkeypatch, tmp_path
):
    now = [0.0]
    monkeypatch.setattr(spent.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(record.time, "time", lambda: now[0])
    monkeypatch.setattr(record, "peak_memory", lambda: int(now[0]))

    class Failing(Late):
        def compute_loss(self, *args, **kwargs):
            now[0] += 1.0
            if self.state.global_step == 2:
                now[0] += 100.0
                raise RuntimeError("this step fails")
            return super().compute_loss(*args, **kwargs)

    class Waits(Failing):
        logs_late = False

    for kind in (Waits, Failing):
        folder = tmp_path / kind.__name__
        trainer = made(kind, build_model, tokenizer, dataset, {**settings, "output_dir": str(folder)})
        with pytest.raises(RuntimeError, match="this step fails"):
            trainer.train()
        lines = kept_lines(folder / "metrics.jsonl", 99)
        assert [line["train_seconds"] for line in lines] == [1.0, 1.0], kind
        assert [(line["wall_seconds"], line["peak_memory_bytes"]) for line in lines] == [(1.0, 1), (2.0, 2)], kind
        now[0] = 0.0
        assert json.loads((folder / "run.json").read_text())["train_seconds"] == 2.0


def test_without_the_filter_what_is_no_number_stays_none(build_model, tokenizer, dataset, settings):
    class Unlucky(Late):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss + (math.nan if self.state.global_step == 1 else 0.0)

    class Waits(Unlucky):
        logs_late = False

    for kind in (Waits, Unlucky):
        trainer = made(kind, build_model, tokenizer, dataset, settings, max_steps=4, logging_nan_inf_filter=False)
        trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        assert [math.isnan(loss) for loss in losses] == [False, True, True, True]


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
    told = json.loads((tmp_path / "run.json").read_text())
    assert told["status"] == "failed" and told["steps"] == 2 and told["loss"]["last"] == rows(trainer)[1]["loss"]


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
        told.append([line for line in capsys.readouterr().out.splitlines() if "In the log's mean" in line])
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert told[0] == told[1] and len(told[0]) == 1 and losses[0] == losses[1]


def test_sft_logs_late_on_a_gpu_alone_and_not_for_a_subclass_that_adds_to_a_line(
    build_model, tokenizer, dataset, settings, monkeypatch
):
    class Adds(SFTTrainer):
        def log(self, logs, start_time=None):
            super().log({**logs, "more": 1.0}, start_time)

    class Counts(SFTTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    kinds = (SFTTrainer, Adds, Counts)
    plain, *others = (made(kind, build_model, tokenizer, dataset, settings) for kind in kinds)
    assert not any(one.logs_late for one in (plain, *others))  # `settings` have it train on the CPU
    monkeypatch.setattr(SFTConfig, "device", torch.device("cuda"))
    assert plain.logs_late is True and not any(other.logs_late for other in others)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"
))])  # fmt: skip
def test_a_number_on_its_way_is_what_it_was_when_it_was_sent(device):
    number = torch.full((3,), 2.5, device=device)
    read = on_its_way(number)
    number.zero_()
    assert read().tolist() == [2.5, 2.5, 2.5] and read().device.type == "cpu"
