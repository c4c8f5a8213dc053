"""From a name, a config or a folder to the spec of its model family. Needs no torch.

`fastft.registry.convert` (cattrs) is imported where a spec from outside has to be checked, so that a look-up is quick.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from attrs import evolve, frozen

from fastft.errors import Problem, SpecError
from fastft.registry.packaged import packaged_specs
from fastft.registry.spec import ModelSpec, Variant

ENTRY_POINT_GROUP = "fastft.specs"
UNREWRITTEN = "a model of an unknown architecture still trains, through transformers and PEFT, only unrewritten"


@frozen
class Match:
    """A spec and, in words, by what it was found."""

    spec: ModelSpec
    by: str


# The registry's only state: what `register` was given in this process. The rest is data files and entry points. It is
# an immutable tuple and is replaced as a whole, so a reader in another thread sees either the old one or the new one.
_registered: tuple[ModelSpec, ...] = ()


def specs() -> tuple[ModelSpec, ...]:
    """Return every known spec: those that come with fastft, those of entry points, and the registered ones."""
    return overlay(_packaged(), _registered)


def register(spec: ModelSpec, *, replace: bool = False) -> ModelSpec:
    """Make a spec known to this process and return it.

    Raises SpecError for a malformed spec, and for a name or model type that is taken unless `replace=True`; then the
    specs it clashes with are no longer known.
    """
    global _registered
    from fastft.registry.convert import checked

    spec = checked(evolve(spec, source=spec.source or "register"))
    if not replace:
        _refuse_clashes((*specs(), spec), "pass replace=True to put yours in its place")
    _registered = overlay(_registered, (spec,))
    return spec


def resolve(target: Any, *, extra: Iterable[ModelSpec] = ()) -> ModelSpec:
    """Return the spec for a model.

    `target` is the name of a spec, a model type, a model id, a local folder with `config.json` or
    `adapter_config.json`, a config as a mapping, or any object with a `model_type`. A name is looked up in this order:
    spec name, model type, local folder, name pattern (the most specific one). `extra` holds specs that take precedence
    for this one call. Where a variant of the family is recognised by name, the result has its title and chat format.

    Raises SpecError when nothing is known of the target, or when its folder cannot be read.
    """
    return match(target, extra=extra).spec


def find(target: Any, *, extra: Iterable[ModelSpec] = ()) -> ModelSpec | None:
    """Return what `resolve` returns, or None for an architecture that is not known."""
    found = _look_up(target, overlay(specs(), tuple(extra)), ())
    return found.spec if found else None


def match(target: Any, *, extra: Iterable[ModelSpec] = ()) -> Match:
    """Return the spec for a model and by what it was found; arguments and errors as `resolve`."""
    known = overlay(specs(), tuple(extra))
    found = _look_up(target, known, ())
    if found is None:
        raise SpecError(_unknown(target, known))
    return found


# Where specs come from ------------------------------------------------------------------------------------------------


@cache
def _packaged() -> tuple[ModelSpec, ...]:
    """Return the specs that are installed: fastft's own data files and those of entry points."""
    found = [*packaged_specs()]
    for name, value, load in _entry_points():
        found += _from_entry_point(f"entry point {name} = {value}", load)
    _refuse_clashes(found, "uninstall or rename one of them")
    return tuple(found)


def _entry_points() -> list[tuple[str, str, Callable[[], Any]]]:
    from importlib.metadata import entry_points

    return [(entry.name, entry.value, entry.load) for entry in entry_points(group=ENTRY_POINT_GROUP)]


def _from_entry_point(source: str, load: Callable[[], Any]) -> list[ModelSpec]:
    from fastft.registry.convert import checked, load_spec_file

    try:
        given = load()
    except (ImportError, AttributeError) as error:
        raise SpecError(
            f"{source}: cannot be loaded: {error}. Repair or uninstall the package it belongs to"
        ) from error
    items = [given] if isinstance(given, ModelSpec | str | os.PathLike) else given
    if not isinstance(items, Iterable):
        raise SpecError(Problem(source, given, "a ModelSpec, an iterable of them, or the path of a data file"))
    found = []
    for item in items:
        if isinstance(item, str | os.PathLike):
            item = load_spec_file(item)
        elif not isinstance(item, ModelSpec):
            raise SpecError(Problem(source, item, "a ModelSpec or the path of a data file"))
        found.append(checked(evolve(item, source=item.source or source)))
    return found


def _clash(one: ModelSpec, other: ModelSpec) -> str:
    """Say what two specs both claim, or return an empty string."""
    if one.name == other.name:
        return f"name {one.name!r}"
    shared = [kind for kind in one.model_types if kind in other.model_types]
    return f"model type {shared[0]!r}" if shared else ""


def overlay(below: tuple[ModelSpec, ...], above: tuple[ModelSpec, ...]) -> tuple[ModelSpec, ...]:
    """Join two sets of specs; where they clash, the upper one's stay."""
    if not above:
        return below
    return (*(spec for spec in below if not any(_clash(spec, other) for other in above)), *above)


def _refuse_clashes(found: Iterable[ModelSpec], remedy: str) -> None:
    seen: list[ModelSpec] = []
    problems = []
    for spec in found:
        for other in seen:
            if shared := _clash(spec, other):
                owner = f"{other.name!r} has it already ({other.source}); {remedy}"
                problems.append(Problem(f"spec {spec.name!r} ({spec.source})", shared, "one that is free", owner))
        seen.append(spec)
    if problems:
        raise SpecError(*problems)


