"""The last step of a run has a line in the log, whatever `logging_steps` says, and however the run comes to its end."""

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

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have the step logged behind which an evaluation stopped the run; one that has a line gets no second."""
        if control.should_training_stop:
            control.should_log |= args.logging_strategy != "no"
