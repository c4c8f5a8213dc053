"""Reward for a format: a regular expression."""

import re
from typing import Literal

from fastft.errors import Problem, UsageError
from fastft.rewards.making import Reward, from_text


def matches(
    expression: str | re.Pattern[str],
    *,
    where: Literal["whole", "start", "anywhere"] = "whole",
    reward: float = 1.0,
    otherwise: float = 0.0,
    name: str = "matches",
) -> Reward:
    """Return a reward for texts that match a regular expression.

    `where`: the "whole" text without white space around it, its "start", or "anywhere" in it. In a string `.` matches
    line ends too; a compiled pattern keeps its own flags. An expression that backtracks without end on some text is
    stopped by the time limit of `guard` alone.

    Raises `UsageError` for an expression that cannot be compiled.
    """
    try:
        compiled = re.compile(expression, re.DOTALL) if isinstance(expression, str) else expression
    except re.error as error:
        raise UsageError(Problem("expression", expression, "a regular expression", str(error))) from error
    finders = {"whole": compiled.fullmatch, "start": compiled.match, "anywhere": compiled.search}
    if where not in finders:
        raise UsageError(Problem("where", where, "'whole', 'start' or 'anywhere'"))
    find = finders[where]
    return from_text(name, lambda text: reward if find(text.strip()) else otherwise)
