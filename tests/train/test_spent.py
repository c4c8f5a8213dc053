"""Tokens, seconds and operations go on where a checkpoint was made, wherever it lies between the lines of the log."""

import json
from pathlib import Path

import pytest
import torch
from attrs import evolve

from fastft.errors import OutOfMemoryError
from fastft.train import flops, spent
from fastft.train.record import kept_lines
from fastft.train.sft.config import SFTConfig
from fastft.train.sft.trainer import SFTTrainer

RUN = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 2}
# the last line before checkpoint-4 is an evaluation; the checkpoint lies between two lines; before all; there is none
EVERY = {
    "evaluated": {"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 4},
    "between": {"logging_steps": 3},
    "none": {"logging_steps": 50},
    "no": {"logging_strategy": "no"},
}


@pytest.fixture
def trainer(build_model, tokenizer, dataset, settings):
    def make(folder, **changes):
        place = str(Path(settings["output_dir"]).with_name(folder))
        args = SFTConfig(**{**settings, **RUN, **changes, "output_dir": place})
        held = dataset.select(range(2)) if "eval_strategy" in changes else None
        options = {"train_dataset": dataset, "eval_dataset": held, "processing_class": tokenizer, "compile": False}
        return SFTTrainer(build_model(), args, **options), Path(place)

    return make


def record(folder):
    return json.loads((folder / "run.json").read_text())


@pytest.mark.parametrize("every", EVERY)
def test_a_resumed_run_counts_on(every, trainer):
    made, whole = trainer("whole", max_steps=7, **EVERY[every])
    made.train()
    made, parts = trainer("parts", max_steps=7, **EVERY[every])
    made.train()
    there = record(parts / "checkpoint-4")
    assert there["tokens"] == record(whole / "checkpoint-4")["tokens"] and there["steps"] == 4
    made, _ = trainer("parts", max_steps=7, **EVERY[every])
    made.train(resume_from_checkpoint=str(parts / "checkpoint-4"))  # as if the run had been killed behind it
    once, told = record(whole), record(parts)
    assert told["tokens"] == once["tokens"] and told["flops"] == pytest.approx(once["flops"])
    assert there["tokens"]["non_padding"] < told["tokens"]["non_padding"]
    assert told["train_seconds"] > there["train_seconds"] > 0
    for name, count in told["tokens"].items():
        assert told["tokens_per_second"][name] == pytest.approx(count / told["train_seconds"])
    before, lines = (
        {row["step"]: row["tokens"] for row in kept_lines(folder / "metrics.jsonl", 99) if "tokens" in row}
        for folder in (whole, parts)
    )
    assert before == lines


def test_a_checkpoint_that_tells_nothing_is_counted_from(trainer, capsys):
    made, whole = trainer("whole", max_steps=4)
    made.train()
    made, folder = trainer("run", max_steps=2)
    made.train()
    path = folder / "checkpoint-2" / "run.json"
    there = record(path.parent)
    path.write_text(json.dumps({name: value for name, value in there.items() if name != "flops"}))
    made, _ = trainer("run", max_steps=4)
    made.train(resume_from_checkpoint=True)
    note = f"tokens, train_seconds and flops are counted from step 2 on, which is what {path.parent} has: it does not "
    note += "tell what came before"
    assert record(folder)["notes"] == [note] and f"fastft: {note}; " in capsys.readouterr().out
    expected = {name: count - there["tokens"][name] for name, count in record(whole)["tokens"].items()}
    assert record(folder)["tokens"] == expected


def test_counts_are_those_of_all_processes(trainer):
    found = []
    for times in (1, 3):
        made, folder = trainer(f"run-{times}", max_steps=2, save_steps=1, logging_steps=2)
        made.recorder.spent.reduce = lambda counts, times=times: times * counts
        made.train()
        found.append([record(place)["tokens"] for place in (folder / "checkpoint-1", folder)])
    assert [{name: 3 * count for name, count in one.items()} for one in found[0]] == found[1]


def test_the_tokens_of_a_step_that_broke_off_are_not_counted(trainer):
    made, folder = trainer("run", max_steps=4, save_strategy="no", logging_steps=3)
    step, done = made.training_step, []

    def broken(*args, **kwargs):
        done.append(args[1]["input_ids"].numel())
        if len(done) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(*args, **kwargs)

    made.training_step = broken
    with pytest.raises(OutOfMemoryError, match="Step 2, the last whole one, is saved"):
        made.train()
    assert record(folder)["status"] == "failed" and record(folder)["tokens"]["all"] == sum(done[:2])
    assert record(folder / "checkpoint-2")["tokens"] == record(folder)["tokens"]


def test_waiting_for_the_device_is_training(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(spent.time, "perf_counter", lambda: now[0])
    tally = spent.Tally()
    counts = spent.Spent(tally, lambda tensor: now.__setitem__(0, now[0] + 5.0) or tensor)
    counts.clock.start()
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.ones(2, 3, dtype=torch.long)}
    tally.add(batch)
    assert counts.so_far()["tokens"]["all"] == 0
    tally.step_ended()
    counts.clock.step_ended()
    counts.count()  # before a checkpoint: the device is five seconds behind
    now[0] = 9.0
    counts.clock.leave_out()  # four seconds of saving
    assert counts.clock.so_far() == 5.0 and counts.behind["all"] == 6
    counts.clock.step_began()
    tally.add(batch)
    tally.step_ended()
    counts.count()  # of a step that is not done: its time is not known to be training
    assert counts.clock.so_far() == 5.0


@pytest.fixture
def timed(monkeypatch):
    """What is spent in steps of 6 tokens each, on a clock that goes on when it is told to."""
    now = [0.0]
    monkeypatch.setattr(spent.time, "perf_counter", lambda: now[0])
    made = spent.Spent(spent.Tally(), lambda counts: counts)
    made.begin(flops.Work(1000, 0, 0, False, 0, ()), {})  # 4000 operations a token
    made.clock.start()
    batch = {"input_ids": torch.ones(1, 6, dtype=torch.int64), "labels": torch.ones(1, 6, dtype=torch.int64)}

    def wait(seconds):
        now[0] += seconds

    def step(seconds):
        made.clock.step_began()
        made.tally.add(batch)
        wait(seconds)
        made.clock.step_ended()
        made.tally.step_ended()

    return made, step, wait


def test_speeds_leave_the_first_line_out_where_there_are_more(timed):
    made, step, _ = timed
    device = {"peak_flops": 1000.0, "count": 2}
    assert made.speeds(device) == {
        "tokens_per_second": dict.fromkeys(spent.TOKENS, 0.0),
        "tokens_per_second_after_first_log": dict.fromkeys(spent.TOKENS, 0.0), "mfu": None,
    }  # fmt: skip
    step(10.0)
    assert made.line()["tokens_per_second"]["all"] == 0.6
    first = made.speeds(device)  # there is no other line yet
    assert first["tokens_per_second"]["all"] == first["tokens_per_second_after_first_log"]["all"] == 0.6
    step(2.0)
    made.line()
    step(1.0)
    made.count()
    found = made.speeds(device)
    assert found["tokens_per_second"]["all"] == 18 / 13 and found["tokens_per_second_after_first_log"]["all"] == 4.0
    assert found["mfu"] == 12 * 4000 / 3.0 / 2000.0  # of both devices' peaks
    assert made.speeds({"peak_flops": None, "count": 1})["mfu"] is None
    made.work = evolve(made.work, experts=True)  # of which the count does not know how many a token goes through
    assert made.speeds(device)["mfu"] is None


def test_a_run_that_begins_has_spent_nothing(timed):
    made, step, _ = timed
    for line in (True, False):
        step(10.0)
        (made.line if line else made.count)()
        made.begin(made.work, {})
        made.clock.start()
        assert made.so_far() == {"tokens": dict.fromkeys(spent.TOKENS, 0), "train_seconds": 0.0, "flops": 0.0}


def test_counts_without_a_time_have_no_speed(timed):
    made, step, _ = timed
    step(0.0)
    made.count()
    found = made.speeds({"peak_flops": 1000.0, "count": 1})
    assert found["mfu"] is None and found["tokens_per_second"]["all"] == 0.0 and made.so_far()["flops"] == 24_000


def test_pauses_add_up_and_a_line_that_comes_later_ends_when_it_was_sent(timed):
    made, step, wait = timed
    step(4.0)
    for pause in (2.0, 3.0):
        wait(pause)
        made.clock.leave_out()
    assert made.clock.so_far() == 4.0
    made.send()
    wait(1.0)
    assert made.line()["train_seconds"] == 4.0
    step(6.0)  # the second since the line was sent is the next one's
    assert made.line()["train_seconds"] == 7.0


def test_the_time_behind_a_step_is_training_where_counts_had_to_be_waited_for(timed):
    made, step, wait = timed
    step(2.0)
    wait(3.0)
    made.count()
    assert made.clock.so_far() == 5.0
    wait(4.0)
    made.count()  # of no step: nothing was waited for
    assert made.clock.so_far() == 5.0


def test_what_a_run_that_was_broken_off_counted_is_not_the_next_ones():
    tally = spent.Tally()
    made = spent.Spent(tally, lambda counts: counts)
    batch = {"input_ids": torch.ones(1, 6, dtype=torch.int64), "labels": torch.ones(1, 6, dtype=torch.int64)}
    for pending in (False, True):  # within a step, and behind a whole one
        tally.add(batch)
        if pending:
            tally.step_ended()
        made.begin(None, {})
        assert tally.take(lambda counts: counts) == {}
    tally.add(batch)
    tally.step_ended()
    tally.send(lambda counts: counts)  # on its way
    made.begin(None, {})
    assert tally.take(lambda counts: counts) == {}
