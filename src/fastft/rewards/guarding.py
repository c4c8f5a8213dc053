"""What stands between a trainer and a user's rewards: a failing row is missing, a hung reward is an error."""

import asyncio
import functools
import logging
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from attrs import evolve, frozen

from fastft.errors import Problem, RewardError, UsageError
from fastft.rewards.checking import Failure, checked
from fastft.rewards.deadline import Overdue, within
from fastft.rewards.making import CALLED_WITH
from fastft.rewards.traits import asked_of, is_async, is_module, name_of, parts_of

_log = logging.getLogger(__name__)
# Functions that trainers pass along for logging; what a failed call had logged is forgotten.
_LOGGERS = ("log_extra", "log_metric")
# A number or None for each row, and the rows that failed.
Scores = tuple[list[float | None], list[Failure]]


@frozen
class Call:
    """What one call of a reward came to: its number of rows, which of them failed, which have no reward (failed ones
    among them), and wall-clock seconds.
    """

    rows: int
    failed: tuple[int, ...]
    unscored: tuple[int, ...]
    seconds: float

    @property
    def failures(self) -> int:
        """The number of rows that failed."""
        return len(self.failed)

    @property
    def missing(self) -> int:
        """The number of rows without a reward."""
        return len(self.unscored)


class Guarded:
    """A reward under guard; called like the reward itself. `last` is the `Call` made last, None before the first."""

    def __init__(self, function: Callable[..., Any], time_limit: float, failing_calls: int) -> None:
        self.function = function
        self.__name__ = name_of(function)
        self.last: Call | None = None
        self._time_limit = time_limit
        self._failing_calls = failing_calls
        self._failed_in_a_row = 0
        self._told = False

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Return a number or None for each row; raise `RewardError` as `guard` says."""
        started = time.monotonic()
        try:
            call = functools.partial(_score, self.function, prompts, completions, columns)
            rewards, failures = within(self._time_limit, call)
        except Overdue:
            raise self._overdue(len(completions), started) from None
        return self._settle(rewards, failures, started)

    def _settle(self, rewards: list[float | None], failures: list[Failure], started: float) -> list[float | None]:
        unscored = tuple(row for row, reward in enumerate(rewards) if reward is None)
        failed = tuple(failure.row for failure in failures)
        self.last = Call(len(rewards), failed, unscored, time.monotonic() - started)
        if failures and not self._told:
            self._told = True
            _log.warning(
                "reward %r failed for %d of %d rows, which count as missing; the first: row %d: %s. "
                "Further failures are only counted.",
                self.__name__,
                len(failures),
                len(rewards),
                failures[0].row,
                failures[0].why,
            )
        all_failed = bool(rewards) and len(failures) == len(rewards)
        self._failed_in_a_row = self._failed_in_a_row + 1 if all_failed else 0
        if self._failed_in_a_row >= self._failing_calls:
            raise RewardError(
                Problem(
                    f"reward {self.__name__!r}, row {failures[0].row}",
                    failures[0].why,
                    f"a reward for at least one row in {self._failing_calls} calls",
                    "Correct the function.",
                )
            ) from failures[0].error
        return rewards

    def _overdue(self, rows: int, started: float) -> RewardError:
        return RewardError(
            Problem(
                f"reward {self.__name__!r}",
                f"no result after {time.monotonic() - started:.1f} s for {rows} rows",
                "a result within its time limit",
                "Correct the function, or allow it more time (reward_time_limit of fastft.grpo and GRPOConfig, "
                "time_limit of rewards.guard).",
            )
        )


class GuardedAsync(Guarded):
    """An async reward under guard."""

    async def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Return a number or None for each row; raise `RewardError` as `guard` says."""
        started = time.monotonic()
        score = _score_async(self.function, prompts, completions, columns)
        try:
            rewards, failures = await asyncio.wait_for(score, self._time_limit)
        except TimeoutError:
            raise self._overdue(len(completions), started) from None
        return self._settle(rewards, failures, started)


def guard(functions: Sequence[Any], *, time_limit: float = 600.0, failing_calls: int = 3) -> list[Any]:
    """Return the rewards, each under guard (`Guarded`: called like the reward, its figures in `last`).

    * An exception, NaN, an infinity, anything that is no number, or a list of another length than the rows: the rows
      concerned are missing (None), which TRL's trainers leave out. After an exception the rows are scored one by one,
      so that only those that raise it are missing. The first failure of each reward is logged with row, value or
      exception and the line that raised it; later ones are counted in `last`.
    * `failing_calls` calls in a row in which every row failed: `RewardError`, from the exception of the first row.
    * A call that takes longer than `time_limit` seconds: `RewardError`. What can be interrupted: `deadline.within`.
    * `UsageError` about the arguments, such as a column that the data do not have, is raised at once.

    Functions may be async. Models and names of models, which trainers also take as rewards, are returned as they are.
    """
    if not time_limit > 0:
        raise UsageError(Problem("time_limit", time_limit, "seconds above 0"))
    if failing_calls < 1:
        raise UsageError(Problem("failing_calls", failing_calls, "a number above 0"))
    problems = problems_of(functions)
    if problems:
        raise UsageError(*problems)
    guarded: list[Any] = []
    for function in functions:
        if isinstance(function, str | Guarded) or is_module(function):
            guarded.append(function)
        else:
            kind = GuardedAsync if is_async(function) else Guarded
            guarded.append(kind(function, time_limit, failing_calls))
    return guarded


