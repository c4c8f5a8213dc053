"""Dropout of a model: what of it is on, and a while without any.

Some of it are modules; attention has a number alone, an attribute of its module, which it hands to a function.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_Dropout = nn.modules.dropout._DropoutNd


def first_on(model: nn.Module) -> str:
    """Return the name of a module that drops something as the model is now, "" if none does."""
    return next((name for name, module in model.named_modules() if module.training and _drops(module)), "")


@contextmanager
def off(model: nn.Module) -> Iterator[None]:
    """Switch all dropout off while the block runs; the modules' modes are the caller's to put back."""
    numbers = [(module, name, value) for module in model.modules() for name, value in _numbers(module)]
    try:
        for module in model.modules():
            if isinstance(module, _Dropout):
                module.eval()
        for module, name, _ in numbers:
            setattr(module, name, 0.0)
        yield
    finally:
        for module, name, value in numbers:
            setattr(module, name, value)


def _drops(module: nn.Module) -> bool:
    return bool(_numbers(module)) or (isinstance(module, _Dropout) and module.p > 0)


def _numbers(module: nn.Module) -> list[tuple[str, Any]]:
    """Return the shares that a module has functions drop, by the names of its attributes."""
    return [(name, value) for name, value in vars(module).items() if "dropout" in name and _is_share(value)]


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
