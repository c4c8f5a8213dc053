"""Model specs to and from plain data, TOML and JSON; every mistake in a bad spec is told at once, with its path."""

import json
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from math import isfinite
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import attrs
from cattrs import ClassValidationError, Converter, ForbiddenExtraKeysError, IterableValidationError
from cattrs.gen import make_dict_structure_fn, make_dict_unstructure_fn

from fastft.errors import Problem, SpecError, did_you_mean
from fastft.registry.semantics import semantic_problems
from fastft.registry.spec import Capabilities, Capability, CapabilityName, ModelSpec

# Where a mistake is: field names and list positions from the top of the spec.
Path_ = tuple[str | int, ...]


class _MismatchError(ValueError):
    """One value that does not fit its field; becomes a `Problem` once its path is known."""

    def __init__(self, value: object, expected: str, remedy: str = "") -> None:
        self.value, self.expected, self.remedy = value, expected, remedy
        super().__init__(expected)


def spec_from_dict(data: Mapping[str, Any], source: str = "") -> ModelSpec:
    """Make a spec from plain data.

    Raises SpecError with one Problem for every mistake: unknown and missing fields, wrong types, values that are not
    allowed, and claims that contradict each other.
    """
    if not isinstance(data, Mapping):
        raise SpecError(Problem(source or "spec", data, "a table of fields"))
    root = data["name"] if isinstance(data.get("name"), str) and data["name"] else source or "spec"
    data = {key: value for key, value in data.items() if key != "source"}
    mistakes: list[tuple[Path_, _MismatchError]] = []
    try:
        spec = _converter().structure(data, ModelSpec)
    except ClassValidationError as error:
        mistakes = list(_mistakes(error, (), data))
        spec = _structure_rest(data, mistakes)
    problems = [Problem(_dotted(root, path), bad.value, bad.expected, bad.remedy) for path, bad in mistakes]
    broken = [path for path, _ in mistakes]
    for path, problem in semantic_problems(spec) if spec is not None else ():
        if not any(path[: len(bad)] == bad for bad in broken):
            problems.append(attrs.evolve(problem, where=_dotted(root, path)))
    if problems or spec is None:
        raise SpecError(*problems)
    return attrs.evolve(spec, source=source)


def checked(spec: ModelSpec) -> ModelSpec:
    """Return a spec that was made in Python as if read from data; raises SpecError with every mistake in it."""
    return spec_from_dict(spec_to_dict(spec), spec.source)


def spec_to_dict(spec: ModelSpec) -> dict[str, Any]:
    """Return a spec as plain data, without fields that have their default value and without its source."""
    return _plain(_converter().unstructure(attrs.evolve(spec, source="")))


def load_spec_file(path: str | Path) -> ModelSpec:
    """Read a spec from a `.toml` or `.json` file; raises SpecError for a file that cannot be read or is wrong."""
    path = Path(path)
    if path.suffix not in (".toml", ".json"):
        raise SpecError(Problem("spec file", str(path), "a name that ends in .toml or .json"))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read: {error}") from error
    try:
        data = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except ValueError as error:
        raise SpecError(f"{path}: is not valid {path.suffix[1:].upper()}: {error}") from error
    return spec_from_dict(data, source=str(path))


def spec_to_text(spec: ModelSpec, kind: Literal["toml", "json"] = "toml") -> str:
    """Return the text of a data file that `load_spec_file` reads back to an equal spec."""
    data = spec_to_dict(spec)
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n" if kind == "json" else _toml(data)


# Converter ------------------------------------------------------------------------------------------------------------


