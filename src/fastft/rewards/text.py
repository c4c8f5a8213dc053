"""What a completion says: its text, and the part of it that is put forward as the answer."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastft.errors import DataError, Problem

_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n?", re.MULTILINE)


def text_of(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """Return a completion's text: of a list of messages, the content of the last one of the assistant.

    Raises `DataError` for anything else. A message that only calls tools has an empty text.
    """
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Sequence) and all(isinstance(message, Mapping) for message in completion):
        content = next(
            (m.get("content") for m in reversed(completion) if m.get("role", "assistant") == "assistant"), ""
        )
        if content is None or isinstance(content, str):
            return content or ""
        if isinstance(content, Sequence):
            return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    raise DataError(Problem("completion", completion, "a text or a list of messages with 'role' and 'content'"))


def answer_of(text: str) -> str | None:
    r"""Return what is put forward as the answer: the last of \boxed{...}, <answer>...</answer> and "#### ..."."""
    found = [*_tagged(text), *_boxed(text)]
    mark = text.rfind("####")
    if mark >= 0:
        found.append((mark, text[mark + 4 :].split("\n", 1)[0]))
    if not found:
        return None
    answer = max(found)[1].strip()
    inner = _boxed(answer)
    return inner[-1][1].strip() if inner else answer


def _tagged(text: str) -> list[tuple[int, str]]:
    """Return (position, content) of the last <answer>...</answer>, or nothing."""
    found, start = [], None
    for tag in _TAG.finditer(text):
        if not tag[1]:
            start = tag.end()
        elif start is not None:
            found, start = [(start, text[start : tag.start()])], None
    return found


def _boxed(text: str) -> list[tuple[int, str]]:
    r"""Return (position, content) of every \boxed{...} with balanced braces; of nested ones the outer."""
    found, end = [], 0
    for match in re.finditer(r"\\f?boxed\s*\{", text):
        if match.start() < end:
            continue
        depth = 1
        for brace in re.finditer(r"\\.|[{}]", text[match.end() :], re.DOTALL):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if not depth:
                end = match.end() + brace.end()
                found.append((match.start(), text[match.end() : end - 1]))
                break
        else:
            break  # this one is never closed, and so are those within it
    return found


def fenced(text: str, languages: Sequence[str]) -> str | None:
    """Return the content of the last block between ``` lines in one of `languages` ("" for none named), or None."""
    last, opened = None, None
    for fence in _FENCE.finditer(text):
        if opened is None:
            opened = fence
        elif not fence[1]:
            if opened[1].lower() in languages:
                last = text[opened.end() : fence.start()]
            opened = None
    return last
