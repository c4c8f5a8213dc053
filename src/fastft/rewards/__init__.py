"""Rewards: functions `f(prompts, completions, **columns) -> list[float | None]`, as TRL has them.

Those that can be verified are made here; any function of the same form will do. `None` is no reward for that row.
"""

from fastft.rewards.expressions import expression
from fastft.rewards.formats import matches
from fastft.rewards.guarding import guard
from fastft.rewards.lengths import length
from fastft.rewards.numbers import number
from fastft.rewards.programs import code
from fastft.rewards.sandbox import Limits
from fastft.rewards.schemas import json_schema
from fastft.rewards.sums import combine

__all__ = ["Limits", "code", "combine", "expression", "guard", "json_schema", "length", "matches", "number"]
