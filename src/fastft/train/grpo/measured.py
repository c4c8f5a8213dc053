"""The metrics that an evaluation of GRPO gives, known before it is run: by which of them weights may be chosen."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from fastft.rewards.guarding import is_module, name_of
from fastft.train.best import Measured
from fastft.train.grpo.config import GRPOConfig

LENGTHS = ("mean_length", "min_length", "max_length", "clipped_ratio", "mean_terminated_length")
LENGTHS += ("min_terminated_length", "max_terminated_length")
DIFFERENCES = ("mean", "max", "kl")
RATIOS = ("low_mean", "low_min", "high_mean", "high_max", "region_mean")
# Losses whose clipping has other metrics than the ratios.
CLIPPED = {"cispo": ("cispo_clip_ratio",), "vespo": ("vespo/phi_seq_mean",), "sapo": ()}


def measured(args: GRPOConfig, functions: Sequence[Any], kwargs: Mapping[str, Any]) -> Measured | None:
    """Return what an evaluation gives; None where it is not known, as of a reward that logs metrics of its own.

    `functions` are the rewards, `kwargs` the trainer's other arguments.
    """
    environments = any(kwargs.get(name) is not None for name in ("environment_factory", "rollout_func"))
    if environments or any(map(_logs, functions)):
        return None
    names = ["reward", "reward_std", "frac_reward_zero_std", "entropy"]
    names += [f"rewards/{_name(function)}/{kind}" for function in functions for kind in ("mean", "std")]
    names += ["kl"] if args.beta else []
    names += CLIPPED.get(args.loss_type, tuple(f"clip_ratio/{kind}" for kind in RATIOS))
    names += [f"completions/{kind}" for kind in LENGTHS]
    names += [f"logprob_difference/{kind}" for kind in DIFFERENCES]
    names += [f"tools/{kind}_frequency" for kind in ("call", "failure")] if kwargs.get("tools") else []
    remedy = "What a reward logs itself is known where it names log_metric among its arguments."
    return Measured(("loss",), tuple(names), remedy)


def _logs(function: Any) -> bool:
    """Say whether a reward takes what logs metrics of its own, by its name."""
    try:
        return "log_metric" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # no function, or one that does not tell
        return False


def _name(function: Any) -> str:
    """Return what logs call a reward: a model by the end of its name."""
    if isinstance(function, str):
        return function.split("/")[-1]
    if is_module(function):
        return str(getattr(function.config, "_name_or_path", "")).split("/")[-1]
    return name_of(function)
