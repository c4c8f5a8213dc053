"""Reads the data files that come with fastft, which its tests have checked, without loading cattrs for a look-up."""

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin

import attrs

from fastft.registry.spec import Capability, ModelSpec


def packaged_specs() -> tuple[ModelSpec, ...]:
    """Return the specs that come with fastft, by name; equal to what `load_spec_file` makes of the same files."""
    paths = sorted((Path(__file__).parent / "specs").glob("*.toml"))
    return tuple(
        attrs.evolve(build(ModelSpec, tomllib.loads(path.read_text("utf-8"))), source=str(path)) for path in paths
    )


def build(kind: Any, value: Any) -> Any:
    """Make a value of a field's type from data that is known to be right."""
    if attrs.has(kind):
        if kind is Capability and isinstance(value, str):
            return Capability(value)
        types = _field_types(kind)
        return kind(**{name: build(types[name], item) for name, item in value.items()})
    if get_origin(kind) is tuple:
        return tuple(build(get_args(kind)[0], item) for item in value)
    if get_origin(kind) is Mapping:
        return {name: build(get_args(kind)[1], item) for name, item in value.items()}
    if kind is float:
        return float(value)
    if type(None) in get_args(kind):
        return None if value == "" else build(get_args(kind)[0], value)
    return value


@cache
def _field_types(kind: type) -> dict[str, Any]:
    return {item.name: item.type for item in attrs.fields(kind)}