@cache
def _converter() -> Converter:
    converter = Converter(forbid_extra_keys=True, detailed_validation=True)
    for kind, expected in ((str, "a string"), (bool, "true or false"), (int, "a whole number")):
        converter.register_structure_hook(kind, _strict(kind, expected))
    converter.register_structure_hook(float, _number)
    converter.register_structure_hook_func(lambda kind: get_origin(kind) is Literal, _choice)
    converter.register_structure_hook_func(lambda kind: _optional(kind) is not None, _make_optional(converter))
    converter.register_structure_hook_func(lambda kind: get_origin(kind) is tuple, _make_tuple(converter))
    structure_capability = _record(Capability, converter)
    converter.register_structure_hook(
        Capability,
        lambda value, kind: structure_capability({"status": value} if isinstance(value, str) else value, kind),
    )
    converter.register_structure_hook_func(lambda kind: get_origin(kind) is Mapping, _make_mapping(converter))
    converter.register_structure_hook_factory(attrs.has, lambda kind: _record(kind, converter))
    converter.register_unstructure_hook_factory(attrs.has, lambda kind: _record_out(kind, converter))
    converter.register_unstructure_hook_func(
        lambda kind: get_origin(kind) is tuple,
        lambda value: list(map(converter.unstructure, value)) if isinstance(value, list | tuple) else value,
    )
    converter.register_unstructure_hook(
        Capability, lambda value: {"status": value.status, "note": value.note} if value.note else value.status
    )
    converter.register_unstructure_hook(
        Capabilities, lambda value: {name: converter.unstructure(item) for name, item in value.items()}
    )
    return converter


def _record(kind: type, converter: Converter) -> Callable[[Any, Any], Any]:
    structure = make_dict_structure_fn(kind, converter, _cattrs_forbid_extra_keys=True)

    def hook(value: Any, asked: Any) -> Any:
        if not isinstance(value, Mapping):
            raise _MismatchError(value, f"a table with the fields {', '.join(_field_names(kind))}")
        return structure(value, asked)

    return hook


def _record_out(kind: type, converter: Converter) -> Callable[[Any], Any]:
    unstructure = make_dict_unstructure_fn(kind, converter, _cattrs_omit_if_default=True)
    # A wrong value goes out as it is, for `checked` to tell about.
    return lambda value: unstructure(value) if isinstance(value, kind) else value


def _strict(kind: type, expected: str) -> Callable[[Any, Any], Any]:
    def hook(value: Any, _: Any) -> Any:
        if type(value) is not kind:
            raise _MismatchError(value, expected)
        return value

    return hook


