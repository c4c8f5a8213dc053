"""What rows are, said in one line, and their canonical form: nothing is guessed, nothing dropped."""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

from fastft.data.change import change_rows, turns_feature
from fastft.data.check import refuse_empty
from fastft.data.convert import CHAT_KEYS, convert_row, present
from fastft.data.kinds import (
    CONTENT_KEYS,
    CONVERSATIONS,
    EXACT,
    KNOWN,
    LOOSE,
    ROLE_KEYS,
    ROLE_OF,
    ROLES,
    SYSTEM_COLUMNS,
    Kind,
    Recognised,
)
from fastft.errors import DataError, Problem, did_you_mean, short

BESIDE = ("tools", "chat_template_kwargs")  # columns of a conversation whose keys differ from row to row
SAMPLE = 100  # rows looked at; canonical looks at all of them
Fields = dict[str, str]


def recognise(rows_or_columns: Any, *, stream: bool = False) -> Recognised:
    """Return what rows are, by their columns and the first `SAMPLE` of them.

    Takes a list of dicts, a `datasets.Dataset` or `IterableDataset`, or a list of column names. Names that are used for
    other things too (question and answer, say) count only where none of the usual ones is there. `stream`: the list
    holds only the first rows.

    Raises `DataError` naming the columns where nothing is recognised or more than one kind is.
    """
    columns, sample, size = _look(rows_or_columns)
    size = -1 if stream else size
    found = _candidates(columns, sample)
    _refuse_turns(columns, found)
    if not found:
        value, expected = short(sorted(columns), 200), f"columns that are known: {KNOWN}"
        raise DataError(Problem("columns", value, expected, _other_names(columns)))
    if len(found) > 1:
        kinds = "; ".join(_statement(kind, fields, _keys(kind, fields, sample), None) for kind, fields in found)
        remedy = f"Keep the columns of one: fastft.load_rows(rows, columns={list(found[0][1].values())})."
        raise DataError(
            Problem("columns", short(sorted(columns), 200), f"columns of one kind; these could be {kinds}", remedy)
        )
    kind, fields = found[0]
    _refuse_unpaired(kind, columns, sample)
    keys = _keys(kind, fields, sample)
    statement = _statement(kind, fields, keys, size)
    if kind == "messages" and _roles_renamed(fields["messages"], keys or CHAT_KEYS, sample):
        kind, odd = "sharegpt", _odd_roles(fields["messages"], keys or CHAT_KEYS, sample)
        statement = _statement("messages" if odd else kind, fields, keys, size)
        statement += f"; {', '.join(f'role {name!r} read as {meant!r}' for name, meant in odd.items())}" if odd else ""
    return Recognised(kind, fields, statement, None if size < 0 else size, keys)


def canonical(rows: Any, recognised: Recognised, *, alternate: bool = True, num_proc: int | None = None) -> Any:
    """Return rows in their canonical form: `messages` (with `tools`), `prompt` and `completion`, `text`, whole
    conversations under `chosen` and `rejected`, or `input_ids`; other columns are kept.

    * A list gives a list; messages that are canonical already are the same objects.
    * A `Dataset` gives a mapped one, cached like any other; messages are kept as JSON, so that a message has the keys
      it was written with and none that Arrow filled in. Messages that hold images or sound keep their type.
    * An `IterableDataset` gives one that converts as it is read.

    `alternate` refuses two assistant turns in a row. Raises `DataError` with the first `check.SHOWN` mistakes and the
    number of all rows that cannot be used; of a stream, when the row is reached.
    """
    if recognised.kind == "input_ids":
        return rows
    columns, features = getattr(rows, "column_names", None), getattr(rows, "features", None)
    change = partial(convert_row, recognised=recognised, features=features, alternate=alternate)
    made = _features(recognised, features) if columns is not None and hasattr(rows, "__len__") else None
    removed = [column for column in recognised.fields.values() if column not in _written(recognised)]
    return change_rows(rows, change, made, removed, num_proc)


def _written(recognised: Recognised) -> tuple[str, ...]:
    """Return the columns that the canonical form consists of."""
    if recognised.kind in ("messages", "sharegpt", "instruction"):
        return ("messages",)
    if recognised.kind == "preference":
        return ("chosen", "rejected")
    return tuple(EXACT[recognised.kind][0])


