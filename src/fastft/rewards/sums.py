"""One reward from several, by a weighted sum."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fastft.errors import Problem, UsageError
from fastft.rewards.guarding import guard
from fastft.rewards.making import Reward, named
from fastft.rewards.traits import is_async, is_module, name_of


def combine(
    weights: Mapping[Callable[..., Any], float] | Iterable[tuple[Callable[..., Any], float]], *, name: str | None = None
) -> Reward:
    """Return a reward that is the sum of `weight * reward` over `{reward: weight}` or pairs of them.

    A reward that is None for a row is left out of its sum; where all are, the sum is None. Each is under `guard`, so
    that what fails in one of them is missing there, and named in the log. The name is made from those of the parts
    unless given.

    Trainers take several rewards with `reward_weights` as well, and then log each of them.

    Raises `UsageError` for no rewards, weights that are not finite, async functions and models.
    """
    given = list(
        weights.items() if isinstance(weights, Mapping) else weights if isinstance(weights, Iterable) else [weights]
    )
    single = [part for part in given if not (isinstance(part, tuple | list) and len(part) == 2)]
    if single:
        remedy = "Say the weights: combine({reward: 1.0})."
        raise UsageError(*(Problem("weights", part, "pairs of a reward and its weight", remedy) for part in single))
    pairs = [(function, weight) for function, weight in given]
    problems = [] if pairs else [Problem("weights", {}, "at least one reward and its weight")]
    for function, weight in pairs:
        if not callable(function) or is_module(function) or is_async(function):
            problems.append(Problem("weights", function, "a function that is not async, and no model"))
        elif isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            problems.append(Problem(f"weight of {name_of(function)!r}", weight, "a finite number"))
    if problems:
        raise UsageError(*problems)
    parts = guard([function for function, _ in pairs])
    factors = [float(weight) for _, weight in pairs]

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        scores = [part(prompts=prompts, completions=completions, **columns) for part in parts]
        return [_sum(factors, row) for row in zip(*scores)]

    reward.parts = tuple(parts)  # type: ignore[attr-defined]  # whose failures trainers count
    return named(reward, name or "+".join(name_of(function) for function, _ in pairs))


def _sum(factors: Sequence[float], row: Sequence[float | None]) -> float | None:
    there = [factor * value for factor, value in zip(factors, row) if value is not None]
    return math.fsum(there) if there else None
