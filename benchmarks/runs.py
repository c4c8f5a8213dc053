"""What a step of a whole run takes, in each tool's own trainer: data, clipping and log included.

python -m benchmarks.runs --arm fastft:keep+8bit --shape llama-1b --log-every 1
python -m benchmarks.runs --arm unsloth-none --shape llama-1b --log-every 1

`scripts/bench` times bare steps. Arms are named as there; those of fastft train by `fastft.sft`, all others by the
SFTTrainer of TRL (parts of which Unsloth replaces), on the same rows of random tokens. One JSON line.
"""

import argparse
import importlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from attrs import evolve

from benchmarks.arms import ARMS, find_arm
from benchmarks.cells import Cell, Task
from benchmarks.command import CHOICES, Run, model_folder
from benchmarks.machine import device, versions
from fastft.errors import Problem, did_you_mean

FASTFT = "benchmarks.arms.fastft"


def timed(first: int) -> Any:
    """Return a callback whose `seconds` are those from the end of step `first` to that of the last.

    At both the device is done.
    """
    import torch
    from transformers import TrainerCallback

    class Timed(TrainerCallback):
        seconds, began = 0.0, 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Begin before the first timed step, and end behind the last."""
            if state.global_step not in (first, state.max_steps):
                return
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            now = time.perf_counter()
            if state.global_step == first:
                self.began = now
            self.seconds = now - self.began

    return Timed()


def measured(task: Task, log_every: int) -> dict[str, Any]:
    """Train twice `task.steps` steps, and return the mean milliseconds of the later half, and the losses as logged."""
    arm, cell = find_arm(task.arm), task.cell
    prepare = importlib.import_module(arm.module).prepare  # first of all: some tools want to be imported first
    import torch

    where = "cuda" if torch.cuda.is_available() else "cpu"
    model = prepare(task, arm.options, where).model
    clock, settings = timed(task.steps), {
        "per_device_train_batch_size": cell.batch,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-4,
        "max_steps": 2 * task.steps,
        "logging_steps": log_every,
        "max_length": cell.length,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": where == "cuda",
        "use_cpu": where == "cpu",
        "seed": cell.seed,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        train = trained_by_fastft if arm.module == FASTFT else trained_by_trl
        made = train(model, rows_of(cell, 2 * task.steps), clock, {**settings, "output_dir": folder}, arm.options)
    peak = round(torch.cuda.max_memory_allocated() / 1e9, 3) if where == "cuda" else None
    return {"step_ms": round(clock.seconds / task.steps * 1e3, 2), **made, "peak_gb": peak}


def rows_of(cell: Cell, batches: int) -> Any:
    """Return a data set with the rows of the cell's first batches."""
    import datasets
    import torch

    from benchmarks.batches import batch_of

    ids = torch.cat([batch_of(cell, index, "cpu")["input_ids"] for index in range(batches)])
    return datasets.Dataset.from_dict({name: ids.numpy() for name in ("input_ids", "labels")})


def trained_by_fastft(model: Any, rows: Any, clock: Any, settings: dict[str, Any], options: Any) -> dict[str, Any]:
    """Train by `fastft.sft`."""
    import fastft
    from fastft.train.cuda_graphs import MODES

    graphs = next((option for option in options if option in MODES), "auto")
    config = fastft.SFTConfig(**settings, cuda_graphs=graphs, refuse_untrained_stop=False)
    result = fastft.sft(model, tokenizer(), rows, config=config, callbacks=[clock])
    return {"losses": [loss for _, loss in result.losses], "cuda_graphs": result.record.get("cuda_graphs")}


def trained_by_trl(model: Any, rows: Any, clock: Any, settings: dict[str, Any], options: Any) -> dict[str, Any]:
    """Train by TRL's SFTTrainer; checkpointing is the arm's own affair."""
    import trl

    config = trl.SFTConfig(
        **settings, gradient_checkpointing="checkpoint" in options, dataset_kwargs={"skip_prepare_dataset": True}
    )
    trainer = trl.SFTTrainer(
        model=model, args=config, train_dataset=rows, processing_class=tokenizer(), callbacks=[clock]
    )
    trainer.train()
    return {"losses": [row["loss"] for row in trainer.state.log_history if "loss" in row]}


def tokenizer() -> Any:
    """Return a tokenizer, which a trainer wants to have; the rows are token ids."""
    from transformers import AutoTokenizer

    from fastft.demo import MODEL_FOLDER

    return AutoTokenizer.from_pretrained(MODEL_FOLDER)


def with_folder(task: Task, work: Path) -> Task:
    """Return the task with the model's folder, written by a process of its own, where the arm loads from one."""
    if not find_arm(task.arm).loads:
        return task
    folder = model_folder(task, Run(task.steps, 0, 600.0, task.backend, work))
    if isinstance(folder, dict):
        raise SystemExit(f"benchmarks.runs: {folder['reason']}")
    return evolve(task, folder=str(folder))


def main() -> None:
    """Measure one run and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("arm", "fastft"), ("shape", "llama-1b"), ("mode", "nf4"), ("backend", "inductor")):
        parser.add_argument(f"--{name}", default=default)
    for name, default in (("batch", 4), ("length", 2048), ("layers", 0), ("steps", 20), ("log-every", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    if find_arm(given.arm) is None:
        parser.error(str(Problem("--arm", given.arm, f"of {CHOICES}", did_you_mean(given.arm, ARMS))))
    cell = Cell(given.shape, given.mode, given.batch, given.length, layers=given.layers)
    with tempfile.TemporaryDirectory() as work:
        task = with_folder(Task(given.arm, cell, given.steps, backend=given.backend), Path(work))
        made = measured(task, given.log_every)
    facts = {"arm": given.arm, "cell": cell.name, "log_every": given.log_every, "steps": given.steps}
    print(json.dumps({**facts, **made, "device": device()["name"], "versions": versions()}))


if __name__ == "__main__":
    main()
