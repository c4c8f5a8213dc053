"""Errors that name the thing, its value, what is allowed, and the remedy; several mistakes are told together."""

import re
from collections.abc import Callable, Iterable, Mapping
from difflib import SequenceMatcher, get_close_matches
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from attrs import evolve, frozen

_SHOWN = 10  # parts of a value that an error shows
_LISTED = 30  # arguments of a function that an error lists; a config has hundreds


@frozen
class Problem:
    """One mistake: where it is, what stands there, what is allowed, and what to do."""

    where: str
    value: object
    expected: str
    remedy: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: expected {self.expected}, got {self.value!r}"
        return f"{text}. {self.remedy}" if self.remedy else text


class FastftError(Exception):
    """Base of every error that fastft raises on purpose; `problems` holds the single mistakes."""

    def __init__(self, *problems: Problem | str) -> None:
        super().__init__()
        self.tell(*problems)

    def tell(self, *problems: Problem | str) -> None:
        """Set the mistakes and the text that is made of them."""
        self.problems = problems
        self.args = ("\n".join(self.lines()),)

    def lines(self) -> list[str]:
        """Return the lines of the text; mistakes with the same remedy stand together, and it comes once behind them."""
        alike: dict[str | int, list[Problem | str]] = {}
        for number, problem in enumerate(self.problems):
            remedy = problem.remedy if isinstance(problem, Problem) else ""
            alike.setdefault(remedy or number, []).append(problem)
        lines = []
        for remedy, group in alike.items():
            if len(group) == 1:
                lines.append(str(group[0]))
            else:
                lines += [str(evolve(problem, remedy="")) for problem in group]
                lines.append(f"For these {len(group)}: {remedy}")
        return lines


class UsageError(FastftError, ValueError):
    """An argument or a combination of arguments that cannot work."""


class SpecError(FastftError, ValueError):
    """A model spec that is malformed, or not found."""


class LoadError(FastftError, OSError):
    """A model, tokenizer or adapter that cannot be loaded."""


class DataError(FastftError, ValueError):
    """A data set or a row that cannot be trained on."""


class SaveError(FastftError, OSError):
    """A file that could not be written; what stood there before is untouched."""


class OutOfMemoryError(FastftError, MemoryError):
    """A step that needs more memory than the device has: what used it, and what would save some, in order of cost."""


class EngineError(FastftError, RuntimeError):
    """A rollout engine that failed or cannot be had; what was trained up to then is untouched."""


class MetricError(FastftError, RuntimeError):
    """A metric of the user's own that fails or is no number; what was trained up to then is untouched."""


class RewardError(FastftError, RuntimeError):
    """A reward that hangs, or fails for every row time and again; what was trained up to then is untouched."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return "did you mean 'x'?" for the choice nearest to `word`, or an empty string."""
    near = get_close_matches(str(word), list(choices), n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else ""


def unknown_arguments(
    owner: str,
    names: Iterable[str],
    known: Iterable[str],
    renamed: Mapping[str, str] | None = None,
    elsewhere: Mapping[str, str] | None = None,
    unlisted: Iterable[str] = (),
) -> list[str]:
    """Return what to say to each of `names` that is not among the `known` ones, which `owner` takes.

    `renamed`: what others call what it takes; `elsewhere`: what to say of names that mean something, but not to it;
    `unlisted`: names that it knows as well, and does not put forward.
    """
    known, renamed, elsewhere = list(known), renamed or {}, elsewhere or {}
    all_known = [*known, *unlisted]
    problems = []
    for name in names:
        if name in all_known:
            continue
        near = elsewhere.get(name) or did_you_mean(name, all_known) or _near_elsewhere(name, elsewhere)
        hint = f"here it is {renamed[name]}" if name in renamed else near
        if not hint and len(known) <= _LISTED:
            hint = f"it takes {', '.join(known)}"
        problems.append(f"{owner}: unknown argument {name!r}" + (f"; {hint}" if hint else ""))
    return problems


def _near_elsewhere(name: str, elsewhere: Mapping[str, str]) -> str:
    near = get_close_matches(name, list(elsewhere), n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}? {elsewhere[near[0]]}" if near else ""


def argument_names(function: Callable[..., Any]) -> list[str]:
    """Return the names of a function's arguments, but for what takes any further ones."""
    open_ended = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    return [name for name, one in signature(function).parameters.items() if one.kind not in open_ended]


def did_you_mean_path(path: Path) -> str:
    """Return "did you mean 'x' or 'y'?" for what in the path's folder has a name like it, or an empty string."""
    try:
        there = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    near = [repr(str(path.parent / name)) for name in near_files(path.name, there)]
    return f"did you mean {' or '.join(near)}?" if near else ""


def near_files(name: str, there: Iterable[str]) -> list[str]:
    """Return the up to three names of files that are like `name`, the nearest first; endings alone are no likeness."""
    near = get_close_matches(name, list(there), n=3, cutoff=0.6)
    return [other for other in near if SequenceMatcher(None, _stem(other), _stem(name)).ratio() >= 0.6]


def _stem(name: str) -> str:
    """Return a file's name without its ending; a version number is none ("Qwen2.5-0.5B")."""
    return re.sub(r"(?<=.)\.[A-Za-z]\w*$", "", name)


def short(value: Any, limit: int = 80) -> Any:
    """Return `value`, or the start of its text and its size where it is longer than `limit` characters."""
    if isinstance(value, str):
        return value if len(value) <= limit else f"{value[: limit - 3]}... ({len(value):,} characters)"
    if isinstance(value, bytes):
        return value if len(value) <= limit else f"{value[: limit // 4]!r}... ({len(value):,} bytes)"
    # An outline before the whole: the repr of a row may be as long as the row.
    if isinstance(value, Mapping):
        outline: Any = {key: short(part, limit // 2) for key, part in list(value.items())[:_SHOWN]}
    elif isinstance(value, list | tuple):
        outline = [short(part, limit // 2) for part in value[:_SHOWN]]
    else:
        outline = value
    text = repr(outline)
    whole = not isinstance(value, Mapping | list | tuple) or len(value) <= _SHOWN
    return outline if whole and len(text) <= limit else text[: limit - 3] + "..."