def _features(recognised: Recognised, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the features of the canonical form of a data set with the features `given`."""
    from datasets import Json, Value

    written = _written(recognised)
    used = {*recognised.fields.values(), *written, *BESIDE}
    made = {name: feature for name, feature in given.items() if name not in used}
    texts = recognised.kind == "text" or (recognised.kind == "prompt_completion" and recognised.keys is None)
    for column in written:
        source = given.get(recognised.fields.get(column, column))
        made[column] = Value("string") if texts else turns_feature(source, recognised.keys or CHAT_KEYS)
    return {**made, **{name: Json() for name in BESIDE if name in given}}


def _look(rows: Any) -> tuple[list[str], list[Mapping[str, Any]], int]:
    """Return columns, the first rows, and the number of rows (-1: a stream, -2: column names alone)."""
    if hasattr(rows, "column_names") and not isinstance(rows, Mapping):
        size = len(rows) if hasattr(rows, "__len__") else -1
        if size >= 0:
            refuse_empty(rows)
        features = rows.features
        plain = rows.with_format(None) if size >= 0 else rows
        sample = [dict(row) for row in islice(iter(plain), SAMPLE)]
        if features is not None:
            sample = [{name: present(value, features.get(name)) for name, value in row.items()} for row in sample]
        return list(rows.column_names or dict.fromkeys(name for row in sample for name in row)), sample, size
    if isinstance(rows, Mapping | str | bytes) or not isinstance(rows, Sequence):
        remedy = "fastft.load_rows(source) reads files, names and generators."
        raise DataError(Problem("rows", short(type(rows).__name__), "a list of rows, or a datasets.Dataset", remedy))
    refuse_empty(rows)
    if all(isinstance(name, str) for name in rows):
        return list(rows), [], -2
    sample = [row for row in rows[:SAMPLE] if isinstance(row, Mapping)]
    if not sample:
        lists = isinstance(rows[0], list | tuple)
        remedy = "[{'messages': turns} for turns in rows] makes rows of lists of turns." if lists else ""
        raise DataError(Problem("row 0", short(rows[0]), "a dict", remedy or f"A row has {KNOWN}."))
    # the first row that is of a kind decides, unless one could be of several; rows of another kind are told one by one
    kinds = [len(_candidates(list(row), [row])) for row in sample]
    decides = next((row for row, count in zip(sample, kinds, strict=True) if count == max(*kinds, 1)), None)
    if decides is None:
        return list(dict.fromkeys(str(name) for row in sample for name in row)), sample, len(rows)
    return [str(name) for name in decides], sample, len(rows)


def _other_names(columns: Sequence[str]) -> str:
    """Return what to do about columns of no known kind: the names that may be meant."""
    plain = {name: name.strip().lower() for name in columns}
    used = {name for _, fields in _candidates(list(plain.values()), []) for name in fields.values()}
    renamed = {name: meant for name, meant in plain.items() if meant in used and meant != name}
    if renamed:
        return f"Names are compared letter by letter: rename the columns, as in {renamed}."
    known = [name for kind in EXACT.values() for fields in kind for name in fields.values()] + list(CONVERSATIONS)
    hint = next((hint for name in columns for hint in [did_you_mean(name, known)] if hint), "")
    return hint or "Rename the columns, or merge them: fastft.to_sharegpt(rows, merged_prompt='{a} {b}', ...)."


def _candidates(columns: Sequence[str], sample: Sequence[Mapping[str, Any]]) -> list[tuple[Kind, Fields]]:
    """Return every kind that the columns could be, with its fields."""
    found: list[tuple[Kind, Fields]] = []
    for column in CONVERSATIONS:
        if column in columns and _is_conversation(column, sample):
            found.append(("messages", _beside({"messages": column}, columns)))
    found.extend(_matches(EXACT, columns))
    return found or _matches(LOOSE, columns)


def _matches(table: Mapping[Kind, tuple[Fields, ...]], columns: Sequence[str]) -> list[tuple[Kind, Fields]]:
    found: dict[tuple[Kind, frozenset[str]], Fields] = {}
    for kind, alternatives in table.items():
        for wanted in alternatives:
            needed = frozenset(column for part, column in wanted.items() if not part.endswith("?"))
            if needed <= set(columns):
                fields = {part.rstrip("?"): column for part, column in wanted.items() if column in columns}
                fields = _beside(fields, columns) if kind == "instruction" else fields
                if len(fields) > len(found.get((kind, needed), {})):
                    found[kind, needed] = fields
    return [(kind, fields) for (kind, _), fields in found.items()]


def _beside(fields: Fields, columns: Sequence[str]) -> Fields:
    """Return the fields with the columns of a system message and of earlier turns that stand beside them."""
    system = next((column for column in SYSTEM_COLUMNS if column in columns), None)
    made = {**fields, **({"system": system} if system else {})}
    return {**made, "history": "history"} if "instruction" in fields and "history" in columns else made


def _is_conversation(column: str, sample: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a column holds lists of turns, or could: it is empty or broken in all rows seen."""
    values = [row[column] for row in sample if row.get(column) is not None]
    if column == "messages" or not values:
        return True
    lists = [value for value in values if isinstance(value, list | tuple) or _json_list(value)]
    return any(not value or _json_list(value) or isinstance(value[0], Mapping) for value in lists)


def _json_list(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("[")


def _turns_of(column: str, sample: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the turns in a column of the first rows, broken ones left out."""
    turns = []
    for row in sample:
        value = row.get(column)
        if _json_list(value):
            try:
                value = json.loads(value)
            except ValueError:
                continue
        if isinstance(value, list | tuple):
            turns.extend(turn for turn in value if isinstance(turn, Mapping))
    return turns


def _keys(kind: Kind, fields: Fields, sample: Sequence[Mapping[str, Any]]) -> tuple[str, str] | None:
    """Return the names of role and content in turns; None where a kind's parts are texts."""
    if kind in ("text", "input_ids", "instruction"):
        return None
    column = fields.get("messages") or fields.get("completion") or fields["chosen"]
    turns = _turns_of(column, sample)
    first = next((row[column] for row in sample if row.get(column) is not None), None)
    if kind != "messages" and (not turns or (isinstance(first, str) and not _json_list(first))):
        return None
    if not turns and column == "conversations" and not sample:
        return ("from", "value")
    for turn in turns:
        role = next((key for key in ROLE_KEYS if isinstance(turn.get(key), str)), None)
        content = next((key for key in CONTENT_KEYS if key in turn and key != role), None)
        if role and content:
            return role, content
    return CHAT_KEYS


def _roles_renamed(column: str, keys: tuple[str, str], sample: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the turns must be renamed: other keys, or other names of the usual roles, all of them known."""
    if keys != CHAT_KEYS:
        return True
    names = {turn["role"] for turn in _turns_of(column, sample) if isinstance(turn.get("role"), str)}
    others = {ROLE_OF.get(name.lower(), "") for name in names - set(ROLES)}
    return bool(others & {"user", "assistant", "system"}) and "" not in others


def _odd_roles(column: str, keys: tuple[str, str], sample: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the usual roles in other letters ("User") with what they are read as; empty where others are renamed."""
    names = {turn["role"] for turn in _turns_of(column, sample) if isinstance(turn.get("role"), str)}
    if keys != CHAT_KEYS or not all(name.lower() in ROLES for name in names):
        return {}
    return {name: name.lower() for name in sorted(names - set(ROLES))}


def _refuse_turns(columns: Sequence[str], found: Sequence[tuple[Kind, Fields]]) -> None:
    """Raise `DataError` for rows that are the turns of one conversation: their contents are no texts of their own."""
    if all(fields.get("text") == "content" for _, fields in found) and (
        {"role", "content"} <= set(columns) or {"from", "value"} <= set(columns)
    ):
        remedy = "The turns of a conversation are one row: [{'messages': turns}]."
        raise DataError(Problem("columns", sorted(columns), "rows that are no single turns", remedy))


def _refuse_unpaired(kind: Kind, columns: Sequence[str], sample: Sequence[Mapping[str, Any]]) -> None:
    """Raise `DataError` for answers that carry a verdict: half of them are there to be avoided."""
    judged = [row["label"] for row in sample if isinstance(row.get("label"), bool)]
    if kind == "prompt_completion" and judged:
        remedy = (
            "Keep the good ones and drop the column: rows.filter(lambda row: row['label']).remove_columns('label')."
        )
        expected = "answers that are all to be learnt; with 'label' some are marked as bad"
        raise DataError(Problem("columns", sorted(columns), expected, remedy))


_NAMES = {
    "messages": "conversations",
    "sharegpt": "ShareGPT conversations",
    "prompt_completion": "prompts with completions",
    "instruction": "instructions with answers",
    "preference": "preference pairs",
    "text": "plain text",
    "input_ids": "token ids",
}


def _statement(kind: Kind, fields: Fields, keys: tuple[str, str] | None, size: int | None) -> str:
    """Return one line: what it is, in which columns, how many rows."""
    names = [repr(column) for column in fields.values()]
    listed = f"column {names[0]}" if len(names) == 1 else f"columns {', '.join(names[:-1])} and {names[-1]}"
    if keys:
        listed += f", {'/'.join(keys)}"
    if kind == "instruction":
        listed += ", a user's and an assistant's turn each"
    text = f"{_NAMES[kind]} ({listed})"
    if size is None or size == -2:
        return text
    return f"{text}, a stream" if size == -1 else f"{text}, {size:,} {'row' if size == 1 else 'rows'}"
