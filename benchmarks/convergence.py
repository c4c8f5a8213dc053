"""Does an arm that is not exact learn as an exact one does? Both learn the same text by heart, step by step.

python -m benchmarks.convergence --arms fastft,fastft-fp8,fastft-fp8-head --shape llama-8b --mode nf4

The text is learnable, unlike the random tokens that speeds are measured on: `WORDS` words, of which each has one that
follows it, in a circle; rows begin anywhere in it. Weights are random and the same in every arm; adapters are LoRA with
random A and B. The first arm is the exact one. One JSON line for each arm (its losses), and one for each other arm's
verdict; exit status 1 if one of them is no.
"""

import argparse
import gc
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.arms import find_arm
from benchmarks.cells import Cell, Task
from benchmarks.shapes import shape_of
from benchmarks.stepping import optimizer_of, step

WORDS = 256
# Largest distance of two losses, as a share of the first loss: at any step, and in the mean over all steps; and the
# share of its first loss that the exact arm must get below, or the comparison says nothing.
FARTHEST = 0.05
MEAN = 0.02
LEARNT = 0.5


def text_of(cell: Cell, index: int, device: str) -> dict[str, Tensor]:
    """Return batch number `index` of the text, `input_ids` and `labels` int64 [B, T]."""
    words = torch.Generator().manual_seed(cell.seed)
    names = torch.randperm(shape_of(cell.shape).vocabulary, generator=words)[:WORDS]
    starts = torch.Generator().manual_seed(cell.seed * 100_003 + index + 1)
    first = torch.randint(0, WORDS, (cell.batch, 1), generator=starts)
    ids = names[(first + torch.arange(cell.length)) % WORDS].to(device)
    return {"input_ids": ids, "labels": ids}


def losses_of(name: str, task: Task, steps: int, rate: float, device: str) -> list[float]:
    """Return the loss of every step of the arm, before that step's update."""
    arm = find_arm(name)
    trainee = importlib.import_module(arm.module).prepare(task, arm.options, device)
    optimizer, losses = optimizer_of(trainee, rate, device), []
    for index in range(steps):
        loss = step(trainee, optimizer, text_of(task.cell, index, device), device)
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        del loss
    return losses


def verdict(exact: Sequence[float], losses: Sequence[float]) -> dict[str, Any]:
    """Return how far two curves of losses are apart, as shares of the first exact loss, and if that is near enough.

    `ok` is False also where the exact curve has not fallen below `LEARNT`, or a loss is no number.
    """
    apart = [abs(one - other) / exact[0] for one, other in zip(exact, losses, strict=True)]
    told = {"farthest": max(apart), "mean": sum(apart) / len(apart), "learnt_to": min(exact) / exact[0]}
    ok = told["farthest"] <= FARTHEST and told["mean"] <= MEAN and told["learnt_to"] <= LEARNT
    return {"ok": bool(ok and all(one == one for one in losses)), **{key: round(n, 6) for key, n in told.items()}}


def compare(arms: Sequence[str], cell: Cell, backend: str, steps: int, rate: float, device: str) -> Mapping[str, Any]:
    """Train every arm and print a line for each; return the verdicts of all but the first."""
    curves: dict[str, list[float]] = {}
    for name in arms:
        curves[name] = losses_of(name, Task(name, cell, backend=backend), steps, rate, device)
        torch._dynamo.reset()
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        told = [round(loss, 5) for loss in curves[name]]
        print(json.dumps({"arm": name, "cell": cell.name, "rate": rate, "losses": told}), flush=True)
    return {name: verdict(curves[arms[0]], curves[name]) for name in arms[1:]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the arms' curves; 1 if one is too far from the first."""
    parser = argparse.ArgumentParser("convergence", description=__doc__.splitlines()[0])
    parser.add_argument("--arms", default="fastft,fastft-fp8,fastft-fp8-head")
    for name, default in (("shape", "llama-8b"), ("mode", "nf4"), ("backend", "inductor")):
        parser.add_argument(f"--{name}", default=default)
    for name, default in (("batch", 2), ("length", 1024), ("layers", 0), ("steps", 80)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rate", type=float, default=5e-4, help="of AdamW")
    parser.add_argument("--head-scale", type=float, default=1.0, help="a narrow shape's head wants more to be peaked")
    given = parser.parse_args(arguments)
    scale = given.head_scale
    cell = Cell(given.shape, given.mode, given.batch, given.length, layers=given.layers, head_scale=scale)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = compare(given.arms.split(","), cell, given.backend, given.steps, given.rate, device)
    for name, told in found.items():
        print(json.dumps({"verdict": name, **told}), flush=True)
    return int(not all(told["ok"] for told in found.values()))


if __name__ == "__main__":
    sys.exit(main())
