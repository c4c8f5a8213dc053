"""Is every row whole, and is there something to learn in it? Asked before training, answered with row numbers."""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from attrs import evolve

from fastft.data import columns
from fastft.data.kinds import CONTENT_KEYS, ROLE_KEYS
from fastft.errors import DataError, Problem, did_you_mean, short

SHOWN = 10
LONGEST = 4_000_000  # characters of one text: a million tokens or so, more than a model can take
_EMPTY = "Remove the row or give it text."
_CALL = "Write it as 'tool_calls': [{'type': 'function', 'function': {'name': ..., 'arguments': {...}}}]."


def check_tokenised(dataset: Any) -> None:
    """Refuse a data set of token ids that is empty or has rows without tokens or without anything to learn.

    Raises `DataError`. A stream (without length) is not read.
    """
    if not hasattr(dataset, "__len__"):
        return
    refuse_empty(dataset)
    problems = []
    for index in columns.suspects(dataset):
        row = dataset[index]
        ids = row["input_ids"] or ()
        problem = row_problem(f"row {index}", ids, row.get("labels", ids) or ())
        problems += [problem] if problem else []
    refuse(problems)


def refuse_empty(dataset: Sequence[Any], name: str = "") -> None:
    """Raise `DataError` for a data set without rows."""
    if len(dataset) == 0:
        raise DataError(
            Problem(f"{name} data".lstrip(), "0 rows", "at least one row", "Check the path or the filter it came from.")
        )


def row_problem(where: str, ids: Sequence[int], labels: Sequence[int]) -> Problem | None:
    """Return what is wrong with a tokenised row: no tokens, labels of another length, or nothing to learn."""
    if len(ids) == 0:
        return Problem(f"{where}, input_ids", [], "at least one token", "Remove the row or give it text.")
    if len(labels) != len(ids):
        return Problem(f"{where}, labels", f"{len(labels)} labels", f"as many as tokens ({len(ids)})")
    if all(label == -100 for label in labels[1:]):
        remedy = "The first token is never predicted; remove the row, or train on more of it (train_on='all')."
        return Problem(
            f"{where}, labels", "nothing to learn", "at least one label that is not -100 after the first token", remedy
        )
    return None


def refuse_unlearnable(
    lost: int, total: int, limit: int | None, allowed: float, name: str = "", rows: Iterable[Problem] = ()
) -> None:
    """Raise `DataError` if more than a share `allowed` of `total` rows has nothing to learn within `limit` tokens.

    `rows`: what is wrong with each of them, where that is known.
    """
    if lost <= allowed * total:
        return
    mistakes = Mistakes()
    for problem in rows:
        mistakes.add([problem])
    share = lost / total
    remedy = "Raise max_length."
    if lost < total:
        remedy = f"Raise max_length, or leave them out with max_unlearnable={min(1.0, share + 0.005):.2f}."
    got = f"{lost} of {total} ({share:.2%})"
    where = f"{name}rows with nothing left to learn within max_length={limit}"
    raise DataError(*mistakes.told(), Problem(where, got, f"at most {allowed:.2%}", remedy))


def nothing_left(where: str, size: int, limit: int | None) -> Problem:
    """Return the problem of a row of `size` tokens that has nothing to learn among the first `limit`."""
    remedy = "Cutting left no token that bears loss: raise max_length."
    got = f"nothing to learn, cut from {size} tokens"
    return Problem(f"{where}, labels", got, f"some within max_length={limit}", remedy)


def refuse(problems: Iterable[Problem | str]) -> None:
    """Raise `DataError` with the first problems and the number of the others, if there are any."""
    mistakes = Mistakes()
    for problem in problems:
        mistakes.add([problem])
    mistakes.refuse()


