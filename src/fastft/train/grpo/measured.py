"""The metrics that an evaluation of GRPO gives, known before it is run: by which of them weights may be chosen."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from fastft.rewards.guarding import Guarded
from fastft.rewards.traits import is_module, name_of, parts_of, unwrapped
from fastft.rollout.base import Engine
from fastft.train.best import Measured
from fastft.train.grpo.config import GRPOConfig

LENGTHS = ("mean_length", "min_length", "max_length", "clipped_ratio", "mean_terminated_length")
LENGTHS += ("min_terminated_length", "max_terminated_length")
DIFFERENCES = ("mean", "max", "kl")
CORRECTION = ("sampling_logp_difference/mean", "sampling_logp_difference/max")
CORRECTION += ("importance_sampling_ratio/min", "importance_sampling_ratio/mean", "importance_sampling_ratio/max")
RATIOS = ("low_mean", "low_min", "high_mean", "high_max", "region_mean")
# Losses whose clipping has other metrics than the ratios.
CLIPPED = {"cispo": ("cispo_clip_ratio",), "vespo": ("vespo/phi_seq_mean",), "sapo": ()}


def measured(
    args: GRPOConfig, functions: Sequence[Any], kwargs: Mapping[str, Any], engine: str | Engine | None = None
) -> Measured | None:
    """Return what an evaluation gives; None where it is not known, as of a reward that logs metrics of its own.

    `functions` are the rewards, `engine` and `kwargs` the trainer's other arguments. Whether an engine gives
    log-probabilities shows when it samples: what is measured by them is among the metrics of every engine.
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
    names += [f"sampling/{kind}" for kind in CORRECTION] if _may_correct(args, engine) else []
    names += ["policy_loss"] if args.entropy_coef or args.use_adaptive_entropy else []
    names += [f"tools/{kind}_frequency" for kind in ("call", "failure")] if kwargs.get("tools") else []
    remedy = "What a reward logs itself is known where it names log_metric among its arguments."
    return Measured(("loss",), tuple(names), remedy)


def _may_correct(args: GRPOConfig, engine: str | Engine | None) -> bool:
    """Say whether TRL may correct the loss for what the engine samples by; "transformers" samples by the weights."""
    name = engine.name if isinstance(engine, Engine) else engine or args.engine
    return bool(args.vllm_importance_sampling_correction) and name != "transformers"


def _logs(function: Any) -> bool:
    """Say whether a reward, or one that it is a sum of, takes what logs metrics of its own, by its name."""
    inner = unwrapped(function)
    if isinstance(inner, Guarded):  # which takes all names, for the reward in it
        return _logs(inner.function)
    if is_module(inner):
        return False
    if any(map(_logs, parts_of(inner))):
        return True
    try:
        return "log_metric" in inspect.signature(inner).parameters
    except (TypeError, ValueError):  # no function, or one that does not tell
        return False


def _name(function: Any) -> str:
    """Return what logs call a reward: a model by the end of its name."""
    if isinstance(function, str):
        return function.split("/")[-1]
    if is_module(function):
        return str(getattr(function.config, "_name_or_path", "")).split("/")[-1]
    return name_of(function)
