"""Values of metrics: those of the user's own are checked, so that what is wrong with one is told by its name."""

import functools
import numbers
from collections.abc import Callable, Mapping
from typing import Any

from fastft.errors import MetricError, Problem, short

REMEDY = "Correct the function: it takes an EvalPrediction and returns {name: number}."


class Checked:
    """A `compute_metrics`, called like it; raises `MetricError` for what it raises, or returns beside numbers."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        functools.update_wrapper(self, function, updated=())

    def __call__(self, prediction: Any, **options: Any) -> Any:
        """Return the metrics. `options` is `compute_result` of transformers: False asks for none yet."""
        try:
            made = self.function(prediction, **options)
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
            raise MetricError(Problem("compute_metrics", told, "a dict of numbers by name", REMEDY)) from error
        return _numbers(made) if options.get("compute_result", True) else made


def _numbers(made: Any) -> dict[str, Any]:
    """Return the numbers by name that `made` holds, NaN among them. Raises `MetricError` for anything else."""
    if not isinstance(made, Mapping):
        raise MetricError(Problem("compute_metrics", short(made), "a dict of numbers by name", REMEDY))
    problems = [
        Problem(f"compute_metrics, {name}", short(value), "a number")
        for name, value in made.items()
        if not isinstance(name, str) or not _is_number(value)
    ]
    if problems:
        raise MetricError(*problems)
    return {name: value.item() if hasattr(value, "item") else value for name, value in made.items()}


def _is_number(value: Any) -> bool:
    """Say whether it is a number, or an array or tensor of one."""
    one = isinstance(value, numbers.Number) or getattr(value, "shape", None) == ()
    return one and not isinstance(value, complex)
