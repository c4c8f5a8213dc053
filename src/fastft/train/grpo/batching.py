"""The settings that make a GRPO run's batches: a checkpoint goes on with others only where no completions wait."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import evolve

from fastft.errors import Problem

NAMES = (
    "num_generations",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "num_iterations",
    "world_size",
)


def batching(args: Any) -> dict[str, int]:
    """Return what a checkpoint says of the batches that it was made with."""
    return {name: getattr(args, name) for name in NAMES}


def changed(kept: Mapping[str, Any], now: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Return the settings that are not what they were as (there, now); `kept` is what a checkpoint keeps of rollouts.

    `now`: as asked for, before micro-batches are merged: that changes with the memory at hand, and no update. A
    checkpoint of an earlier version may not say some of them.
    """
    earlier = kept.get("batching") or {}
    return {name: (value, now[name]) for name, value in earlier.items() if value != now[name]}


def told(kept: Mapping[str, Any], now: Mapping[str, int], folder: Path) -> str | None:
    """Return the line that says of a checkpoint in `folder`, where no completions wait, that batches are others."""
    names = [f"{name} is {now} (there {there})" for name, (there, now) in changed(kept, now).items()]
    if not names or kept["inputs"] is not None:
        return None
    return f"other batches than in {folder}: {', '.join(names)}; the place in the prompts is counted in the new ones."


def problems(
    kept: Mapping[str, Any], now: Mapping[str, int], folder: Path, missing: Sequence[Path] = ()
) -> list[Problem]:
    """Return why the completions that wait in a checkpoint cannot be learnt from; none where none wait.

    `missing`: the files of the present processes' rollouts that `folder` does not have.
    """
    if kept["inputs"] is None:
        return []
    other = changed(kept, now)
    found = [Problem(f"GRPOConfig {name}", now, f"{there}, as it was") for name, (there, now) in other.items()]
    if missing and not found:
        found = [Problem(f"{missing[0]}", None, "a file with the completions of that process")]
    if not found:
        return []
    again = "resume with them, " if other else ""
    remedy = (
        f"Completions wait in {folder} that were made for its batches; {again}resume from a checkpoint between two "
        "generations, or start anew with resume=False."
    )
    return [*found[:-1], evolve(found[-1], remedy=remedy)]