class Mistakes:
    """The mistakes of a whole set: all are counted, and the first `SHOWN` are kept, however many rows there are."""

    def __init__(self) -> None:
        self.kept: list[Problem | str] = []
        self.rows = 0
        self.count = 0
        self._unseen = 0

    def add(self, problems: Sequence[Problem | str]) -> None:
        """Count the mistakes of one row; a row without mistakes does not count."""
        if not problems:
            return
        self.rows += 1
        self.count += len(problems)
        self._unseen += len(self.kept) >= SHOWN
        self.kept.extend(problems[: SHOWN - len(self.kept)])

    def refuse(self, total: int | None = None, also: Sequence[Problem | str] = ()) -> None:
        """Raise `DataError` with the first mistakes and the number of all, if there are any; `total` rows were seen.

        `also` is said besides: it is about all rows, and none of them.
        """
        if self.count:
            raise DataError(*self.told(total), *also)

    def told(self, total: int | None = None) -> list[Problem | str]:
        """Return the first mistakes and, where there are more, a line with their number."""
        hidden = self.count - len(self.kept)
        more = [f"and {self._unseen:,} more row{'s' * (self._unseen != 1)}"] if self._unseen else []
        if hidden and not self._unseen:
            more = [f"and {hidden:,} more mistakes in these rows"]
        if more and total is not None:
            more = [f"{more[0]}: {self.rows:,} of {total:,} rows cannot be used ({self.count:,} mistakes)"]
        return [*self.kept, *more]


def text_problem(where: str, text: Any, *, may_be_empty: bool = False, longest: int | None = LONGEST) -> Problem | None:
    """Return what is wrong with a text: its type, nothing in it, too long, or characters that UTF-8 has not."""
    if not isinstance(text, str):
        return Problem(where, short(text), "a text (str)", _remedy_for(text))
    if not may_be_empty and (not text or text.isspace()):
        return Problem(where, short(text), "a text that is not empty", _EMPTY)
    if longest is not None and len(text) > longest:
        remedy = "Cut it into parts; fastft.text_dataset cuts documents into chunks."
        return Problem(where, short(text), f"at most {longest:,} characters", remedy)
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            found = short(text[max(0, error.start - 10) : error.end + 10])
            remedy = f"Character {error.start} is half of a surrogate pair: the text was cut or decoded wrongly."
            return Problem(where, found, "characters that UTF-8 has", remedy)
    return None


def _remedy_for(value: Any) -> str:
    """Return what to do about a value that is no text."""
    if value is None:
        return _EMPTY
    if isinstance(value, float) and value != value:
        return "NaN is an empty cell of a table: remove the row, or fill it (fillna('') in pandas)."
    if isinstance(value, bytes):
        return "Decode it: value.decode('utf-8')."
    return "Convert it to text." if isinstance(value, int | float) else ""


def message_problems(where: str, messages: Any, keys: tuple[str, str] = ("role", "content")) -> list[Problem]:
    """Return every mistake of a list of messages, whose role and content are under `keys`.

    Content is a text or a list of parts (`{"type": ...}`). It may be missing where a message has `tool_calls` or
    thinking, and empty in a system message or a tool's result.
    """
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        expected = f"a list of {{{keys[0]!r}, {keys[1]!r}}}"
        return [Problem(where, short(messages), expected, _EMPTY if messages is None else "")]
    if not messages:
        return [Problem(where, [], "at least one message", "Remove the row.")]
    problems = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            expected = f"a dict with {keys[0]!r} and {keys[1]!r}"
            problems.append(Problem(f"{where}[{number}]", short(message), expected))
            continue
        if message.get("function_call"):
            value = short(message["function_call"])
            problems.append(Problem(f"{where}[{number}].function_call", value, "calls under 'tool_calls'", _CALL))
            continue
        role, content = message.get(keys[0]), message.get(keys[1])
        if type(role) is not str or not role:
            problems.append(_role_problem(f"{where}[{number}]", message, keys))
        # the plain case first: this runs for every message of a set
        plain = type(content) is str and content.isascii() and len(content) <= LONGEST
        if not plain or not content or content.isspace():
            problem = _content_problem(f"{where}[{number}].{keys[1]}", message, keys)
            if problem:
                problems.append(problem)
    return problems


def repeated_answers(where: str, messages: Sequence[Mapping[str, Any]], role_key: str = "role") -> list[Problem]:
    """Return a problem for every assistant turn that follows on another one; `messages` have standard roles."""
    remedy = "Join them, or put the user's turn between them; alternate=False takes both, where the template does."
    return [
        Problem(f"{where}[{number}].{role_key}", "assistant", f"another role than in [{number - 1}]", remedy)
        for number in range(1, len(messages))
        if messages[number]["role"] == "assistant" == messages[number - 1]["role"]
    ]


