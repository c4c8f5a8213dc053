"""The last step of a run stands in the log, whatever trainer it is of and however the run ends."""

import json
import signal
from pathlib import Path

import pytest
from transformers import TrainerCallback

import fastft
from fastft.demo import MODEL_FOLDER
from fastft.train.record import kept_lines
from fastft.train.sft.config import SFTConfig
from fastft.train.sft.trainer import SFTTrainer

SHORT = {"steps": 3, "batch_size": 4, "compile": False}
ROWS = [{"prompt": f"{n} and one is", "completion": f" {n + 1}"} for n in range(12)]
PAIRS = [{"prompt": f"{n} and one is", "chosen": f" {n + 1}", "rejected": " none"} for n in range(12)]


def even(completions, **columns):
    return [float(len(text) % 2) for text in completions]


def run(name, folder, **options):
    model, tokenizer = fastft.load(MODEL_FOLDER)
    model = fastft.add_lora(model)
    if name == "sft":
        return fastft.sft(model, tokenizer, ROWS, folder, **SHORT, **options)
    if name == "grpo":
        options |= {"generations": 4, "accumulate": 1, "max_new_tokens": 4, "engine": "transformers"}
        return fastft.grpo(model, tokenizer, ROWS, [even], folder, **SHORT, **options)
    return fastft.preference(model, tokenizer, PAIRS, folder, loss=name, **SHORT, **options)


def lines(folder):
    return [row["step"] for row in kept_lines(Path(folder) / "metrics.jsonl", 99) if "loss" in row]


@pytest.mark.parametrize("name", ["sft", "grpo", "dpo", "kto", "orpo", "cpo"])
@pytest.mark.parametrize(("every", "logged"), [(2, [2, 3]), (50, [3]), (3, [3])])
def test_of_every_trainer(name, every, logged, tmp_path):
    result = run(name, tmp_path / "run", log_every=every)
    assert [step for step, _ in result.losses] == logged == lines(tmp_path / "run")


def test_the_mean_of_a_line_is_that_of_its_steps(tmp_path):
    each, together = (run("sft", tmp_path / str(every), log_every=every).losses for every in (1, 2))
    assert together[1] == each[2] and together[0][1] == pytest.approx((each[0][1] + each[1][1]) / 2)
    record = json.loads((tmp_path / "2" / "run.json").read_text())
    assert record["loss"] == {"first": together[0][1], "last": together[1][1]}


def test_nothing_is_logged_where_nothing_is_to_be(tmp_path):
    assert run("sft", tmp_path / "run", logging_strategy="no").losses == () and lines(tmp_path / "run") == []


class Stop(TrainerCallback):
    """Ends the training at an event of the second step."""

    def __init__(self, event):
        setattr(self, event, self.stop)

    def stop(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == 2


STEPS = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
EPOCHS = {"save_strategy": "epoch", "eval_strategy": "epoch", "num_train_epochs": 3, "max_steps": -1}


@pytest.mark.parametrize("event", ["on_step_end", "on_evaluate", "on_save"])
@pytest.mark.parametrize("often", [STEPS, EPOCHS], ids=["steps", "epochs"])
@pytest.mark.parametrize("late", [False, True])  # a callback that is asked before ours, or behind them
def test_a_run_that_is_stopped(event, often, late, build_model, tokenizer, dataset, settings):
    args = SFTConfig(**{**settings, **often, "logging_steps": 50})
    rows, few = dataset.select(range(4)), dataset.select(range(2))  # an epoch of two steps
    data = {"train_dataset": rows, "eval_dataset": few, "processing_class": tokenizer}
    made = SFTTrainer(build_model(), args, **data, callbacks=[] if late else [Stop(event)], compile=False)
    if late:
        made.add_callback(Stop(event))
    made.train()
    assert lines(settings["output_dir"]) == [2] and made.state.global_step == 2


def test_a_line_at_the_end_of_an_epoch_is_not_told_twice(build_model, tokenizer, dataset, settings):
    args = SFTConfig(**{**settings, "max_steps": -1, "num_train_epochs": 2, "logging_strategy": "epoch"})
    data = {"train_dataset": dataset.select(range(4)), "processing_class": tokenizer}
    SFTTrainer(build_model(), args, **data, compile=False).train()
    assert lines(settings["output_dir"]) == [2, 4]


class Rings(TrainerCallback):
    """Presses Ctrl-C in the first evaluation."""

    rung = False

    def on_prediction_step(self, args, state, control, **kwargs):
        if not self.rung:
            self.rung = True
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("often", [STEPS, EPOCHS], ids=["steps", "epochs"])
def test_a_run_that_is_interrupted_while_it_evaluates(often, build_model, tokenizer, dataset, settings):
    args = SFTConfig(**{**settings, **often, "logging_steps": 50})
    rows, few = dataset.select(range(4)), dataset.select(range(2))
    data = {"train_dataset": rows, "eval_dataset": few, "processing_class": tokenizer}
    made = SFTTrainer(build_model(), args, **data, callbacks=[Rings()], compile=False)
    with pytest.raises(KeyboardInterrupt):
        made.train()
    last = 1 if often is STEPS else 2
    assert lines(settings["output_dir"]) == [last] == [made.state.global_step]
    folder = Path(settings["output_dir"]) / f"checkpoint-{last}"
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert [row["step"] for row in history if "loss" in row] == [last]
    record = json.loads((Path(settings["output_dir"]) / "run.json").read_text())
    assert record["status"] == "interrupted" and record["loss"]["last"] is not None
