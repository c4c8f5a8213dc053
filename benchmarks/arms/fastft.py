"""fastft: the compiled model and its own loss, replayed as its trainers do, under the plan that the arm names."""

from collections.abc import Mapping
from typing import Any

import torch

import fastft
from benchmarks.arms import Trainee
from benchmarks.cells import Task
from benchmarks.weights import build
from fastft.memory.estimate import COMPUTE
from fastft.state import get_state
from fastft.train import step
from fastft.train.cuda_graphs import MODES, Replayer


def prepare(task: Task, options: tuple[str, ...], device: str) -> Trainee:
    """Return the compiled model. Raises fastft's UsageError for a plan that it does not know.

    `options`: the plan, and what else is chosen by its name: one of `COMPUTE`, one of `MODES` of CUDA graphs.
    """
    plan, compute = options[0], next((option for option in options[1:] if option in COMPUTE), "exact")
    model = fastft.compile(
        build(task.cell, device), plan=int(plan) if plan.isdigit() else plan, backend=task.backend, compute=compute
    )

    mode = next((option for option in options[1:] if option in MODES), "auto")
    replayer = Replayer(model, lambda batch, items: step.loss(model, batch, items), mode)

    def loss(batch: Mapping[str, Any]) -> Any:
        return replayer(batch, step.shifted_labels(batch).ne(step.IGNORE).sum())

    def facts() -> dict[str, Any]:
        report, planned = fastft.report(model), get_state(model).compiled.planned
        predicted = planned.predicted() if planned else None
        measured = torch.cuda.max_memory_allocated() if device == "cuda" else None
        return {
            "plan": str(report.plan),
            "compute": report.compute,
            "not_in_fp8": [f"{rewrite.module}: {rewrite.not_fp8}" for rewrite in report.not_in_fp8()],
            "kept": report.modes,
            "predicted_peak_gb": round(predicted.peak / 1e9, 3) if predicted else None,
            "measured_peak_gb": round(measured / 1e9, 3) if measured else None,
            "predicted_over_measured": round(predicted.peak / measured, 4) if predicted and measured else None,
            "predicted_step_ms": round(predicted.seconds * 1e3, 2) if predicted and predicted.seconds else None,
            "applied": report.applied(),
            "refused": [f"{rewrite.rule} {rewrite.module}: {rewrite.reason}" for rewrite in report.refused()],
            "cuda_graphs": replayer.told(),
            "attention": report.attention,
            "head": report.head,
            "notes": list(report.notes),
        }

    return Trainee(model, loss, facts)
