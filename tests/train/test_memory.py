"""Memory in training: the record's prediction, the batch to plan for, an out-of-memory that loses nothing."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tiny import in_nf4, with_lora
from transformers import TrainerCallback

from fastft.errors import OutOfMemoryError
from fastft.graph.compile import compile as compile_layers
from fastft.graph.compile import report
from fastft.state import get_state
from fastft.train import memory
from fastft.train.sft.config import SFTConfig
from fastft.train.sft.trainer import SFTTrainer


class RunsOut(TrainerCallback):
    """Fails as the allocator does, before one step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")


def trainer(build_model, tokenizer, dataset, settings, **changes):
    model = compile_layers(build_model(), backend="eager")
    args = SFTConfig(**{**settings, "max_steps": 4, **changes})
    return SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer)


def test_the_record_holds_the_prediction(build_model, tokenizer, dataset, settings):
    made = trainer(build_model, tokenizer, dataset, settings, max_steps=1)
    made.train()
    found = json.loads((Path(settings["output_dir"]) / "run.json").read_text())["memory"]
    planned = get_state(made.model).compiled.planned
    assert found["predicted_bytes"] == planned.predicted().peak == sum(found["predicted_parts"].values())
    assert found["predicted_for"] == {"rows": planned.largest[0], "length": planned.largest[1]}
    assert found["plan"] == "auto" and found["layers"].endswith("keep") and found["measured_peak_bytes"] > 0
    assert memory.predicted(build_model()) == {"predicted_bytes": None}


def test_the_record_tells_of_dequantised_weights_which_go_with_the_run(build_model, tokenizer, dataset, settings):
    model = with_lora(in_nf4(build_model(lora=False, hidden_size=64)), torch.float32)
    made = SFTTrainer(
        compile_layers(model, plan="fast", backend="eager"),
        SFTConfig(**{**settings, "max_steps": 2}),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    weights = get_state(made.model).compiled.planned.weights
    made.train()
    found = json.loads((Path(settings["output_dir"]) / "run.json").read_text())["memory"]
    assert found["plan"] == "fast" and found["layers"] == "2 layers keep, weights dequantised"
    assert found["predicted_parts"]["weights dequantised"] == 2 * 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 64)
    assert weights.bytes == 0 and weights.changes == 2 * 7 + 1  # made once each, and let go of together


def test_out_of_memory_saves_the_last_step_and_tells_what_would_help(build_model, tokenizer, dataset, settings):
    whole = trainer(build_model, tokenizer, dataset, settings)
    whole.train()
    losses = [row["loss"] for row in whole.state.log_history if "loss" in row]
    folder = Path(settings["output_dir"]) / "second"
    made = trainer(build_model, tokenizer, dataset, settings, output_dir=str(folder), save_strategy="no")
    made.add_callback(RunsOut(2))
    with pytest.raises(OutOfMemoryError) as caught:
        made.train()
    text = str(caught.value)
    for part in (
        "CUDA out of memory. Tried to allocate 2.00 GiB.",
        "weights",
        "peak",
        'plan="min": saves',
        "checkpoint-2",
    ):
        assert part in text
    assert "more" not in text.splitlines()[0] and isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    run = json.loads((folder / "run.json").read_text())
    assert run["status"] == "failed" and "out of memory" in run["error"]
    again = trainer(build_model, tokenizer, dataset, settings, output_dir=str(folder), save_strategy="no")
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert [row["loss"] for row in again.state.log_history if "loss" in row] == losses


def test_what_is_rescued_is_of_this_run_where_an_earlier_one_left_a_checkpoint_of_that_step(
    build_model, tokenizer, dataset, settings
):
    folder = Path(settings["output_dir"])
    (folder / "checkpoint-2").mkdir(parents=True)
    (folder / "checkpoint-2" / "of_another_run").write_text("")
    (folder / "checkpoint-9").mkdir()
    made = trainer(build_model, tokenizer, dataset, settings, save_strategy="no")
    made.add_callback(RunsOut(2))
    with pytest.raises(OutOfMemoryError) as caught:
        made.train()
    kept = folder / "checkpoint-2"
    assert f"is saved in {kept}; resume={str(kept)!r} goes on from it" in str(caught.value)
    assert (kept / "trainer_state.json").is_file() and not (kept / "of_another_run").exists()


