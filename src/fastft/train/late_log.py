"""A step's line of the log, read from the device while the next step runs there.

transformers asks the device for the loss as soon as a step is launched, and has the line logged when the step is done;
all that while the device has nothing to do. Here the numbers are sent off instead, and the line is logged once the
first micro-batch of the next step is launched: state and weights are still those behind the line's own step.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

OWN = ("fastft", "transformers", "trl")
"""Packages whose callbacks take a line when it comes. One of the user's may stop the run by what it says."""


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
        loss.zero_()
        return line


def may_be_late(trainer: Any) -> bool:
    """Say whether the line of the step that has just ended can wait for the next step to begin.

    Not behind the last step of an epoch or of the run, nor where an evaluation or a checkpoint follows; not where other
    processes take part; and not where a callback of the user's own is to see it.
    """
    args, control, state = trainer.args, trainer.control, trainer.state
    follows = control.should_evaluate or control.should_save
    ends = control.should_training_stop or control.should_epoch_stop or state.global_step >= state.max_steps
    if not control.should_log or follows or ends or float(state.epoch or 0.0).is_integer():
        return False
    if args.world_size > 1 or args.auto_find_batch_size or state.global_step <= trainer._globalstep_last_logged:
        return False
    takers = [one for one in trainer.callback_handler.callbacks if hasattr(type(one), "on_log")]
    return all(getattr(type(one).on_log, "__module__", "").partition(".")[0] in OWN for one in takers)
