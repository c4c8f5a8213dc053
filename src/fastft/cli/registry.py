"""`fastft registry`: look up what fastft knows of model families and chat formats, and check a spec of one's own."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fastft.cli.output import CheckFailed, JsonOption, print_fields, print_json, print_table
from fastft.environment import installed
from fastft.errors import Problem, UsageError
from fastft.registry.chat_format import ChatFormat
from fastft.registry.spec import ModelSpec

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)

SpecFiles = Annotated[
    list[Path] | None,
    typer.Option("--spec", metavar="FILE", help="Also use the spec in this file, before any other; may be repeated."),
]


@app.callback()
def _registry() -> None:
    """Look up model families and chat formats, and check specs."""


@app.command("list")
def list_specs(spec: SpecFiles = None, json: JsonOption = False) -> None:
    """List the known model families."""
    from fastft.registry.resolve import overlay, specs

    known = overlay(specs(), _load(spec))
    if json:
        print_json([_summary(one) for one in known])
        return
    rows = [(one.name, ", ".join(one.model_types), one.title, _capable(one)) for one in known]
    print_table(("name", "model types", "models", "supported"), rows)


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a spec, or a model type.")],
    spec: SpecFiles = None,
    json: JsonOption = False,
) -> None:
    """Show all that is known of one model family."""
    from fastft.registry.resolve import match

    found = match(name, extra=_load(spec)).spec
    if json:
        print_json(_whole(found))
    else:
        print_fields(_readable(found))


@app.command()
def resolve(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="Model id, local model or adapter folder, model type or spec name.")
    ],
    spec: SpecFiles = None,
    json: JsonOption = False,
) -> None:
    """Say which model family a model belongs to."""
    from fastft.registry.resolve import match

    found = match(target, extra=_load(spec))
    fields = {"target": target, "name": found.spec.name, "by": found.by}
    if json:
        print_json({**fields, "spec": _whole(found.spec)})
        return
    print_fields({**fields, **_summary(found.spec), "capabilities": _claims(found.spec)})


@app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A spec, as .toml or .json.")], json: JsonOption = False
) -> None:
    """Check a spec and each of its claims.

    The file's form first, all mistakes at once; then every claim, on a tiny random model of that architecture.
    """
    from fastft.registry.convert import load_spec_file

    spec = load_spec_file(file)
    missing = [package for package in ("torch", "transformers") if not installed(package)]
    if missing:
        raise UsageError(
            f"{file}: its form is right, but its claims cannot be checked: {' and '.join(missing)} not installed. "
            "Install fastft[train]"
        )
    from fastft.graph.check import check_spec

    report = check_spec(spec)
    if json:
        print_json(report.to_dict())
    else:
        typer.echo(str(report))
    if not report.ok:
        raise CheckFailed(f"{file}: not every claim of spec {spec.name!r} holds")


@app.command("formats")
def list_formats(json: JsonOption = False) -> None:
    """List the known chat formats."""
    from fastft.registry.chat import chat_formats

    if json:
        print_json([_format_summary(form) for form in chat_formats()])
        return
    rows = [(form.name, form.title, ", ".join(form.roles), ", ".join(form.aliases)) for form in chat_formats()]
    print_table(("name", "models", "roles", "aliases"), rows)


@app.command("format")
def show_format(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name or alias of a chat format.")],
    template: Annotated[
        str, typer.Option("--template", metavar="KIND", help="Print that template alone: jinja or ollama.")
    ] = "",
    json: JsonOption = False,
) -> None:
    """Show all that is known of one chat format."""
    from attrs import asdict

    from fastft.registry.chat import chat_format

    form = chat_format(name)
    templates = {"jinja": form.jinja, "ollama": form.ollama_template}
    if template not in ("", *templates):
        raise UsageError(Problem("--template", template, "jinja or ollama"))
    fields = {**_format_summary(form), **asdict(form)}
    if template and json:
        print_json({"name": form.name, template: templates[template]})
    elif template:
        typer.echo(templates[template])
    elif json:
        print_json(fields)
    else:
        print_fields({name: _shown(value) for name, value in fields.items() if value and name not in _TEMPLATES})


_TEMPLATES = ("jinja", "ollama_template")


def _format_summary(form: ChatFormat) -> dict[str, Any]:
    return {
        "name": form.name,
        "title": form.title,
        "aliases": list(form.aliases),
        "roles": list(form.roles),
        "refused_roles": list(form.refused_roles),
        "stop_tokens": list(form.stop_tokens),
        "instruction_part": form.instruction_part,
        "response_part": form.response_part,
    }


def _shown(value: Any) -> Any:
    """Return a field for people: line feeds in markers written out, and nothing that is empty or false."""
    if isinstance(value, dict):
        return {name: _shown(item) for name, item in value.items() if item not in ("", None, False, {}, ())}
    if isinstance(value, list | tuple):
        return [_shown(item) for item in value]
    return value.replace("\n", "\\n") if isinstance(value, str) else value


def _load(files: list[Path] | None) -> tuple[ModelSpec, ...]:
    if not files:
        return ()
    from fastft.registry.convert import load_spec_file

    return tuple(load_spec_file(file) for file in files)


def _capable(spec: ModelSpec) -> str:
    return ", ".join(name for name, claim in spec.capabilities.items() if claim.status == "supported")


def _claims(spec: ModelSpec) -> dict[str, str]:
    return {name: str(claim) for name, claim in spec.capabilities.items()}


def _summary(spec: ModelSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "title": spec.title,
        "model_types": list(spec.model_types),
        "chat_format": spec.chat_format,
        "gguf_architecture": spec.gguf_architecture,
        "lora_targets": list(spec.lora_targets),
        "capabilities": {
            name: {"status": claim.status, "note": claim.note} for name, claim in spec.capabilities.items()
        },
        "source": spec.source,
    }


def _whole(spec: ModelSpec) -> dict[str, Any]:
    """Return every field of a spec, those with default values as well."""
    from attrs import asdict, evolve

    # Capabilities are a mapping and no record, so they are written out apart.
    fields = asdict(evolve(spec, capabilities={}))
    return {**fields, "capabilities": _summary(spec)["capabilities"]}


def _readable(spec: ModelSpec) -> dict[str, Any]:
    """Return a spec's fields for people: in the order of the record, without what is not there."""
    fields = {name: value for name, value in _whole(spec).items() if value not in (None, "", ())}
    return _without_nothing({**fields, "capabilities": _claims(spec)})


def _without_nothing(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nothing(item) for name, item in value.items() if item is not None}
    return [_without_nothing(item) for item in value] if isinstance(value, list | tuple) else value
