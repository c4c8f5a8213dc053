"""Rewards that are to see texts, for a trainer that hands them messages."""

import contextlib
import copy
import functools
import inspect
from collections.abc import Sequence
from typing import Any

from fastft.rewards.guarding import Guarded
from fastft.rewards.text import text_of
from fastft.rewards.traits import is_async, is_module, name_of


def of_texts(function: Any) -> Any:
    """Return a reward that is called with the texts of prompts and completions, where these are lists of messages.

    A prompt's text is what its last message says. Models, which read conversations, and what is no function stay as
    they are; one under guard is another under the same guard.
    """
    if isinstance(function, Guarded):
        guarded = copy.copy(function)
        guarded.function = of_texts(function.function)
        return guarded
    if not callable(function) or is_module(function):
        return function

    def plain(*given: Any, **named: Any) -> Any:
        return function(**_as_texts(*given, **named))

    async def awaited(*given: Any, **named: Any) -> Any:
        return await function(**_as_texts(*given, **named))

    made = awaited if is_async(function) else plain
    functools.update_wrapper(made, function)  # the columns that it looks at
    with contextlib.suppress(TypeError, ValueError):  # some do not tell theirs
        made.__signature__ = inspect.signature(function, follow_wrapped=False)  # type: ignore[attr-defined]
    made.__name__ = name_of(function)
    return made


def _as_texts(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> dict[str, Any]:
    """Return what a reward is called with, texts in place of messages."""
    return {"prompts": _prompts(prompts), "completions": [text_of(one) for one in completions], **columns}


def _prompts(prompts: Sequence[Any]) -> list[str]:
    return [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts]
