"""Rewards for the length of a completion."""

from collections.abc import Sequence
from typing import Any, Literal

from fastft.errors import Problem, UsageError
from fastft.rewards.making import Reward, named, values_of
from fastft.rewards.text import text_of

Unit = Literal["tokens", "characters", "words"]


def length(
    *,
    limit: int | None = None,
    buffer: int | None = None,
    target: int | None = None,
    unit: Unit = "tokens",
    name: str = "length",
) -> Reward:
    """Return a reward for the length n of a completion, either within a limit or near a target.

    * `limit`, `buffer`: 0 up to `limit - buffer`, falling linearly to -1 at `limit`, and -1 beyond (the soft overlong
      punishment of DAPO, arXiv:2503.14476, equation 13). `buffer` 0 (the default) is a hard limit.
    * `target`: 1 - min(1, |n - target| / target).

    `unit`: "tokens" (those that were sampled, from the column `completion_ids` that trainers give), "characters" or
    "words" (between white space).

    Raises `UsageError` unless exactly one of `limit` and `target` is given and the numbers can be.
    """
    if unit not in ("tokens", "characters", "words"):
        raise UsageError(Problem("unit", unit, "'tokens', 'characters' or 'words'"))
    if (limit is None) == (target is None):
        raise UsageError(Problem("limit, target", (limit, target), "exactly one of them"))
    if (limit or target or 0) < 1:
        raise UsageError(Problem("limit" if target is None else "target", limit or target, "a number above 0"))
    if buffer is not None and (limit is None or not 0 <= buffer <= limit):
        raise UsageError(Problem("buffer", buffer, "a number from 0 to limit, together with limit"))

    def score(n: int) -> float:
        if limit is None:
            return 1.0 - min(1.0, abs(n - target) / target)  # type: ignore[operator]
        over = n - (limit - (buffer or 0))
        return 0.0 if over <= 0 else -min(1.0, over / buffer) if buffer else -1.0

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        if unit == "tokens":
            return [score(len(ids)) for ids in values_of(columns, "completion_ids", name, len(completions))]
        texts = map(text_of, completions)
        return [score(len(text) if unit == "characters" else len(text.split())) for text in texts]

    return named(reward, name)
