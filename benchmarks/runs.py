"""What a step of `fastft.sft` takes, data, clipping and log included, where `scripts/bench` times bare steps.

python -m benchmarks.runs --shape llama-1b --plan keep+8bit --log-every 1
"""

import argparse
import json
import tempfile
import time
from typing import Any

import datasets
import torch
from transformers import AutoTokenizer, TrainerCallback

import fastft
from benchmarks.batches import batch_of
from benchmarks.cells import Cell
from benchmarks.machine import device
from benchmarks.weights import build
from fastft.demo import MODEL_FOLDER


class Timed(TrainerCallback):
    """Takes the time from the beginning of step `first` to the end of the last, with the device done at both."""

    def __init__(self, first: int) -> None:
        self.first, self.began, self.seconds = first, 0.0, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin at the first timed step."""
        if state.global_step == self.first:
            _wait()
            self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End at the last step."""
        if state.global_step == state.max_steps:
            _wait()
            self.seconds = time.perf_counter() - self.began


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measured(cell: Cell, plan: str, steps: int, log_every: int, cuda_graphs: str, backend: str) -> dict[str, Any]:
    """Train `2 * steps` steps of random rows, and return the mean milliseconds of the later half, and the last loss."""
    where = "cuda" if torch.cuda.is_available() else "cpu"
    model = fastft.compile(build(cell, where), plan=plan, backend=backend)
    batches = [batch_of(cell, index, "cpu")["input_ids"] for index in range(2 * steps)]
    rows = datasets.Dataset.from_dict({name: torch.cat(batches).numpy() for name in ("input_ids", "labels")})
    tokenizer, timed = AutoTokenizer.from_pretrained(MODEL_FOLDER), Timed(steps)
    with tempfile.TemporaryDirectory() as folder:
        result = fastft.sft(
            model,
            tokenizer,
            rows,
            output_dir=folder,
            batch_size=cell.batch,
            accumulate=1,
            learning_rate=1e-4,
            log_every=log_every,
            max_length=cell.length,
            callbacks=[timed],
            save_strategy="no",
            refuse_untrained_stop=False,
            cuda_graphs=cuda_graphs,
        )
    return {
        "step_ms": round(timed.seconds / steps * 1e3, 2),
        "last_loss": result.final_loss,
        "cuda_graphs": result.record.get("cuda_graphs"),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3) if where == "cuda" else None,
    }


def main() -> None:
    """Measure one run and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("shape", "llama-1b"), ("mode", "nf4"), ("plan", "keep"), ("cuda-graphs", "auto")):
        parser.add_argument(f"--{name}", default=default)
    for name, default in (("batch", 4), ("length", 2048), ("layers", 0), ("steps", 20), ("log-every", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    given = parser.parse_args()
    cell = Cell(given.shape, given.mode, given.batch, given.length, layers=given.layers)
    facts = {"cell": cell.name, "plan": given.plan, "log_every": given.log_every, "steps": given.steps}
    made = measured(cell, given.plan, given.steps, given.log_every, given.cuda_graphs, given.backend)
    print(json.dumps({**facts, **made, "device": device()["name"]}))


if __name__ == "__main__":
    main()
