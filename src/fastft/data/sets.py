"""Several evaluation sets, each by its name."""

from collections.abc import Mapping
from glob import has_magic
from operator import or_
from pathlib import Path
from typing import Any

from fastft.data.files import SUFFIXES
from fastft.data.sources import are_rows


def named_sets(train: Any, held: Any, name: str = "train") -> dict[str, Any]:
    """Return the data of a run by what errors call them: `name`, "eval", or of a dict of sets "eval 'NAME'" each."""
    parts = {"eval": held} if held is not None else {}
    if _are_sets(held):
        parts = {_called(part): rows for part, rows in held.items()}
    return {name: train, **parts}


def evaluated(made: Mapping[str, Any], held: Any) -> Any:
    """Return of what `named_sets` names that which is evaluated: one set, a dict of them by name, or None."""
    if not _are_sets(held):
        return made.get("eval")
    return {str(part): made[_called(part)] for part in held}


def _called(part: Any) -> str:
    return f"eval {str(part)!r}"


def _are_sets(held: Any) -> bool:
    """Say whether it is a dict of sets, and neither one row nor columns."""
    parts = list(held.values()) if isinstance(held, Mapping) else []
    sets = [_is_set(part) for part in parts]
    empty = [isinstance(part, list) and not part for part in parts]  # which is told as such
    return any(sets) and all(map(or_, sets, empty))


def _is_set(part: Any) -> bool:
    if isinstance(part, str | Path):
        return Path(part).suffix.lower() in SUFFIXES or has_magic(str(part)) or Path(part).exists()
    return hasattr(part, "column_names") or hasattr(part, "__next__") or are_rows(part)
