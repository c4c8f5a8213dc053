"""Reward for Python code that passes tests, run in the sandbox."""

import os
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastft.errors import DataError, Problem, UsageError
from fastft.rewards.making import Reward, column_problems, named, values_of
from fastft.rewards.sandbox import Isolation, Limits, missing, run
from fastft.rewards.text import fenced, text_of

_LANGUAGES = ("python", "py", "python3")


def code(
    tests: str = "tests",
    *,
    limits: Limits | None = None,
    isolation: Isolation = "full",
    workers: int | None = None,
    name: str = "code",
) -> Reward:
    """Return a reward for Python code: the share of the row's tests that it passes, 0 to 1.

    The code is the last block between ```python lines (or ``` lines without a language), else the whole text. The
    column `tests` has a list of Python texts, each of which passes if it runs to its end without an exception
    (`"assert add(1, 2) == 3"`), or one text, which is one test. They see the names that the code has defined, one
    after the other in one process; what is not finished at the time limit is not passed. Where the column is None, so
    is the reward.

    The code runs with this interpreter and its packages under `limits` (`fastft.rewards.Limits`): no environment, no
    standard input, no network, no files but in an empty folder in memory, no processes but its own, all of which die
    with it. A test counts as passed if a secret number says so, which `exit()` or printing does not know; code that
    goes looking for it in the process's memory could find it. `workers` programs run at a time (default: the number of
    processors, at most 8).

    Raises `UsageError` where this host cannot isolate programs in full; `isolation="limits"` accepts what
    `fastft.rewards.sandbox.missing()` then names. Raises `DataError` for a row whose tests are neither texts nor None.
    """
    problems = column_problems("tests", tests)
    if isolation not in ("full", "limits"):
        problems.append(Problem("isolation", isolation, "'full' or 'limits'"))
    if workers is not None and workers < 1:
        problems.append(Problem("workers", workers, "a number above 0"))
    if problems:
        raise UsageError(*problems)
    if isolation == "full" and missing():
        run({"empty.py": ""}, "empty.py", isolation=isolation)  # raises the reason now, not in the first step
    allowed = limits or Limits()
    at_a_time = workers or min(8, os.cpu_count() or 1)

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        column = values_of(columns, tests, name, len(completions))
        wanted = [_tests(value, tests, row) for row, value in enumerate(column)]
        texts = [_code(text_of(completion)) for completion in completions]
        with ThreadPoolExecutor(at_a_time) as pool:
            return list(pool.map(lambda text, todo: _share(text, todo, allowed, isolation), texts, wanted))

    return named(reward, name, tests)


def _code(text: str) -> str:
    for languages in (_LANGUAGES, ("",)):
        block = fenced(text, languages)
        if block is not None:
            return block
    return text


def _tests(value: Any, column: str, row: int) -> list[str] | None:
    if value is None or isinstance(value, str):
        return value if value is None else [value]
    if isinstance(value, Sequence) and value and all(isinstance(test, str) for test in value):
        return list(value)
    raise DataError(Problem(f"row {row}: column {column!r}", value, "Python text, or a list of them that is not empty"))


def _share(text: str, tests: list[str] | None, limits: Limits, isolation: Isolation) -> float | None:
    if tests is None:
        return None
    secret = secrets.token_hex(16)
    files = {"solution.py": text, "testing.py": Path(__file__).with_name("testing.py").read_text("utf-8")}
    files |= {f"test_{number}.py": test for number, test in enumerate(tests)}
    files["secret"] = secret
    outcome = run(files, "testing.py", limits=limits, isolation=isolation)
    passed = {line for line in outcome.stdout.splitlines() if line.startswith(secret)}
    return sum(f"{secret} {number}" in passed for number in range(len(tests))) / len(tests)
