"""What may be asked of an engine: one check of prompts and sampling for all of them. Needs no torch."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isfinite
from typing import Any

from attrs import asdict

from fastft.errors import Problem, UsageError
from fastft.rollout.base import Sampling

_SHOWN = 4  # of several prompts that are wrong in the same way
# A field of `Sampling` -> what holds for its values, and that in words.
SAMPLING: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (lambda v: _whole(v, 1), "a whole number of at least 1"),
    "temperature": (lambda v: _number(v) and v >= 0, "a number of at least 0 (0 is greedy)"),
    "top_p": (lambda v: _number(v) and 0 < v <= 1, "a number above 0 and up to 1 (1 is off)"),
    "top_k": (lambda v: _whole(v, 0), "a whole number of at least 0 (0 is off)"),
    "min_p": (lambda v: _number(v) and 0 <= v < 1, "a number from 0 (off) to below 1"),
    "repetition_penalty": (lambda v: _number(v) and v > 0, "a number above 0 (1 is off)"),
    "stop_ids": (
        lambda v: isinstance(v, Iterable) and all(_whole(token, 0) for token in v),
        "token ids: (2,), say",
    ),
    "seed": (lambda v: v is None or _whole(v, 0), "a whole number of at least 0, or None"),
}


def check_request(
    prompts: Sequence[Sequence[int]], sampling: Sampling, count: int, max_length: int | None = None
) -> None:
    """Raise `UsageError` with everything that is wrong with a call of `Engine.generate`.

    `max_length` is the number of tokens that a prompt and its completion may have together; None knows no bound.
    """
    problems = [*_problems_of_sampling(sampling), *_problems_of_prompts(prompts)]
    if not _whole(count, 1):
        problems.append(Problem("count", count, "a whole number of at least 1"))
    if not problems and max_length is not None:
        problems += _too_long(prompts, sampling.max_new_tokens, max_length)
    if problems:
        raise UsageError(*problems)


def _problems_of_sampling(sampling: Sampling) -> list[Problem]:
    values = asdict(sampling, recurse=False)
    return [
        Problem(f"sampling.{name}", values[name], expected)
        for name, (holds, expected) in SAMPLING.items()
        if not holds(values[name])
    ]


def _problems_of_prompts(prompts: Sequence[Sequence[int]]) -> list[Problem]:
    wrong = []
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str) or not len(prompt) or not all(_whole(token, 0) for token in prompt):
            shown = prompt if isinstance(prompt, str) else list(prompt)[:8]
            wrong.append(Problem(f"prompts[{index}]", shown, "one or more token ids"))
    return wrong[:_SHOWN]


def _too_long(prompts: Sequence[Sequence[int]], new_tokens: int, max_length: int) -> list[Problem]:
    remedy = "Shorten the prompt, lower max_new_tokens, or load the model with a larger max_length."
    room = max_length - new_tokens
    if room < 1:
        allowed = f"below the {max_length} tokens that the model has for a prompt and its completion"
        return [Problem("sampling.max_new_tokens", new_tokens, allowed, "Lower it, or load with a larger max_length.")]
    expected = f"at most {room} tokens, so that {new_tokens} new ones end within the model's {max_length}"
    long = [(index, len(prompt)) for index, prompt in enumerate(prompts) if len(prompt) > room]
    return [Problem(f"prompts[{index}]", f"{size} tokens", expected, remedy) for index, size in long[:_SHOWN]]


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)