def _role_problem(where: str, message: Mapping[str, Any], keys: tuple[str, str]) -> Problem:
    role = message.get(keys[0])
    remedy = "" if keys[0] in message else _without(keys[0], message, keys)
    return Problem(f"{where}.{keys[0]}", short(role), "a text such as 'user' or 'assistant'", remedy)


def _without(key: str, message: Mapping[str, Any], keys: tuple[str, str]) -> str:
    """Return what to say of a message without `key`, one of the `keys` of role and content: the fields it has."""
    fields = sorted(map(str, message))
    meant = next((f": did you mean {key!r} by {name!r}?" for name in fields if _may_be(name, key, keys)), ".")
    return f"The message has the fields {short(fields)} and no {key!r}{meant}"


def _may_be(name: str, key: str, keys: tuple[str, str]) -> bool:
    """Return whether a field of a message may hold what belongs under `key`: by a name like it, or a usual one."""
    usual = ROLE_KEYS if key == keys[0] else CONTENT_KEYS
    return name not in keys and (name in usual or bool(did_you_mean(name.strip().lower(), [key])))


def _content_problem(where: str, message: Mapping[str, Any], keys: tuple[str, str]) -> Problem | None:
    """Return what is wrong with the content of one message."""
    role, content = message.get(keys[0]), message.get(keys[1])
    said = any(message.get(name) for name in ("tool_calls", "reasoning_content", "thinking", "reasoning"))
    if content is None and said:
        return None
    if isinstance(content, list | tuple):
        return _parts_problem(where, content)
    problem = text_problem(where, content, may_be_empty=said or role in ("system", "developer", "tool"))
    if problem and keys[1] not in message:
        told = _without(keys[1], message, keys)
        return evolve(problem, remedy=told if told.endswith("?") else f"{told} {problem.remedy}")
    if problem and isinstance(content, str) and role == "assistant" and not content.strip():
        return evolve(problem, expected="an answer that is not empty", remedy="Remove the turn, or the row.")
    return problem


def _parts_problem(where: str, parts: Sequence[Any]) -> Problem | None:
    """Return what is wrong with a content list: each part is a dict with a type, a text part has text."""
    if not parts:
        return Problem(where, [], "at least one part", _EMPTY)
    for number, part in enumerate(parts):
        if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
            remedy = "Such as {'type': 'text', 'text': ...}."
            return Problem(f"{where}[{number}]", short(part), "a dict with a 'type'", remedy)
        if part["type"] == "text":
            problem = text_problem(f"{where}[{number}].text", part.get("text"))
            if problem:
                return problem
    return None


def whole_number(value: Any) -> bool:
    """Return whether a value is a whole number, and no truth value."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def named(problem: Problem | str, name: str) -> Problem | str:
    """Return a problem of some rows with the name of the data they are in: "row 3" is "eval row 3"."""
    about_rows = isinstance(problem, Problem) and problem.where.startswith(("row", "data", "columns"))
    return evolve(problem, where=f"{name} {problem.where}") if about_rows else problem


def refuse_overlong(dataset: Any, limit: int) -> None:
    """Raise `DataError` naming the rows of a `datasets.Dataset` with more than `limit` tokens."""
    sizes = columns.lengths(dataset)
    remedy = "Raise max_length, or cut such rows with overlong='truncate'."
    refuse(
        Problem(f"row {index}", f"{sizes[index]} tokens", f"at most max_length={limit}", remedy)
        for index in (sizes > limit).nonzero()[0].tolist()
    )


def overlong_problems(overlong: Any) -> list[Problem]:
    """Return what is wrong with an `overlong`, which says what becomes of rows that are too long."""
    allowed = ("refuse", "truncate")
    remedy = did_you_mean(str(overlong), allowed)
    return [] if overlong in allowed else [Problem("overlong", overlong, "'refuse' or 'truncate'", remedy)]
