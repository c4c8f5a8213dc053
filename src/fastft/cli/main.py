"""The entry point of the command line: finds commands without importing them, and maps outcomes to exit codes."""

import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fastft.cli.output import ArgumentsError, CheckFailed
from fastft.errors import FastftError

OK, ERROR, CHECK_FAILED, WRONG_USAGE = 0, 1, 2, 3

# name -> module that holds its Typer application as `app`; imported when the command is asked for
COMMANDS = (
    ("registry", "fastft.cli.registry"),
    ("env", "fastft.cli.env"),
    ("plan", "fastft.cli.plan"),
    ("demo", "fastft.cli.demo"),
    ("preview", "fastft.cli.preview"),
    ("export", "fastft.cli.export"),
    ("verify", "fastft.cli.verify"),
)
# What people look for here and find in Python -> the function that does it, and what shows how.
SFT = ("fastft.sft", "the ten lines of README.md show it")
PREFERENCE = ("fastft.preference", "docs/how-to/preferences.md shows it, README.md has ten lines of fastft.sft")
GRPO = ("fastft.grpo", "README.md shows it behind the ten lines of fastft.sft")
IN_PYTHON = {"train": SFT, "sft": SFT, "finetune": SFT, "dpo": PREFERENCE, "preference": PREFERENCE, "grpo": GRPO}


class LazyGroup(TyperGroup):
    """A group whose commands are imported on first use, so that a look-up does not load torch."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands in the table's order."""
        return [name for name, _ in COMMANDS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import a command's module and return the command, or None for an unknown name."""
        module = dict(COMMANDS).get(cmd_name)
        return typer.main.get_command(import_module(module).app) if module else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Say where training is; let typer suggest near names, which it takes from the commands it holds itself."""
        if args and args[0] in IN_PYTHON:
            function, shown = IN_PYTHON[args[0]]
            ctx.fail(f"No such command {args[0]!r}. Training is done in Python, by {function}: {shown}.")
        if args and args[0] not in dict(COMMANDS):
            self.commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=LazyGroup,
    name="fastft",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        from fastft import __version__

        typer.echo(f"fastft {__version__}")
        raise typer.Exit()


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Fine-tune open language models with QLoRA, LoRA or full fine-tuning.

    Training is done in Python alone: README.md has ten lines of it. The commands here do what comes before and after.

    Exit codes: 0 done, 1 an error, 2 a check failed, 3 wrong usage, 130 interrupted.
    """


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code; `arguments` are those after the program's name."""
    from fastft.noise import quiet

    # Not `app(...)`: that would put a hook of its own into `sys`.
    command = typer.main.get_command(app)
    try:
        with quiet():  # some libraries warn while they are imported
            command.main(args=arguments, prog_name="fastft")
    except FastftError as error:
        for line in error.lines():
            print(f"error: {line}", file=sys.stderr)
        return WRONG_USAGE if isinstance(error, ArgumentsError) else ERROR
    except CheckFailed as failure:
        if str(failure):
            print(f"check failed: {failure}", file=sys.stderr)
        return CHECK_FAILED
    except SystemExit as stop:
        # Exit code 2 is what typer gives wrong usage; a failed check comes as `CheckFailed`.
        return WRONG_USAGE if stop.code == 2 else int(stop.code or OK)
    return OK


def run() -> None:
    """Run the command line and leave the process with its exit code."""
    sys.exit(main())
