"""Whatever users have, to rows that can be rendered; what is that already is not gone through a second time."""

import itertools
from collections.abc import Mapping
from typing import Any

from fastft.data.check import refuse_empty
from fastft.data.recognise import canonical, recognise
from fastft.data.rows import KINDS
from fastft.data.sources import load_rows


def canonical_rows(rows: Any, num_proc: int | None = None) -> Any:
    """Return rows of the kinds that can be rendered, from whatever `load_rows` takes; says what was recognised.

    An iterator is not read, and what is of such a kind already is not gone through. Raises `DataError`.
    """
    if not hasattr(rows, "__next__"):
        rows = load_rows(rows)
    if isinstance(rows, list | tuple):
        refuse_empty(rows)
    if not hasattr(rows, "column_names"):
        rows, first = _peek(rows)
        if not isinstance(first, Mapping) or _is_canonical(first):
            return rows
    elif hasattr(rows, "__len__") and (len(rows) == 0 or _is_plain(rows.features)):
        return rows
    recognised = recognise(rows)
    if recognised.kind not in ("messages", "prompt_completion", "text"):
        print(f"fastft: {recognised.statement}")
    return canonical(rows, recognised, num_proc=num_proc)


def _peek(rows: Any) -> tuple[Any, Any]:
    """Return the rows, all of them, and the first."""
    if isinstance(rows, list | tuple):
        return rows, rows[0]
    rows = iter(rows)
    first = next(rows, None)
    return itertools.chain(() if first is None else (first,), rows), first


def _is_canonical(row: Mapping[str, Any]) -> bool:
    """Return whether a row can be rendered, or is told best by the encoder why it cannot."""
    messages = next((row[name] for name in ("messages", "prompt") if name in row), None)
    if isinstance(messages, list) and messages and isinstance(messages[0], Mapping):
        return "role" in messages[0]
    return any(all(name in row for name in fields) for fields in KINDS.values())


def _is_plain(features: Any) -> bool:
    """Return whether all columns are texts, or messages of role and content alone: Arrow has filled in nothing."""
    columns = [features[name] for name in ("messages", "prompt", "completion", "text") if name in features]
    kinds = {name for name, fields in KINDS.items() if all(field in features for field in fields)}
    if len(kinds) != 1:
        return False
    for column in columns:
        fields = getattr(column, "feature", None)
        turns = isinstance(fields, Mapping) and set(fields) == {"role", "content"}
        if not turns and getattr(column, "dtype", None) not in ("string", "large_string"):
            return False
    return True
