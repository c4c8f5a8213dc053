"""What a checkpoint keeps of the rollouts of a GRPO run: a file for each process."""

from pathlib import Path
from typing import Any

import torch

from fastft.errors import Problem, UsageError


def file_of(folder: Path, process: int) -> Path:
    """Return the file in a checkpoint's folder with the rollouts of a process."""
    return folder / f"rollouts-{process}.pt"


def load(path: Path) -> dict[str, Any]:
    """Return what such a file holds. Raises `UsageError` for one that cannot be read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive fails in whatever place of torch's reader the damage is
        raise UsageError(
            Problem(
                str(path),
                f"a damaged file of {path.stat().st_size:,} bytes ({type(error).__name__})",
                "the completions and the order of the prompts of a GRPO run, as they were saved",
                "Resume from another checkpoint of the run, or start anew with resume=False.",
            )
        ) from error


def of_process(folder: Path, process: int) -> dict[str, Any] | None:
    """Return what a checkpoint keeps for a process, None without any; where no completions wait any file is the same.

    Raises `UsageError` for a file that cannot be read.
    """
    own, others = file_of(folder, process), sorted(folder.glob("rollouts-*.pt"))
    path = own if own.is_file() else others[0] if others else None
    return None if path is None else load(path)


def damages(folder: Path) -> list[Problem | str]:
    """Return a problem for every file of a checkpoint's rollouts that cannot be read, whichever process it is of."""
    problems: list[Problem | str] = []
    for path in sorted(folder.glob("rollouts-*.pt")):
        try:
            load(path)
        except UsageError as error:
            problems += error.problems
    return problems
