"""What a run that fails leaves: its last whole step, an earlier run where it was, and the model as it was."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from fastft.errors import DataError, FastftError, MetricError, UsageError
from fastft.train import checkpoint
from fastft.train.metric_values import Checked
from fastft.train.sft.config import SFTConfig
from fastft.train.sft.trainer import SFTTrainer

EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}


def trainer(model, tokenizer, rows, settings, eval_dataset=None, compute_metrics=None, callbacks=(), **changes):
    return SFTTrainer(
        model, SFTConfig(**{**settings, **changes}), train_dataset=rows, eval_dataset=eval_dataset,
        processing_class=tokenizer, compute_metrics=compute_metrics, callbacks=list(callbacks), compile=False,
    )  # fmt: skip


def evaluated(build_model, build_rows, tokenizer, settings, metrics, **changes):
    rows = Dataset.from_list(build_rows(4))
    made = trainer(
        build_model(), tokenizer, rows, {**settings, **EVALUATED, **changes}, eval_dataset=rows, compute_metrics=metrics
    )
    return made, Path(settings["output_dir"])


class Fails(TrainerCallback):
    def __init__(self, error):
        self.error = error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise self.error


@pytest.mark.parametrize(
    ("metrics", "told"),
    [
        (lambda _: 1 / 0, "expected a dict of numbers by name, got 'ZeroDivisionError: division by zero'"),
        (lambda _: 0.5, "compute_metrics: expected a dict of numbers by name, got 0.5"),
        (lambda _: None, "compute_metrics: expected a dict of numbers by name, got None"),
        (lambda _: {"x": np.array([1, 2]), "y": 1.0}, r"compute_metrics, x: expected a number, got array\(\[1, 2\]\)"),
        (lambda _: {"x": "good"}, "compute_metrics, x: expected a number, got 'good'"),
    ],
    ids=["raises", "number", "none", "array", "text"],
)  # fmt: skip
def test_a_failing_metric_costs_no_training(build_model, build_rows, tokenizer, settings, metrics, told):
    made, folder = evaluated(build_model, build_rows, tokenizer, settings, metrics)
    with pytest.raises(MetricError, match=told) as caught:
        made.train()
    saved = folder / "checkpoint-2"
    assert f"Step 2, the last whole one, is saved in {saved}; resume={str(saved)!r} goes on" in str(caught.value)
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "failed" and record["steps"] == 2 and "compute_metrics" in record["error"]
    weights = {name: part for name, part in made.model.state_dict().items() if "lora" in name}
    again, _ = evaluated(build_model, build_rows, tokenizer, settings, lambda _: {"x": 1})
    again.train(resume_from_checkpoint=str(saved))
    assert again.state.global_step == 4 and weights
    assert [line["eval_x"] for line in again.state.log_history if "eval_x" in line] == [1]


def test_numbers_of_every_kind_are_metrics(build_model, build_rows, tokenizer, settings):
    kinds = {"a": 1, "b": np.float32(0.5), "c": np.array(0.25), "d": torch.tensor(2), "e": float("nan"), "f": True}
    made, folder = evaluated(build_model, build_rows, tokenizer, settings, lambda _: kinds, save_strategy="steps",
                             save_steps=1)  # fmt: skip
    made.train()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [{name: line[f"eval_{name}"] for name in kinds} for line in lines if "eval_a" in line]
    assert found == [{"a": 1, "b": 0.5, "c": 0.25, "d": 2, "e": "nan", "f": True}] * 2
    assert len(checkpoint.checkpoints(folder)) == 4


def test_metrics_by_batches_are_checked_at_the_last_one():
    checked = Checked(lambda prediction, compute_result=True: {"x": 1.0} if compute_result else None)
    assert checked(None, compute_result=False) is None and checked(None, compute_result=True) == {"x": 1.0}


def test_a_metric_that_there_is_not_costs_no_training(build_model, build_rows, tokenizer, settings):
    changes = {"load_best_model_at_end": True, "metric_for_best_model": "acuracy", "save_strategy": "steps",
               "save_steps": 2, "greater_is_better": True}  # fmt: skip
    made, folder = evaluated(build_model, build_rows, tokenizer, settings, lambda _: {"accuracy": 1.0}, **changes)
    with pytest.raises(MetricError) as caught:
        made.train()
    told = str(caught.value)
    assert "SFTConfig metric_for_best_model: expected what the evaluation gave: eval_loss, " in told
    assert "got 'acuracy'. did you mean 'accuracy'?" in told
    assert f"Step 2, the last whole one, is saved in {folder / 'checkpoint-2'}" in told


def test_whatever_else_fails_costs_no_training(build_model, tokenizer, dataset, settings):
    made = trainer(build_model(), tokenizer, dataset, settings, callbacks=[Fails(RuntimeError("the disk of the log"))])
    with pytest.raises(RuntimeError, match="the disk of the log") as caught:
        made.train()
    saved = Path(settings["output_dir"]) / "checkpoint-2"
    assert caught.value.__notes__ == [
        f"Step 2, the last whole one, is saved in {saved}; resume={str(saved)!r} goes on from it."
    ]
    assert json.loads((saved / "trainer_state.json").read_text())["global_step"] == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), DataError("a row"), SystemExit(3)], ids=["stop", "data", "end"])
def test_the_noise_of_neftune_ends_with_its_run(build_model, tokenizer, dataset, settings, error):
    model, ids = build_model(), torch.tensor([[1, 5, 9, 30]])
    quiet = {**settings, "learning_rate": 0.0}
    made = trainer(model, tokenizer, dataset, quiet, neftune_noise_alpha=50.0, callbacks=[Fails(error)])
    before = model.eval()(ids).logits
    with pytest.raises((KeyboardInterrupt, FastftError, SystemExit)):
        made.train()
    assert not hasattr(model.get_input_embeddings(), "neftune_noise_alpha")
    assert torch.equal(model.train()(ids).logits, before)


def test_an_earlier_run_stays_where_it_is_if_the_new_one_cannot_begin(run, build_model, tokenizer, dataset, settings):
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    with pytest.raises(UsageError, match="embedding_learning_rate"):
        trainer(build_model(), tokenizer, dataset, settings, embedding_learning_rate=1e-4).train()
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before


def test_what_a_callback_writes_as_a_run_begins_is_of_that_run(run, build_model, tokenizer, dataset, settings):
    class Writes(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            (Path(args.output_dir) / "config.json").write_text("{}")

    trainer(build_model(), tokenizer, dataset, settings, callbacks=[Writes()]).train()
    assert (run / "config.json").read_text() == "{}" and (run / "_earlier-1" / "checkpoint-2").is_dir()
    assert not (run / "_earlier-1" / "config.json").exists()


def test_a_step_whose_end_a_callback_failed_at_is_counted(build_model, tokenizer, dataset, settings):
    steps = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    folder = Path(settings["output_dir"])
    trainer(build_model(), tokenizer, dataset, {**settings, **steps}, output_dir=f"{folder}-whole").train()
    with pytest.raises(RuntimeError):
        failing = [Fails(RuntimeError())]
        trainer(build_model(), tokenizer, dataset, {**settings, **steps}, callbacks=failing).train()
    made = trainer(build_model(), tokenizer, dataset, {**settings, **steps})
    made.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    found, whole = (json.loads((path / "run.json").read_text()) for path in (folder, Path(f"{folder}-whole")))
    assert found["tokens"] == whole["tokens"] and found["flops"] == whole["flops"]


def test_a_run_that_failed_behind_its_last_step_names_what_it_has(build_model, build_rows, tokenizer, settings):
    made, folder = evaluated(build_model, build_rows, tokenizer, settings, lambda _: 1 / 0, max_steps=2)
    with pytest.raises(MetricError) as caught:
        made.train()
    saved = str(folder / "checkpoint-2")
    assert f"is saved in {saved}; fastft.load({saved!r}) loads it: no step was left." in str(caught.value)
