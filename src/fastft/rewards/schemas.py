"""Reward for JSON that fits a schema."""

import json
from collections.abc import Mapping
from typing import Any

from fastft.environment import installed
from fastft.errors import Problem, UsageError
from fastft.rewards.making import Reward, from_text
from fastft.rewards.text import answer_of, fenced


def json_schema(schema: Mapping[str, Any], *, valid_json: float = 0.0, name: str = "json_schema") -> Reward:
    """Return a reward: 1 for JSON that fits `schema`, `valid_json` for JSON that does not, and 0 for anything else.

    The JSON is the last block between ```json lines, else the answer (<answer>...</answer>), else the whole text. NaN
    and Infinity are no JSON. References to other documents are not followed. Needs the package jsonschema
    (`pip install 'fastft[rewards]'`).

    Raises `UsageError` if jsonschema is missing or the schema is not one.
    """
    if not installed("jsonschema"):
        raise UsageError(
            Problem("json_schema", "not installed", "the package jsonschema", "pip install 'fastft[rewards]'")
        )
    from jsonschema import SchemaError, validators
    from referencing import Registry

    kind = validators.validator_for(schema, default=validators.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        where = "/".join(map(str, error.absolute_path)) or "schema"
        raise UsageError(Problem(where, error.instance, "a JSON schema", error.message)) from error
    validator = kind(schema, registry=Registry())

    def score(text: str) -> float:
        try:
            value = json.loads(_candidate(text), parse_constant=_refuse)
            return 1.0 if validator.is_valid(value) else valid_json
        except (ValueError, RecursionError):
            return 0.0

    return from_text(name, score)


def _candidate(text: str) -> str:
    for part in (fenced(text, ("json",)), answer_of(text)):
        if part is not None:
            inner = fenced(part, ("json", ""))
            return part if inner is None else inner
    inner = fenced(text, ("",))
    return text if inner is None else inner


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
