"""fastft: the compiled model and its own loss, under the memory plan that the arm names."""

from typing import Any

import fastft
from benchmarks.arms import Trainee
from benchmarks.cells import Task
from benchmarks.weights import build
from fastft.train import step


def prepare(task: Task, options: tuple[str, ...], device: str) -> Trainee:
    """Return the compiled model. Raises fastft's UsageError for a plan that it does not know."""
    plan = options[0]
    model = fastft.compile(build(task.cell, device), plan=int(plan) if plan.isdigit() else plan, backend=task.backend)

    def facts() -> dict[str, Any]:
        report = fastft.report(model)
        return {
            "plan": str(report.plan),
            "applied": report.applied(),
            "refused": [f"{rewrite.rule} {rewrite.module}: {rewrite.reason}" for rewrite in report.refused()],
            "attention": report.attention,
            "head": report.head,
            "notes": list(report.notes),
        }

    return Trainee(model, lambda batch: step.loss(model, batch), facts)
