"""`fastft demo`: fine-tune the shipped model in 4 bits, on examples or by rewards, and talk to the result."""

import contextlib
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from fastft.cli.output import CheckFailed, JsonOption, checking_arguments, print_json
from fastft.cli.stopping import stoppable
from fastft.environment import installed
from fastft.errors import Problem, UsageError

app = typer.Typer(add_completion=False, rich_markup_mode=None)

NEEDED = ("torch", "transformers", "peft", "trl", "datasets", "bitsandbytes")


@app.command()
def demo(
    grpo: Annotated[bool, typer.Option("--grpo", help="Learn from rewards for its own answers (GRPO).")] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Where the adapter, the curves and the run record go; run/demo, with --grpo run/demo-grpo.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Training steps: 80 of 16 examples, with --grpo 32 (8 at least) of 8 questions, 8 answers each.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where a demonstration into the same folder was interrupted.")
    ] = False,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Talk to the result; by default if this is a terminal.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Fine-tune a small model in 4 bits, show its answers before and after, and talk to it.

    Exits with 2 if the loss did not fall, with --grpo if the mean reward did not rise; with 130 if it was interrupted
    (Ctrl-C, or SIGTERM), after it has saved the last whole step.
    """
    missing = [name for name in NEEDED if not installed(name)]
    if missing:
        raise UsageError(f"fastft demo needs {', '.join(missing)}: pip install 'fastft[train]'")
    if grpo and steps is not None:
        from fastft.demo.reinforce import check_steps

        with checking_arguments():
            check_steps(steps)
    if resume:
        with checking_arguments():
            _check_resumable(output or _module(grpo).FOLDER)
    if chat is None:
        chat = not json and sys.stdin.isatty() and sys.stdout.isatty()
    given = {name: value for name, value in (("output_dir", output), ("steps", steps)) if value is not None}
    # with --json, what is shown on the way must not mix with the result
    with (
        contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext(),
        stoppable("the same command with --resume"),
    ):
        shown = _run(grpo)(**given, resume=resume, chat=chat)
    if json:
        print_json(shown.to_dict())
    complaint = shown.complaint()
    if complaint:
        raise CheckFailed(complaint)


def _check_resumable(folder: str | Path) -> None:
    """Raise UsageError where no demonstration was interrupted, before the model is loaded."""
    from fastft.train.lineage import own_and_others

    if not own_and_others(folder)[0]:
        remedy = "Leave --resume out to begin anew, or name another folder with --output."
        raise UsageError(Problem("--resume", str(folder), "a folder with a checkpoint of an interrupted run", remedy))


def _module(grpo: bool) -> Any:
    return import_module("fastft.demo.reinforce" if grpo else "fastft.demo.run")


def _run(grpo: bool) -> Callable[..., Any]:
    return _module(grpo).run_grpo_demo if grpo else _module(grpo).run_demo