# Looking up -----------------------------------------------------------------------------------------------------------


def _look_up(target: Any, known: tuple[ModelSpec, ...], seen: tuple[Path, ...]) -> Match | None:
    if isinstance(target, str | os.PathLike):
        return _by_text(os.fspath(target), known, seen)
    if isinstance(target, Mapping):
        return _by_config(target.get("model_type"), target.get("_name_or_path"), known)
    return _by_config(getattr(target, "model_type", None), getattr(target, "_name_or_path", None), known, target)


def _by_text(text: str, known: tuple[ModelSpec, ...], seen: tuple[Path, ...]) -> Match | None:
    for spec in known:
        if text == spec.name:
            return Match(spec, f"spec name {text!r}")
    for spec in known:
        if text in spec.model_types:
            return Match(spec, f"model type {text!r}")
    folder = Path(text).expanduser()
    return _by_folder(folder, known, seen) if folder.is_dir() else _by_pattern(text, known)


def _by_folder(folder: Path, known: tuple[ModelSpec, ...], seen: tuple[Path, ...]) -> Match | None:
    config, adapter = folder / "config.json", folder / "adapter_config.json"
    if config.is_file():
        data = _read(config)
        found = _by_config(data.get("model_type"), data.get("_name_or_path") or folder.name, known)
        return evolve(found, by=f"{found.by} in {config}") if found else None
    if not adapter.is_file():
        raise SpecError(
            Problem(str(folder), sorted(os.listdir(folder))[:8], "a config.json or an adapter_config.json in it")
        )
    base = _read(adapter).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise SpecError(Problem(f"{adapter}: base_model_name_or_path", base, "the name or folder of the base model"))
    if folder.resolve() in seen:
        raise SpecError(Problem(f"{adapter}: base_model_name_or_path", base, "a model that is not this adapter itself"))
    beside = folder / base
    found = _by_text(str(beside) if beside.is_dir() else base, known, (*seen, folder.resolve()))
    return evolve(found, by=f"{found.by}, the base model of {folder}") if found else None


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpecError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise SpecError(Problem(str(path), data, "a JSON object"))
    return data


def _by_config(kind: Any, name: Any, known: tuple[ModelSpec, ...], given: Any = None) -> Match | None:
    if not isinstance(kind, str) or not kind:
        what = "config" if given is None else f"target of type {type(given).__name__}"
        raise SpecError(Problem(f"{what}: model_type", kind, "a model id, a folder, or a config with a model_type"))
    for spec in known:
        if kind in spec.model_types:
            hits = _hits(spec, name) if isinstance(name, str) else []
            return Match(_as_variant(spec, max(hits, key=_rank)[1] if hits else None), f"model type {kind!r}")
    return None


def _by_pattern(text: str, known: tuple[ModelSpec, ...]) -> Match | None:
    hits = [(*hit, spec) for spec in known for hit in _hits(spec, text)]
    if not hits:
        return None
    # Of equally specific patterns the last wins, so that an added spec goes before one that came with fastft.
    pattern, variant, spec = max(reversed(hits), key=_rank)
    return Match(_as_variant(spec, variant), f"name pattern {pattern!r}")


def _rank(hit: tuple) -> int:
    """Say how specific a pattern is: how many of its characters stand for themselves."""
    return sum(letter not in "*?" for letter in hit[0])


def _hits(spec: ModelSpec, name: str) -> list[tuple[str, Variant | None]]:
    if any(_fits(name, pattern) for pattern in spec.not_patterns):
        return []
    pairs: list[tuple[str, Variant | None]] = [(pattern, None) for pattern in spec.patterns]
    pairs += [(pattern, variant) for variant in spec.variants for pattern in variant.patterns]
    return [pair for pair in pairs if _fits(name, pair[0])]


def _fits(name: str, pattern: str) -> bool:
    name, pattern = name.lower().rstrip("/"), pattern.lower()
    return fnmatchcase(name if "/" in pattern else name.rpartition("/")[2], pattern)


def _as_variant(spec: ModelSpec, variant: Variant | None) -> ModelSpec:
    return evolve(spec, title=variant.title, chat_format=variant.chat_format) if variant else spec


def _unknown(target: Any, known: tuple[ModelSpec, ...]) -> str:
    if isinstance(target, Mapping):
        target = target.get("model_type")
    elif not isinstance(target, str | os.PathLike):
        target = target.model_type
    text = os.fspath(target)
    names = {spec.name: spec.name for spec in known} | {kind: kind for spec in known for kind in spec.model_types}
    for spec in known:
        for pattern in (*spec.patterns, *(pattern for variant in spec.variants for pattern in variant.patterns)):
            names[pattern.lower().strip("*")] = pattern
    near = get_close_matches(text.lower().rpartition("/")[2], names, n=3, cutoff=0.6)
    hint = f"; near it: {', '.join(repr(names[name]) for name in near)}" if near else ""
    listed = ", ".join(spec.name for spec in known)
    return f"no spec is known for {text!r}{hint}. Known families: {listed}. Note that {UNREWRITTEN}"
