"""From a name to a chat format. Reads the data files beside it on first use; needs neither torch nor Jinja."""

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from attrs import evolve

from fastft.errors import Problem, SpecError, did_you_mean
from fastft.registry.chat_format import ChatFormat
from fastft.registry.chat_jinja import jinja_template
from fastft.registry.chat_ollama import ollama_template
from fastft.registry.packaged import build

FOLDER = Path(__file__).parent / "chat_formats"


def chat_format(name: str) -> ChatFormat:
    """Return the chat format of that name or alias; case, `_` and `-` do not matter.

    Raises SpecError for an unknown name, with the nearest known one.
    """
    known = _by_name()
    found = known.get(_folded(name)) if isinstance(name, str) else None
    if found is None:
        near = did_you_mean(_folded(str(name)), known)
        listed = ", ".join(form.name for form in chat_formats())
        raise SpecError(Problem("chat format", name, f"one of {listed}", near[:1].upper() + near[1:]))
    return found


@cache
def chat_formats() -> tuple[ChatFormat, ...]:
    """Return every chat format, by name."""
    tables = {path.stem: tomllib.loads(path.read_text("utf-8")) for path in FOLDER.glob("*.toml")}
    return tuple(_made(name, _inherited(name, tables)) for name in sorted(tables))


def with_tokens(form: ChatFormat, *, bos: str | None = None, eos: str | None = None) -> ChatFormat:
    """Return the format as a tokenizer with other BOS and EOS texts renders it.

    Stop tokens, parameters and the Ollama template name the tokenizer's EOS instead of the format's own; None leaves a
    token as it is.
    """
    bos, eos = form.bos if bos is None else bos, form.eos if eos is None else eos
    old = form.eos
    swap = {name: tuple(eos if token == old else token for token in getattr(form, name)) for name in _TOKEN_FIELDS}
    changed = evolve(form, bos=bos, eos=eos, **(swap if old and _ends_with_eos(form) else {}))
    return changed if has_own_template(form) else evolve(changed, ollama_template=ollama_template(changed))


def has_own_template(form: ChatFormat) -> bool:
    """Return whether a format's templates are files of their own and not made from its markers."""
    return (FOLDER / f"{form.name}.jinja").is_file()


_TOKEN_FIELDS = ("stop_tokens", "ollama_stops", "sampled")


def _ends_with_eos(form: ChatFormat) -> bool:
    return "{eos}" in form.assistant.end


@cache
def _by_name() -> dict[str, ChatFormat]:
    return {_folded(name): form for form in chat_formats() for name in (form.name, *form.aliases)}


def _folded(name: str) -> str:
    return name.lower().replace("_", "-").replace(" ", "-")


def _inherited(name: str, tables: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return a file's table over that of the format that it is `like`, less what is in `without`."""
    table = dict(tables[name])
    without = ("aliases", "notes", *table.pop("without", ()))
    parent = table.pop("like", None)
    if parent is None:
        return table
    below = {key: value for key, value in _inherited(parent, tables).items() if key not in without}
    merged = {**below, **table}
    for key in ("system", "user", "assistant", "tools", "thinking"):
        if isinstance(below.get(key), dict) and isinstance(table.get(key), dict):
            merged[key] = {**below[key], **table[key]}
    return merged


def _made(name: str, table: Mapping[str, Any]) -> ChatFormat:
    form: ChatFormat = build(ChatFormat, {"name": name, **table})
    end = form.assistant.end.replace("{eos}", form.eos)
    stops = form.stop_tokens or (end,)
    if has_own_template(form):
        jinja, ollama = ((FOLDER / f"{name}.{kind}").read_text("utf-8").rstrip("\n") for kind in ("jinja", "gotmpl"))
    else:
        jinja, ollama = jinja_template(form), ollama_template(form)
    return evolve(
        form,
        stop_tokens=stops,
        ollama_stops=form.ollama_stops or stops,
        instruction_part=form.instruction_part or form.user.start,
        response_part=form.response_part or form.assistant.start,
        sampled=form.sampled or _sampled(form, end),
        jinja=jinja,
        ollama_template=ollama,
    )


def _sampled(form: ChatFormat, end: str) -> tuple[str, ...]:
    """Return the scaffold within an assistant's turn that the model has to sample."""
    parts = [form.assistant.lead]
    if form.thinking:
        parts += [] if form.thinking.prompted else [form.thinking.start]
        parts += [form.thinking.end]
    if form.tools:
        parts += [form.tools.calls_start, form.tools.calls_end]
    return tuple(part for part in (*parts, end) if part)
