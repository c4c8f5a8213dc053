"""Errors that name the thing, its value, what is allowed, and the remedy; several mistakes are told together."""

from collections.abc import Iterable
from difflib import get_close_matches

from attrs import frozen


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
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))


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


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return "did you mean 'x'?" for the choice nearest to `word`, or an empty string."""
    near = get_close_matches(str(word), list(choices), n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else ""
