"""Losses that are no numbers, counted in the log as transformers counts them, without waiting for the device.

transformers asks each micro-batch's loss whether it is one (`logging_nan_inf_filter`), and the host waits until the
device has gone through the whole step. Here the device decides, and how many there were is told with the next line.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback

from fastft.train.late_log import on_its_way


class FiniteLosses(TrainerCallback):
    """Stands in for `logging_nan_inf_filter` of `args` while a micro-batch's loss is added to the log's."""

    def __init__(self, args: Any, note: Callable[[list[str]], None] = lambda lines: None) -> None:
        self.args, self.note = args, note
        self.ours = False
        self._begin()

    def _begin(self) -> None:
        self.told, self.since = False, -1
        self.total: Tensor | None = None
        self.left_out: Tensor | None = None
        self.sent: Callable[[], Tensor] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget an earlier run of the trainer."""
        self._begin()
        self.note([])

    def filtered(self, loss: Tensor, global_step: int, last_logged: int) -> Tensor:
        """Return the loss to add to the log's sum: itself, or if it is no number the sum so far over the steps since.

        `global_step` counts the steps that are done, `last_logged` those that were when the last line was logged.
        """
        if not (self.ours or self.args.logging_nan_inf_filter):
            return loss
        self.ours, self.args.logging_nan_inf_filter = True, False  # until `restore`
        if self.total is None or self.since != last_logged:
            self.total, self.since = torch.zeros_like(loss), last_logged
        if self.left_out is None:
            self.left_out = torch.zeros_like(loss, dtype=torch.int64)
        finite = loss.isfinite()
        loss = torch.where(finite, loss, self.total / (1 + global_step - last_logged))
        self.total = self.total + loss
        self.left_out = self.left_out + ~finite
        return loss

    def send(self) -> None:
        """Begin to read how many there were, for the next line."""
        self.sent = None if self.told or self.left_out is None else on_its_way(self.left_out)

    def restore(self) -> None:
        """Give `args` back what they said."""
        if self.ours:
            self.ours, self.args.logging_nan_inf_filter = False, True

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The loss of a micro-batch was added."""
        self.restore()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The loss of a step's last micro-batch was added."""
        self.restore()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Tell how many there were, of the first process: the line waits for the device anyway.

        The first time beside the bar, and of the whole training as a note of the run.
        """
        whole = "train_loss" in (logs or {})
        asked = whole or ("loss" in (logs or {}) and not self.told)
        if self.left_out is None or not asked or not state.is_world_process_zero:
            return
        sent, self.sent = self.sent, None
        if count := int(self.left_out if sent is None or whole else sent()):
            which = f"{count:,} micro-batch{'es' if count > 1 else ''} up to step {state.global_step}"
            if whole:
                told = "was not a number, and is left out of the losses told here"
                self.note([f"the loss of {which} {told}; the model may be no good"])
            if self.told:
                return
            self.told = True
            tqdm.write(
                f"fastft: the loss of {which} was not a number. In the log's mean each counts as the mean of the steps "
                "since the line before, as 0 if there are none (logging_nan_inf_filter). A model is seldom any good "
                "after that; a smaller learning_rate may help."
            )