def _number(value: Any, _: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise _MismatchError(value, "a finite number")
    return float(value)


def _choice(value: Any, kind: Any) -> str:
    allowed = get_args(kind)
    if value not in allowed:
        raise _MismatchError(value, f"one of {', '.join(map(repr, allowed))}", did_you_mean(str(value), allowed))
    return value


def _optional(kind: Any) -> Any:
    """Return T of `T | None`, or None for any other type."""
    rest = [option for option in get_args(kind) if option is not NoneType]
    return rest[0] if NoneType in get_args(kind) and len(rest) == 1 else None


def _make_optional(converter: Converter) -> Callable[[Any, Any], Any]:
    # TOML has no null, so an empty string says "none" where a default has to be switched off.
    return lambda value, kind: None if value is None or value == "" else converter.structure(value, _optional(kind))


def _make_tuple(converter: Converter) -> Callable[[Any, Any], Any]:
    def hook(value: Any, kind: Any) -> tuple:
        if not isinstance(value, list | tuple):
            raise _MismatchError(value, "a list")
        return tuple(converter.structure(list(value), list[get_args(kind)[0]]))

    return hook


def _make_mapping(converter: Converter) -> Callable[[Any, Any], Any]:
    def hook(value: Any, kind: Any) -> Any:
        if not isinstance(value, Mapping):
            raise _MismatchError(value, "a table of capabilities")
        known = get_args(CapabilityName)
        unknown = {name for name in value if name not in known}
        try:
            found = converter.structure(dict(value), dict[str, get_args(kind)[1]])
        except IterableValidationError as error:
            inner = [*error.exceptions]
        else:
            inner = []
        if unknown:
            inner.append(ForbiddenExtraKeysError("", _KnownCapabilities, unknown))
        if inner:
            raise IterableValidationError("capabilities", inner, kind)
        return Capabilities.of(found)

    return hook


class _KnownCapabilities:
    """Stands for the table of capabilities where an unknown key is reported."""


# Mistakes -------------------------------------------------------------------------------------------------------------


def _mistakes(error: BaseException, path: Path_, data: Any) -> Iterator[tuple[Path_, _MismatchError]]:
    """Yield every single mistake in a tree of cattrs' exceptions, with its path."""
    if isinstance(error, ClassValidationError | IterableValidationError):
        with_notes, without = error.group_exceptions()
        for inner, note in with_notes:
            step = note.name if isinstance(error, ClassValidationError) else note.index
            if isinstance(inner, KeyError) and isinstance(error, ClassValidationError):
                yield (*path, step), _MismatchError(None, "a value", "this field is required")
            else:
                yield from _mistakes(inner, (*path, step), _child(data, step))
        for inner in without:
            yield from _mistakes(inner, path, data)
    elif isinstance(error, ForbiddenExtraKeysError):
        known = _field_names(error.cl)
        for name in sorted(error.extra_fields):
            remedy = did_you_mean(name, known) or "remove it"
            yield (*path, name), _MismatchError(_child(data, name), f"a known field ({', '.join(known)})", remedy)
    elif isinstance(error, _MismatchError):
        yield path, error
    else:
        raise error


def _field_names(kind: type) -> tuple[str, ...]:
    if kind is _KnownCapabilities:
        return get_args(CapabilityName)
    return tuple(name.name for name in attrs.fields(kind) if name.name != "source")


def _child(data: Any, step: str | int) -> Any:
    if isinstance(data, Mapping):
        return data.get(step)
    return data[step] if isinstance(data, list | tuple) and isinstance(step, int) and step < len(data) else None


def _dotted(root: str, path: Iterable[str | int]) -> str:
    return root + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)


def _structure_rest(data: Mapping[str, Any], mistakes: list[tuple[Path_, _MismatchError]]) -> ModelSpec | None:
    """Make a spec without the fields that are wrong, so that what is left can be checked for sense as well."""
    rest = json.loads(json.dumps(data, default=str))
    for path, _ in mistakes:
        holder, step = rest, path[-1]
        for depth, part in enumerate(path[:-1]):
            # An element that is no table makes its whole list unusable.
            if isinstance(step, int) and depth == len(path) - 2:
                step = part
                break
            holder = _child(holder, part)
        if isinstance(holder, dict):
            holder.pop(step, None)
    _fill_required(rest, ModelSpec)
    try:
        return _converter().structure(rest, ModelSpec)
    except ClassValidationError:
        return None


def _fill_required(data: Any, kind: type) -> None:
    """Put stand-ins where a required field is missing; whatever is said about them is left out of the report."""
    for item in attrs.fields(kind):
        inner = get_args(item.type)[0] if get_origin(item.type) is tuple else None
        if item.default is attrs.NOTHING and item.name not in data:
            data[item.name] = "standin" if inner is None else ["Standin"]
        for element in data.get(item.name) or () if inner is not None and attrs.has(inner) else ():
            if isinstance(element, dict):
                _fill_required(element, inner)


# Text -----------------------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """Turn tuples into lists and None (a default that was switched off) into an empty string, as TOML wants."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return "" if value is None else value


def _toml(data: Mapping[str, Any]) -> str:
    simple = [f"{_key(key)} = {_inline(value)}" for key, value in data.items() if not _is_table(value)]
    blocks = ["\n".join(simple)]
    for key, value in data.items():
        for table in value if _is_table(value) and isinstance(value, list) else [value] if _is_table(value) else []:
            mark = f"[[{_key(key)}]]" if isinstance(value, list) else f"[{_key(key)}]"
            blocks.append("\n".join([mark, *(f"{_key(name)} = {_inline(item)}" for name, item in table.items())]))
    return "\n\n".join(blocks) + "\n"


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def _key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else _inline(key)


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(key)} = {_inline(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)
