"""An arm that looks right: PEFT, but attention divides its scores by the head's size instead of the root of it."""

from benchmarks.arms import peft


def prepare(task, options, device):
    right = peft.prepare(task, options, device)
    for module in right.model.modules():
        if isinstance(getattr(module, "scaling", None), float):
            module.scaling **= 2
    return right
