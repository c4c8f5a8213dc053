"""When a step's line of the log is written: while the next step runs, if that can be; and of the last step in any case.

transformers asks the device for the loss as soon as a step is launched, and has the line logged when the step is done;
all that while the device has nothing to do. Here the numbers are sent off instead, and the line is logged once the
first micro-batch of the next step is launched: state and weights are still those behind the line's own step.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from attrs import frozen
from torch import Tensor
from transformers.training_args import ParallelMode

from fastft.train.overrides import has_own

SEEN = ("on_log", "on_step_begin")
"""The events of callbacks that come at another time, or before a line that they would have come behind.

Callbacks that are known take a line when it comes. One of the user's may stop the run by what it says.
"""


def on_its_way(tensor: Tensor) -> Callable[[], Tensor]:
    """Begin to copy `tensor`, as it is now, to the host; return a function that waits for the copy and returns it."""
    if tensor.device.type != "cuda":
        copy = tensor.detach().clone()
        return lambda: copy
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor.detach(), non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(tensor.device))

    def read() -> Tensor:
        arrived.synchronize()
        return copy

    return read


@frozen(eq=False)
class Line:
    """A line that is still to be logged: what transformers is then given in place of the tensors on the device.

    `last_logged`: the step of the line before. `rest`: the further arguments.
    """

    loss: Callable[[], Tensor]
    norm: Callable[[], Tensor | float | None]
    last_logged: int
    rest: Sequence[Any]
    named: Mapping[str, Any]

    @classmethod
    def sent(
        cls, loss: Tensor, norm: Tensor | float | None, last_logged: int, rest: Sequence[Any], named: Mapping[str, Any]
    ) -> "Line":
        """Send the numbers of a line off, and set the sum of losses back to zero."""
        line = cls(
            on_its_way(loss), on_its_way(norm) if isinstance(norm, Tensor) else lambda: norm, last_logged, rest, named
        )
        loss -= loss  # as transformers does: what is no number stays none
        return line


def may_be_late(trainer: Any) -> bool:
    """Say whether the line of the step that has just ended can wait for the next step to begin.

    Not behind the last step of an epoch or of the run, nor where an evaluation or a checkpoint follows; not where
    losses are gathered, if only of one process; and not where a callback of the user's own is to see it.
    """
    args, control, state = trainer.args, trainer.control, trainer.state
    follows = control.should_evaluate or control.should_save
    ends = control.should_training_stop or control.should_epoch_stop or state.global_step >= state.max_steps
    if not control.should_log or follows or ends or float(state.epoch or 0.0).is_integer():
        return False
    if args.auto_find_batch_size or args.parallel_mode != ParallelMode.NOT_PARALLEL:
        return False
    if state.global_step <= trainer._globalstep_last_logged:
        return False
    return not has_own(trainer.callback_handler.callbacks, *SEEN)


class LateLog:
    """The part of a trainer that logs the line of a step while the next one runs; stands before transformers' class.

    The trainer has `recorder` and `finite`, which send off what they add to a line, and calls `step_launched` behind
    every micro-batch. Lines are late where it says so by `logs_late`. `log_last_line` is for who ends the run before a
    step's evaluation or checkpoint is done.
    """

    logs_late = False
    _line: Line | None = None  # that of the step before, still to be logged
    _stepped = False  # whether a micro-batch has come since a line was due
    _due: tuple[Any, ...] | None = None  # of the step that has just ended, what its line is made of

    def step_launched(self) -> None:
        """Log the line of the step before, now that the device has something to do."""
        self.log_late_line()
        self._stepped = True

    def log_late_line(self) -> None:
        """Log the line of the step before, if it is still to be logged; what is asked for of this step stays so."""
        line = self._line
        if line is None:
            return
        loss, norm = line.loss(), line.norm()
        self._line, self._globalstep_last_logged = None, line.last_logged
        self._only_log(loss, norm, *line.rest, **line.named)

    def log_last_line(self) -> None:
        """Log the line of the step that has just ended and turned out to be the last, unless it has one."""
        if self._due is None or self.args.logging_strategy == "no":
            return
        if self.state.global_step > self._globalstep_last_logged:
            *given, named = self._due
            self._only_log(*given, **named)

    def _only_log(self, *args: Any, **kwargs: Any) -> None:
        asked = _asked(self.control)
        _ask(self.control, (True, False, False))
        super()._maybe_log_save_evaluate(*args, **kwargs)
        _ask(self.control, asked)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; the line of the last whole step is logged, however the run ends."""
        self._line, self._stepped, self._due = None, False, None
        try:
            return super().train(*args, **kwargs)
        finally:
            with suppress(Exception):  # a device that failed gives no numbers any more
                self.log_late_line()

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        self.log_late_line()
        stepped, self._stepped = self._stepped, False
        if not (stepped and self.logs_late and may_be_late(self)):  # an epoch's end comes behind no step
            self._due = (tr_loss, grad_norm, *args, kwargs)
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)
            if self.control.should_training_stop:  # by an evaluation, or behind a checkpoint
                self.log_last_line()
            self._due = None
            return
        self._line = Line.sent(tr_loss, grad_norm, self._globalstep_last_logged, args, kwargs)
        self.recorder.send()
        self.finite.send()
        self._globalstep_last_logged, self.control.should_log = self.state.global_step, False


def _asked(control: Any) -> tuple[bool, bool, bool]:
    return control.should_log, control.should_evaluate, control.should_save


def _ask(control: Any, flags: tuple[bool, bool, bool]) -> None:
    control.should_log, control.should_evaluate, control.should_save = flags
