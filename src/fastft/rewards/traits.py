"""What a reward tells of itself: its name, what it is, the rewards it is made of."""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any


def unwrapped(function: Any) -> Any:
    """Return what a partial calls; anything else as it is."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def name_of(function: Callable[..., Any]) -> str:
    """Return the name by which logs call a reward; of a partial or an instance, that of its function or class."""
    inner = unwrapped(function)
    return str(getattr(inner, "__name__", type(inner).__name__))


def is_async(function: Callable[..., Any]) -> bool:
    """Say whether calling the function gives something to await."""
    inner = unwrapped(function)
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(getattr(inner, "__call__", None))  # noqa: B004


def is_module(thing: Any) -> bool:
    """Say whether a reward is a model."""
    torch = sys.modules.get("torch")  # a module cannot be here unless torch has been imported
    return torch is not None and isinstance(thing, torch.nn.Module)


def asked_of(function: Any) -> tuple[str, ...]:
    """Return the parameters without which a reward cannot be called; of what does not tell, and of models, none.

    A decorator may hand the function that it wraps what it asks for: its own parameters count.
    """
    if not callable(function) or is_module(function):
        return ()
    try:
        parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
    except (TypeError, ValueError):
        return ()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(one.name for one in parameters if one.kind in named and one.default is one.empty)


def parts_of(function: Any) -> tuple[Any, ...]:
    """Return the rewards that a sum of rewards is made of; of any other, and of other things called parts, none."""
    parts = getattr(function, "parts", ())
    return parts if isinstance(parts, tuple) else ()