def test_out_of_memory_before_the_first_step(build_model, tokenizer, dataset, settings):
    made = trainer(build_model, tokenizer, dataset, settings)
    made.add_callback(RunsOut(0))
    with pytest.raises(OutOfMemoryError, match="No step had been completed"):
        made.train()
    assert not list(Path(settings["output_dir"]).glob("checkpoint-*"))


def test_largest_batch():
    rows = Dataset.from_dict({"input_ids": [[1] * 5, [1] * 9, [1] * 2]})
    args = SimpleNamespace(per_device_train_batch_size=4, max_length=8, packing=False)
    assert memory.largest_batch(args, rows) == (4, 8)
    args.max_length = None
    assert memory.largest_batch(args, rows) == (4, 9)
    args.packing = True
    assert memory.largest_batch(args, rows) is None
    args.max_length = 16
    assert memory.largest_batch(args, rows) == (4, 16)
    args.packing = False
    assert memory.largest_batch(args, iter(())) is None


def test_a_plan_that_cannot_be_met_is_a_line_of_ours_and_a_note(
    build_model, tokenizer, dataset, settings, capsys, recwarn
):
    model = compile_layers(build_model(), plan="20MB", backend="eager")
    args = SFTConfig(**{**settings, "max_steps": 2})
    made = SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer)
    made.train()
    out, planned = capsys.readouterr().out, get_state(model).compiled.planned
    assert not [one for one in recwarn if "memory plan" in str(one.message)]
    said = [line for line in out.splitlines() if "memory plan '20MB': a step of" in line]
    record = json.loads((Path(settings["output_dir"]) / "run.json").read_text())
    rows, length = planned.largest
    assert record["notes"] == [planned.unmet]
    assert planned.unmet.startswith(f"memory plan '20MB': a step of {rows} x {length} tokens is predicted to take at ")
    assert said[0].startswith("fastft: memory plan '20MB': a step of 2 x ") and len(said) <= 2
    assert any(planned.unmet in line for line in said)  # the largest batch is told of, at the end if it came later
    assert planned.unmet in str(report(model)).splitlines() and planned.unmet in record["rewrites"]["notes"]
    with pytest.warns(UserWarning, match="memory plan '20MB': a step of 9 x 99 tokens"):  # in a loop of the user's own
        planned.see(9, 99, torch.device("cpu"))


def test_a_plan_that_is_met_is_not_told_of(build_model, tokenizer, dataset, settings, capsys):
    trainer(build_model, tokenizer, dataset, settings, max_steps=1).train()
    record = json.loads((Path(settings["output_dir"]) / "run.json").read_text())
    assert record["notes"] == record["rewrites"]["notes"] == [] and "memory plan" not in capsys.readouterr().out


def test_a_second_run_on_a_model_tells_of_its_own_batches(build_model, tokenizer, dataset, settings, capsys):
    """Of which the smaller ones fit into the budget; the first run's did not."""
    where = torch.device("cpu")
    asked = get_state(compile_layers(build_model(), plan="20MB", backend="eager")).compiled.planned
    large, small = (asked.foreseen("loss", None, (rows, 23), where).estimate.peak for rows in (8, 1))
    budget, said = (large + small) // 2, []
    model = compile_layers(build_model(), plan=budget, backend="eager")
    trainers = [
        SFTTrainer(
            model,
            SFTConfig(**{**settings, "max_steps": 1, "per_device_train_batch_size": rows}),
            train_dataset=dataset,
            processing_class=tokenizer,
        )
        for rows in (8, 1)
    ]
    for rows, trainer in zip((8, 1, 8), (*trainers, trainers[0]), strict=True):
        trainer.train()
        record = json.loads((Path(settings["output_dir"]) / "run.json").read_text())
        step = f"memory plan {budget!r}: a step of 8 x 23 tokens is predicted to take at least "
        assert record["memory"]["predicted_for"] == {"rows": rows, "length": 23}
        for notes in (record["notes"], record["rewrites"]["notes"]):
            assert [note[: len(step)] for note in notes] == [step] * (rows == 8)
        said.append(step in capsys.readouterr().out)
    assert said == [True, False, False]  # a trainer says it once
