"""What a run with rewards says on the terminal: one readable line of a step, where all its metrics would be thirty."""

import math
from collections.abc import Mapping
from typing import Any

from fastft.train.telling import log_line


def line(step: int, logs: Mapping[str, Any]) -> str:
    """Return the line of a log: a short one where it is of a step or an evaluation."""
    if "eval_reward" in logs:
        return step_line(step, {name.removeprefix("eval_"): value for name, value in logs.items()}, "evaluation: ")
    if "reward" in logs:
        return step_line(step, logs)
    return update_line(step, logs) if "grad_norm" in logs else log_line(step, logs)


def update_line(step: int, logs: Mapping[str, Any]) -> str:
    """Return one line of an update from completions that an earlier step has sampled."""
    parts = [f"step {step:4d}  from the same completions"]
    if "kl" in logs:
        parts.append(f"KL {logs['kl']:.4f}")
    if "clip_ratio/region_mean" in logs:
        parts.append(f"clipped {logs['clip_ratio/region_mean']:.1%}")
    parts.append(f"gradient {logs['grad_norm']:.3g}")
    return "  ".join(parts)


def step_line(step: int, logs: Mapping[str, Any], of: str = "") -> str:
    """Return one line of a step's metrics: reward, KL to the reference where there is one, lengths, the engine.

    `of` stands before them.
    """
    parts = [f"step {step:4d}  {of}reward {_number(logs['reward'])}"]
    names = [name for name in logs if name.startswith("rewards/") and name.endswith("/mean")]
    if len(names) > 1:
        parts.append("(" + ", ".join(f"{name.split('/')[1]} {_number(logs[name])}" for name in names) + ")")
    if "kl" in logs:
        parts.append(f"KL {logs['kl']:.4f}")
    parts.append(f"length {logs['completions/mean_length']:.1f}")
    if logs.get("completions/clipped_ratio"):
        parts.append(f"cut off {logs['completions/clipped_ratio']:.0%}")
    if "logprob_difference/mean" in logs:
        parts.append(f"engine off by {logs['logprob_difference/mean']:.2g} nats")
    if logs.get("frac_reward_zero_std") == 1.0:
        parts.append("nothing to learn: every prompt's completions earn alike")
    elif logs.get("grad_norm") == 0.0:
        parts.append("nothing was learnt: no prompt has two completions with rewards that differ")
    return "  ".join(parts)


def _number(value: float | None) -> str:
    """Return a mean reward in words: it is None or NaN where no completion was given a number."""
    return "missing" if value is None or math.isnan(value) else f"{value:.3f}"
