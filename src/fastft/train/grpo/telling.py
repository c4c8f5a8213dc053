"""What a run with rewards says on the terminal: one readable line of a step, where all its metrics would be thirty."""

import math
from collections.abc import Mapping
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer


def step_line(step: int, logs: Mapping[str, Any]) -> str:
    """Return one line of a step's metrics: reward, KL to the reference where there is one, lengths, the engine."""
    parts = [f"step {step:4d}  reward {_number(logs['reward'])}"]
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
    return "  ".join(parts)


def _number(value: float | None) -> str:
    """Return a mean reward in words: it is None or NaN where no completion was given a number."""
    return "missing" if value is None or math.isnan(value) else f"{value:.3f}"


class StepProgress(ProgressCallback):
    """transformers' bar, with short lines of steps beside it."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write a line of a step; other logs as transformers does."""
        if "reward" not in logs:
            super().on_log(args, state, control, logs, **kwargs)
        elif state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.write(step_line(state.global_step, logs))


class StepPrinter(PrinterCallback):
    """transformers' printing, with short lines of steps."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print a line of a step; other logs as transformers does."""
        if "reward" not in logs:
            super().on_log(args, state, control, logs, **kwargs)
        elif state.is_local_process_zero:
            print(step_line(state.global_step, logs), flush=True)


def shorten(trainer: Trainer) -> None:
    """Let a trainer say short lines; a callback of the user's own is left as it is."""
    for plain, short in ((ProgressCallback, StepProgress), (PrinterCallback, StepPrinter)):
        for callback in list(trainer.callback_handler.callbacks):
            if type(callback) is plain:
                trainer.remove_callback(callback)
                trainer.add_callback(short())
