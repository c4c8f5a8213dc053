"""What is handed to a public function: is it a model, a tokenizer, a folder? Asked before anything is done with it."""

from os import PathLike
from typing import Any

from fastft.errors import Problem, UsageError, short

_PAIR = "fastft.load returns the pair (model, tokenizer); pass each in its place."


def model_problem(model: Any, where: str = "model", remedy: str = _PAIR) -> Problem | None:
    """Return what is wrong with something that is given as a language model."""
    if hasattr(model, "parameters") and hasattr(model, "get_input_embeddings"):
        return None
    if is_path(model):
        loads = f"fastft.load({str(model)!r}) loads a model and its tokenizer."
        return Problem(where, short(str(model)), "a model", loads)
    return Problem(where, type(model).__name__, "a model", remedy)


def model_or_folder_problem(given: Any, where: str = "model") -> Problem | None:
    """Return what is wrong with something that is given as a language model or the folder of one."""
    if is_path(given) and str(given):
        return None
    expected = "a model, or the path of a folder"
    value = "" if given == "" else type(given).__name__
    return None if model_problem(given) is None else Problem(where, value, expected, _PAIR)


def tokenizer_problem(tokenizer: Any, where: str = "tokenizer") -> Problem | None:
    """Return what is wrong with something that is given as a tokenizer."""
    if callable(getattr(tokenizer, "convert_tokens_to_ids", None)):
        return None
    path = is_path(tokenizer)
    remedy = f"transformers.AutoTokenizer.from_pretrained({str(tokenizer)!r}) loads it." if path else ""
    remedy = "Pass its .tokenizer." if hasattr(tokenizer, "tokenizer") else remedy
    return Problem(where, short(str(tokenizer)) if path else type(tokenizer).__name__, "a tokenizer", remedy)


def path_problem(where: str, path: Any, expected: str = "the path of a folder", remedy: str = "") -> Problem | None:
    """Return what is wrong with something that is given as a path to write to; an empty one names nothing."""
    return None if is_path(path) and str(path).strip() else Problem(where, path, expected, remedy)


def pair_problems(model: Any, tokenizer: Any = None) -> list[Problem]:
    """Return what is wrong with a model and a tokenizer: swapped, say, or both in one. None: no tokenizer is given."""
    wrong = [model_problem(model), None if tokenizer is None else tokenizer_problem(tokenizer)]
    return [problem for problem in wrong if problem is not None]


def refuse(*problems: Problem | str | None) -> None:
    """Raise `UsageError` with those of the problems that there are."""
    if wrong := [problem for problem in problems if problem is not None]:
        raise UsageError(*wrong)


def refuse_pair(model: Any, tokenizer: Any) -> None:
    """Raise `UsageError` for what is no model or no tokenizer; both have to be given."""
    refuse(model_problem(model), tokenizer_problem(tokenizer))


def refuse_export(model_or_folder: Any, tokenizer: Any = None, folder: Any = ".", where: str = "model") -> None:
    """Raise `UsageError` for what cannot be exported: neither a model nor a folder's path, a tokenizer that is none
    (None: it is not given), or a `folder` to write to that is none. `where`: what the model is called.
    """
    wrong = None if tokenizer is None else tokenizer_problem(tokenizer)
    refuse(model_or_folder_problem(model_or_folder, where), wrong, path_problem("folder", folder))


def is_path(value: Any) -> bool:
    """Say whether a value is a path, or a text that may be one."""
    return isinstance(value, str | PathLike)
