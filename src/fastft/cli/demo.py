"""`fastft demo`: fine-tune the shipped model in 4 bits, and talk to the result."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from fastft.cli.output import CheckFailed, JsonOption, print_json
from fastft.environment import installed
from fastft.errors import UsageError

app = typer.Typer(add_completion=False, rich_markup_mode=None)

NEEDED = ("torch", "transformers", "peft", "trl", "datasets", "bitsandbytes")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Where the adapter, the loss curve and the run record go.")] = Path(
        "run/demo"
    ),
    steps: Annotated[int, typer.Option(min=2, help="Training steps of 16 examples.")] = 80,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Talk to the result; by default if this is a terminal.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Fine-tune a small model in 4 bits, show its answers before and after, and talk to it.

    Exits with 2 if the loss did not fall.
    """
    missing = [name for name in NEEDED if not installed(name)]
    if missing:
        raise UsageError(f"fastft demo needs {', '.join(missing)}: pip install 'fastft[train]'")
    from fastft.demo.run import run_demo

    if chat is None:
        chat = not json and sys.stdin.isatty() and sys.stdout.isatty()
    # with --json, what is shown on the way must not mix with the result
    with contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext():
        shown = run_demo(output, steps=steps, chat=chat)
    if json:
        print_json(shown.to_dict())
    if shown.losses[-1][1] >= shown.losses[0][1]:
        raise CheckFailed(
            f"the loss did not fall: {shown.losses[0][1]:.4f} at first, {shown.losses[-1][1]:.4f} at last"
        )
