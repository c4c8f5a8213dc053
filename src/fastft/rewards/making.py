"""The form of every reward, `f(prompts, completions, **columns) -> list[float | None]`, made from a score of a row."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fastft.errors import DataError, Problem, UsageError, did_you_mean, short
from fastft.rewards.text import text_of

# What trainers call every reward with, and what they pass along that is no column of the data.
CALLED_WITH = ("prompts", "completions")
NO_COLUMNS = ("completion_ids", "trainer_state", "log_extra", "log_metric", "environments")
Reward = Callable[..., list[float | None]]


def from_text(name: str, score: Callable[[str], float | None]) -> Reward:
    """Return a reward called `name` that scores the text of each completion."""

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        return [score(text_of(completion)) for completion in completions]

    return named(reward, name)


def against_column(name: str, column: str, score: Callable[[str, Any], float | None]) -> Reward:
    """Return a reward called `name` that scores each text against the row's value of `column`; None where it is None.

    Raises `UsageError` where rows have no such column, and `DataError` with the number of the row where `score` raises
    one.
    """

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        return [
            None if wanted is None else _scored(score, row, text_of(completion), wanted)
            for row, (completion, wanted) in enumerate(
                zip(completions, values_of(columns, column, name, len(completions)), strict=True)
            )
        ]

    return named(reward, name, column)


def values_of(columns: dict[str, Any], column: str, name: str, rows: int) -> Sequence[Any]:
    """Return a column's values, one for each row.

    Raises `UsageError` if there is none of that name, and `DataError` unless it has a value for each of the `rows`.
    """
    if column not in columns:
        raise UsageError(missing_column(name, column, columns))
    values = columns[column]
    if isinstance(values, str) or not hasattr(values, "__len__") or not hasattr(values, "__getitem__"):
        raise DataError(
            Problem(f"{name}: column {column!r}", short(values), f"a list of {rows} values, one for each row")
        )
    if len(values) != rows:
        given = f"{len(values)} values"
        raise DataError(Problem(f"{name}: column {column!r}", given, f"{rows} values, one for each completion"))
    return values


def missing_column(name: str, column: str, columns: Iterable[str]) -> Problem:
    """Return what is to be told of a reward's column that is not among the data's."""
    there = sorted(other for other in columns if other not in NO_COLUMNS)
    shown = ", ".join(map(repr, there)) or "there are none"
    return Problem(f"{name}: column", column, f"one of the data's columns ({shown})", did_you_mean(column, there))


def missing_parameter(name: str, parameter: str, columns: Iterable[str]) -> Problem:
    """Return what is to be told of a parameter of a reward that the data have no column for."""
    there = sorted(other for other in columns if other not in NO_COLUMNS)
    shown = ", ".join(map(repr, there)) or "there are none"
    remedy = did_you_mean(parameter, [*there, *CALLED_WITH, *NO_COLUMNS]) or "Give it a default to go without."
    expected = f"prompts, completions or one of the data's columns ({shown})"
    return Problem(f"{name}: parameter", parameter, expected, remedy)


def column_problems(argument: str, column: Any) -> list[Problem]:
    """Return what is wrong with what an argument gives for the name of a column."""
    return [] if isinstance(column, str) and column else [Problem(argument, column, "the name of a column, a text")]


def named(reward: Reward, name: str, column: str | None = None) -> Reward:
    """Return the function under the name that logs and metrics show; `column` is the one of the data that it needs."""
    reward.__name__ = reward.__qualname__ = name
    if column is not None:
        reward.column = column  # type: ignore[attr-defined]  # which trainers look for before they begin
    return reward


def _scored(score: Callable[[str, Any], float | None], row: int, text: str, wanted: Any) -> float | None:
    try:
        return score(text, wanted)
    except DataError as error:
        raise DataError(*(f"row {row}: {problem}" for problem in error.problems)) from error
