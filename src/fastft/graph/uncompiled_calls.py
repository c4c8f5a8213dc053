"""Calls that were to be compiled and could not be: they run as they are, with a warning, and are counted."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

NOT_AS_PLANNED = (
    "{} of {} layers ran uncompiled in training: for the backward they keep what transformers' own layers keep, mostly "
    "more than the memory plan says and predicts"
)

# (what was called, why it ran uncompiled) -> how often
Counts = dict[tuple[str, str], int]


def run_uncompiled(
    counts: Counts, module: nn.Module, what: str, why: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Call `module` as it is, count that in `counts` and warn the first time. `what`: the module in words."""
    if (what, why) not in counts:
        warnings.warn(f"{what} runs uncompiled: {why}", stacklevel=4)
    counts[what, why] = counts.get((what, why), 0) + 1
    return module._call_impl(*args, **kwargs)


def notes(counts: Counts, layers: Collection[int], of: int) -> list[str]:
    """Return what the report says of them; `layers`: which of how many ran so and kept something for a backward."""
    told = [f"{count} training calls of {what} ran uncompiled: {why}" for (what, why), count in counts.items()]
    return told + ([NOT_AS_PLANNED.format(len(layers), of)] if layers else [])


def reason(error: Exception) -> str:
    """Return why Dynamo gave a call up, in one line."""
    if isinstance(error, torch._dynamo.exc.FailOnRecompileLimitHit):
        limit = torch._dynamo.config.recompile_limit
        return (
            f"its calls differ in more ways than the {limit} captures that Dynamo keeps of one structure "
            "(torch._dynamo.config.recompile_limit), each length is one where dynamic=False"
        )
    return f"Dynamo cannot trace it: {cause(error)}"


def cause(error: Exception) -> str:
    """Return what Dynamo stumbled on, in one line: its explanation, and the innermost line of the user's code."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = next((line for line in lines if line.startswith("Explanation:")), lines[0])
    files = [line for line in lines if line.startswith("File ")]
    return f"{told.removeprefix('Explanation:').strip()} ({files[-1]})" if files else told
