"""How commands print: JSON where asked for, a table on a terminal, plain aligned text anywhere else."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from fastft.errors import UsageError

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class CheckFailed(Exception):  # noqa: N818 - an outcome, not an error
    """A command did its work and found that what it checked does not hold; exit code 2."""


class ArgumentsError(UsageError):
    """Arguments that were found wrong before any work; exit code 3."""


@contextmanager
def checking_arguments() -> Iterator[None]:
    """Raise a `UsageError` of the block as `ArgumentsError`."""
    try:
        yield
    except UsageError as error:
        raise ArgumentsError(*error.problems) from error


def print_json(value: Any) -> None:
    """Print a value as JSON; mappings, sequences, strings and numbers only."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows below a heading. Plain output is aligned with spaces and never wrapped or shortened."""
    if sys.stdout.isatty():
        # rich takes long to import and is of use on a terminal only
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*head, box=None, header_style="bold", pad_edge=False)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        Console().print(table)
        return
    lines = [[cell.upper() for cell in head], *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def print_fields(fields: Mapping[str, Any], indent: str = "") -> None:
    """Print one `name: value` a line; mappings and lists of mappings below their name, indented."""
    width = max((len(name) for name, value in fields.items() if not _is_block(value)), default=0) + 1
    for name, value in fields.items():
        if isinstance(value, Mapping) and value:
            typer.echo(f"{indent}{name}:")
            print_fields(value, indent + "  ")
        elif _is_block(value):
            for item in value:
                typer.echo(f"{indent}{name}:")
                print_fields(item, indent + "  ")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            typer.echo(f"{indent}{(name + ':').ljust(width)} {text}".rstrip())


def _is_block(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value)
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, Mapping) for item in value)