def problems_of(functions: Any) -> list[Problem]:
    """Return what is wrong with rewards that are to be guarded."""
    if isinstance(functions, str) or not isinstance(functions, Iterable):
        remedy = "Put it into a list: [reward]." if callable(functions) or isinstance(functions, str) else ""
        return [Problem("rewards", functions, "a list of functions", remedy)]
    return [
        Problem(f"rewards[{number}]", function, "a function, a model or the name of one")
        for number, function in enumerate(functions)
        if not (isinstance(function, str) or callable(function))
    ]


def calls_of(functions: Iterable[Any]) -> list[tuple[str, Call]]:
    """Return name and last call of every guarded reward that has been called, and of the parts of sums among them."""
    called = []
    for function in functions:
        if isinstance(function, Guarded) and function.last is not None:
            called.append((function.__name__, function.last))
            called += calls_of(parts_of(function.function))
    return called


def columns_of(functions: Iterable[Any]) -> list[tuple[str, str]]:
    """Return (name of the reward, column) for every column that the rewards made here look at, parts of sums too."""
    wanted = []
    for function in functions:
        inner = function.function if isinstance(function, Guarded) else function
        column = getattr(inner, "column", None)
        if isinstance(column, str) and not is_module(inner):
            wanted.append((name_of(inner), column))
        wanted += columns_of(parts_of(inner))
    return wanted


def parameters_of(functions: Iterable[Any]) -> list[tuple[str, str]]:
    """Return (name of the reward, parameter) for all that rewards must be called with, parts of sums too.

    What every reward is called with, `prompts` and `completions`, is left out.
    """
    wanted = []
    for function in functions:
        inner = function.function if isinstance(function, Guarded) else function
        wanted += [(name_of(inner), name) for name in asked_of(inner) if name not in CALLED_WITH]
        wanted += parameters_of(parts_of(inner))
    return wanted


def _score(
    function: Callable[..., Any], prompts: Sequence[Any], completions: Sequence[Any], columns: dict[str, Any]
) -> Scores:
    """Return the rewards and failures of all rows, scored together, or one by one if that raised an exception."""
    with _Attempt(prompts, completions, columns) as attempt:
        attempt.returned = function(**attempt.arguments)
    return attempt.scores() or _joined([_score(function, *one) for one in attempt.rows()])


async def _score_async(
    function: Callable[..., Any], prompts: Sequence[Any], completions: Sequence[Any], columns: dict[str, Any]
) -> Scores:
    """`_score` of an async function; the rows that are scored one by one are so at the same time."""
    with _Attempt(prompts, completions, columns) as attempt:
        attempt.returned = await function(**attempt.arguments)
    return attempt.scores() or _joined(await asyncio.gather(*(_score_async(function, *one) for one in attempt.rows())))


class _Attempt:
    """A call of a reward with all rows at once: what it `returned`, or the exception that the block ended with.

    Of a mistake in its arguments, and of one that the guard raised further inside, the run is to end.
    """

    def __init__(self, prompts: Sequence[Any], completions: Sequence[Any], columns: dict[str, Any]) -> None:
        self._given = prompts, completions, columns
        self._kept = _Kept(columns)
        self._error: Exception | None = None
        self.arguments = {"prompts": prompts, "completions": completions, **self._kept.columns}
        self.returned: Any = None

    def __enter__(self) -> "_Attempt":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, Exception) and not isinstance(error, UsageError | RewardError):
            self._error = error
        return self._error is not None

    def scores(self) -> Scores | None:
        """Return rewards and failures, None where the rows have to be scored one by one."""
        rows = len(self._given[1])
        if self._error is None:
            self._kept.pass_on()
            return checked(self.returned, rows)
        error, self._error = self._error, None  # whose traceback holds this very object
        return ([None], [_failure(error)]) if rows == 1 else None

    def rows(self) -> Iterator[tuple[list[Any], list[Any], dict[str, Any]]]:
        """Yield each row by itself."""
        return (_row(*self._given, row) for row in range(len(self._given[1])))


def _joined(scored: Sequence[Scores]) -> Scores:
    """Return as one what single rows came to."""
    failures = [evolve(failure, row=row) for row, (_, failed) in enumerate(scored) for failure in failed]
    return [rewards[0] for rewards, _ in scored], failures


def _row(
    prompts: Sequence[Any], completions: Sequence[Any], columns: dict[str, Any], row: int
) -> tuple[list[Any], list[Any], dict[str, Any]]:
    """Return one row of everything; loggers take whole batches, and are replaced by ones that log nothing."""
    rows = len(completions)
    one = {
        name: [value[row]] if isinstance(value, list | tuple) and len(value) == rows else value
        for name, value in columns.items()
    }
    return [prompts[row]], [completions[row]], one | {name: _nothing for name in _LOGGERS if name in one}


def _nothing(*arguments: Any, **named: Any) -> None:
    """Log nothing."""


class _Kept:
    """Columns whose loggers keep what they are told until it is known that the call came to its end."""

    def __init__(self, columns: dict[str, Any]) -> None:
        self._calls: list[Callable[[], Any]] = []
        loggers = {name: columns[name] for name in _LOGGERS if callable(columns.get(name))}
        self.columns = columns | {name: functools.partial(self._keep, logger) for name, logger in loggers.items()}

    def _keep(self, logger: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        self._calls.append(functools.partial(logger, *arguments, **named))

    def pass_on(self) -> None:
        """Tell the loggers what was kept."""
        for call in self._calls:
            call()


def _failure(error: Exception) -> Failure:
    """Return the failure of the one row that raised `error`, whose traceback then begins in the reward."""
    told, inside = _told(error), error.__traceback__ and error.__traceback__.tb_next
    return Failure(0, told, error.with_traceback(inside or error.__traceback__))


def _told(error: Exception) -> str:
    """Return an exception in one line, with the line of the function that raised it."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    where = f" ({frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"
