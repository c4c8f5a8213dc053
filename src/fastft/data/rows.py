"""What a row is, and what its fields must hold before anything is rendered."""

from collections.abc import Mapping
from typing import Any

from fastft.data.check import text_problem
from fastft.data.convert import conversation_problems
from fastft.errors import DataError, Problem, did_you_mean

KINDS = {"messages": ("messages",), "prompt and completion": ("prompt", "completion"), "text": ("text",)}
ROW_IS = "A row is {'messages': [...]}, {'prompt', 'completion'} or {'text'}."


def kind_of(where: str, row: Any) -> str:
    """Return which of `KINDS` a row is. Raises `DataError`."""
    if not isinstance(row, Mapping):
        raise DataError(Problem(where, row, "a dict", ROW_IS))
    for kind, fields in KINDS.items():
        if all(name in row for name in fields):
            return kind
    expected = "'messages', or 'prompt' and 'completion', or 'text'"
    raise DataError(Problem(f"{where}, fields", sorted(map(str, row)), expected, _field_remedy(row)))


def _field_remedy(row: Mapping[str, Any]) -> str:
    """Return what to do about a row whose fields are no kind that can be rendered."""
    if {"chosen", "rejected"} <= set(row):
        return "Rows with 'chosen' and 'rejected' are preferences; fine-tune on the chosen answers as 'messages'."
    if "input_ids" in row:
        return "Token ids need no rendering: pass them to sft or the trainer as a datasets.Dataset."
    known = [name for fields in KINDS.values() for name in fields]
    halves = [fields for fields in KINDS.values() if set(fields) & set(row)]
    missing = next((name for fields in halves for name in fields if name not in row), "")
    near = next((hint for name in row if name not in known for hint in [did_you_mean(str(name), known)] if hint), "")
    return near or (f"It has no {missing!r}." if missing else "")


def need_text(where: str, text: Any) -> None:
    """Raise `DataError` for what is no text, an empty one, or one too long."""
    problem = text_problem(where, text)
    if problem:
        raise DataError(problem)


def need_messages(where: str, messages: Any) -> None:
    """Raise `DataError` with every mistake of a list of messages."""
    problems = conversation_problems(where, messages)
    if problems:
        raise DataError(*problems)


def short(value: Any) -> str:
    """Return a value as text of at most 80 characters."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
