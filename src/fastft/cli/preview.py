"""`fastft preview`: what a model will see of some data, and what it will learn from."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from fastft.cli.output import JsonOption, print_json
from fastft.environment import installed
from fastft.errors import UsageError, did_you_mean

app = typer.Typer(add_completion=False, rich_markup_mode=None)

TRAIN_ON = ("assistant", "last", "completion", "all")  # as chat_dataset has them, which needs torch to be imported
NEEDED = ("torch", "transformers", "trl", "datasets")


@app.command()
def preview(
    data: Annotated[str, typer.Argument(help="A file, a folder, or the name of a data set.")],
    model: Annotated[str, typer.Option(help="The folder or name of the model whose tokenizer it is for.")],
    rows: Annotated[int, typer.Option(min=1, help="How many rows to show.")] = 3,
    ids: Annotated[bool, typer.Option("--ids", help="A line for each token, with its id.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page to this file.")] = None,
    train_on: Annotated[str, typer.Option(help="assistant, last, completion or all.")] = "assistant",
    max_length: Annotated[int | None, typer.Option(min=2, help="Cut rows to so many tokens.")] = None,
    alternate: Annotated[bool, typer.Option(help="Refuse two assistant turns in a row.")] = True,
    json: JsonOption = False,
) -> None:
    """Show rows as they are trained on, what of them bears loss, and what cutting and packing would do to all."""
    if train_on not in TRAIN_ON:
        remedy = did_you_mean(train_on, TRAIN_ON)
        raise typer.BadParameter(f"{train_on!r} is none of {', '.join(TRAIN_ON)}. {remedy}", param_hint="--train-on")
    missing = [name for name in NEEDED if not installed(name)]
    if missing:
        raise UsageError(f"fastft preview needs {', '.join(missing)}: pip install 'fastft[train]'")
    from fastft.data.preview import preview as look

    with contextlib.redirect_stdout(sys.stderr):
        found = look(data, model, rows, train_on=train_on, max_length=max_length, alternate=alternate, ids=ids)
    if html is not None:
        found.save_html(html)
    if json:
        print_json(found.to_dict())
    elif html is None:
        found.show()
    else:
        typer.echo(f"written to {html}")
