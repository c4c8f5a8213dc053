"""Reward for a mathematical expression that equals another, by the library math-verify."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastft.environment import installed
from fastft.errors import DataError, Problem, UsageError
from fastft.rewards.making import Reward, column_problems, named, values_of
from fastft.rewards.sandbox import Limits, run
from fastft.rewards.text import answer_of, text_of

_START = 30.0  # seconds for importing sympy on a busy machine
_LONGEST = 10_000  # characters of an answer that are read


def expression(column: str = "answer", *, seconds: float = 5.0, name: str = "expression") -> Reward:
    r"""Return a reward of 1 for texts whose answer equals the expression in the row's `column`, and 0 for others.

    Both are LaTeX or plain, and are compared by math-verify (numbers, fractions, sets, intervals, equations, algebra).
    The answer is the last of \boxed{...}, <answer>...</answer> or "#### ...", else what math-verify finds in the text.
    Each row has a process of its own within the sandbox of `code`, and `seconds`; one that takes longer or more than
    1 GiB is not equal, so no text can hold up the training. Where the host forbids the sandbox's namespaces, its limits
    are kept.

    Needs math-verify (`pip install 'fastft[rewards]'`): `UsageError` if it is missing. Raises `DataError` for a row
    whose column cannot be read as an expression.
    """
    if not installed("math_verify"):
        raise UsageError(
            Problem("expression", "not installed", "the package math-verify", "pip install 'fastft[rewards]'")
        )
    problems = column_problems("column", column)
    if seconds <= 0:
        problems.append(Problem("seconds", seconds, "a number above 0"))
    if problems:
        raise UsageError(*problems)

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        wanted = values_of(columns, column, name, len(completions))
        rows = [
            (row, _as_latex(str(right)), _answer(text_of(completion)))
            for row, (completion, right) in enumerate(zip(completions, wanted, strict=True))
            if right is not None
        ]
        verdicts = _compare([(right, answer) for _, right, answer in rows], seconds)
        problems = [
            Problem(f"row {row}: column {column!r}", wanted[row], "an expression that math-verify can read")
            for (row, _, _), verdict in zip(rows, verdicts)
            if verdict == "unreadable"
        ]
        if problems:
            raise DataError(*problems)
        scores: list[float | None] = [None] * len(completions)
        for (row, _, _), verdict in zip(rows, verdicts):
            scores[row] = float(verdict == "equal")
        return scores

    return named(reward, name, column)


def _as_latex(text: str) -> str:
    return text if "$" in text or "\\boxed" in text or "\\(" in text or "\\[" in text else f"\\boxed{{{text}}}"


def _answer(text: str) -> str:
    answer = answer_of(text)
    return text[-_LONGEST:] if answer is None else _as_latex(answer[:_LONGEST])


def _compare(pairs: list[tuple[str, str]], seconds: float) -> list[str]:
    """Return "equal", "different", "unreadable" (the first of the pair) or "lost" (time or memory) for each pair."""
    if not pairs:
        return []
    files = {
        "comparing.py": Path(__file__).with_name("comparing.py").read_text("utf-8"),
        "pairs.json": json.dumps({"pairs": pairs, "seconds": seconds}),
    }
    limits = Limits(
        seconds=_START + len(pairs) * (seconds + 1),
        file_size=(4 << 20) + len(files["pairs.json"]),
        output=1024 + 32 * len(pairs),
    )
    outcome = run(files, "comparing.py", limits=limits, isolation="limits")
    verdicts = outcome.stdout.split()
    if not outcome.ok or len(verdicts) != len(pairs):
        raise RuntimeError(f"math-verify ended early ({outcome.ended} {outcome.code}): {outcome.stderr.strip()[-500:]}")
    return verdicts
