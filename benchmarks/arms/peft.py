"""transformers and PEFT as they are: eager, with gradient checkpointing, torch.compile, and Liger's kernels."""

from collections.abc import Mapping
from typing import Any

from benchmarks.arms import Trainee
from benchmarks.cells import Task
from benchmarks.weights import build


def prepare(task: Task, options: tuple[str, ...], device: str) -> Trainee:
    """Return the model with what `options` names: "liger", "checkpoint", "compile"."""
    model = build(task.cell, device, before_adapter=_liger if "liger" in options else None)
    if "checkpoint" in options:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if task.cell.mode != "full":
            model.enable_input_require_grads()
    if "compile" in options:
        model.compile(backend=task.backend)

    def loss(batch: Mapping[str, Any]) -> Any:
        return model(**batch, use_cache=False).loss

    return Trainee(model, loss)


def _liger(model: Any) -> None:
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=model)
