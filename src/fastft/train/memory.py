"""Memory in training: the largest batch to plan for, what the run's record says, and what an out-of-memory becomes."""

import traceback
from typing import Any

import torch

from fastft.data import columns
from fastft.errors import OutOfMemoryError, UsageError
from fastft.graph.compile import release_weights
from fastft.memory import oom
from fastft.memory.plan import named_modes, usable
from fastft.state import planned_of


def largest_batch(args: Any, dataset: Any) -> tuple[int, int] | None:
    """Return (rows, length) of the largest micro-batch of a run, None where that is not known before it."""
    rows, limit = args.per_device_train_batch_size, args.max_length
    if args.packing:
        return (rows, limit) if limit else None
    if not hasattr(dataset, "__len__") or "input_ids" not in (getattr(dataset, "column_names", None) or ()):
        return None
    longest = int(columns.lengths(dataset).max(initial=0))
    return (rows, min(longest, limit) if limit else longest) if longest else None


def predicted(model: Any) -> dict[str, Any]:
    """Return the predicted peak of a compiled model's largest step, as the run's record holds it."""
    planned = planned_of(model)
    made = planned.predicted() if planned is not None else None
    if made is None:
        return {"predicted_bytes": None}
    rows, length = planned.largest
    return {
        "predicted_bytes": made.peak,
        "predicted_parts": {part.name: part.bytes for part in made.parts},
        "predicted_for": {"rows": rows, "length": length},
        "plan": planned.plan,
        "layers": planned.described(),
    }


def notes(model: Any) -> list[str]:
    """Return a note where the memory plan of a compiled model cannot be met."""
    planned = planned_of(model)
    return [planned.unmet] if planned is not None and planned.unmet else []


def let_go(error: BaseException, model: Any) -> None:
    """Free what a step that failed held: tensors in the frames of `error`, gradients, and copies of weights."""
    traceback.clear_frames(error.__traceback__)
    release_weights(model)
    model.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def out_of_memory(error: BaseException, model: Any, kept: str) -> OutOfMemoryError:
    """Return the error that takes the allocator's place: what used the memory, the remedies, what of the work is kept.

    `kept` is the sentence that says the last.
    """
    setup, modes = _setup(model)
    budget, in_use = None, 0
    if torch.cuda.is_available():
        budget, in_use = usable(torch.cuda.mem_get_info()[1]), torch.cuda.max_memory_allocated()
    return OutOfMemoryError(oom.message(str(error), setup, modes, budget, in_use, kept))


def _setup(model: Any) -> tuple[Any, Any]:
    from fastft.graph.head import find_spec
    from fastft.memory.measure import setup_of_model
    from fastft.state import base_model

    planned = planned_of(model)
    if planned is not None and planned.setup is not None:
        return planned.setup, planned.modes
    spec = find_spec(base_model(model))
    try:
        setup = setup_of_model(model, spec) if spec is not None else None
    except UsageError:
        setup = None
    return setup, named_modes("keep", setup.shape.layers if setup else 1)
