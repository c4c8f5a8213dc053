"""The last step of a run has a line in the log, whatever `logging_steps` says.

Of one that turns out to be the last behind its evaluation or its checkpoint, `late_log` has it logged.
"""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class LastStep(TrainerCallback):
    """Has the step logged behind which training stops, unless nothing is to be logged.

    `interrupted` says whether the run is to end with the step that is running.
    """

    def __init__(self, interrupted: Callable[[], bool]) -> None:
        self.interrupted = interrupted

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have the step logged if it is known by now to be the last."""
        if control.should_training_stop or state.global_step >= state.max_steps or self.interrupted():
            control.should_log |= args.logging_strategy != "no"
