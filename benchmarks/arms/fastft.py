"""fastft: the compiled model and its own loss, under the memory plan that the arm names."""

from typing import Any

import torch

import fastft
from benchmarks.arms import Trainee
from benchmarks.cells import Task
from benchmarks.weights import build
from fastft.state import get_state
from fastft.train import step


def prepare(task: Task, options: tuple[str, ...], device: str) -> Trainee:
    """Return the compiled model. Raises fastft's UsageError for a plan that it does not know."""
    plan = options[0]
    model = fastft.compile(build(task.cell, device), plan=int(plan) if plan.isdigit() else plan, backend=task.backend)

    def facts() -> dict[str, Any]:
        report, planned = fastft.report(model), get_state(model).compiled.planned
        predicted = planned.predicted() if planned else None
        measured = torch.cuda.max_memory_allocated() if device == "cuda" else None
        return {
            "plan": str(report.plan),
            "kept": report.modes,
            "predicted_peak_gb": round(predicted.peak / 1e9, 3) if predicted else None,
            "measured_peak_gb": round(measured / 1e9, 3) if measured else None,
            "predicted_over_measured": round(predicted.peak / measured, 4) if predicted and measured else None,
            "predicted_step_ms": round(predicted.seconds * 1e3, 2) if predicted and predicted.seconds else None,
            "applied": report.applied(),
            "refused": [f"{rewrite.rule} {rewrite.module}: {rewrite.reason}" for rewrite in report.refused()],
            "attention": report.attention,
            "head": report.head,
            "notes": list(report.notes),
        }

    return Trainee(model, lambda batch: step.loss(model, batch), facts)
