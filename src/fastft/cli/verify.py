"""`fastft verify`: is what was exported the model that was trained?"""

import contextlib
import json as json_module
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fastft.cli.models import check_weights
from fastft.cli.output import CheckFailed, JsonOption, checking_arguments, print_json
from fastft.environment import installed
from fastft.errors import Problem, UsageError

app = typer.Typer(add_completion=False, rich_markup_mode=None)

NEEDED = ("torch", "transformers", "peft", "safetensors")


@app.command()
def verify(
    artefacts: Annotated[list[Path], typer.Argument(help="Merged or adapter folders, .gguf files, folders of these.")],
    model: Annotated[str, typer.Option(help="Folder of the run, adapter or model that they come from.")],
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts: lines of JSON, each a text or a list of messages.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Held-out text for the perplexity.")] = None,
    text_tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text that are read.")] = 512,
    json: JsonOption = False,
) -> None:
    """Compare exports with the model they come from: prompts, token ids, logits, perplexity.

    Exits with 2 if one differs more than its kind allows. For example:
    fastft verify merged gguf/first-q4_k_m.gguf --model run/first

    In Python this is fastft.verify_export; fastft.verify there compares steps of training with plain transformers.
    """
    missing = [name for name in NEEDED if not installed(name)]
    if any(_has_gguf(path) for path in artefacts) and not installed("gguf"):
        missing.append("gguf")
    if missing:
        raise UsageError(f"fastft verify needs {', '.join(missing)}: pip install 'fastft[export]'")
    from fastft.export.verify import artefacts_in, verify_export
    from fastft.train.checkpoint import plain

    # with --json, what is printed on the way must not mix with the result
    with contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext():
        with checking_arguments():
            artefacts_in(artefacts, [])
            check_weights(model)
            asked = None if prompts is None else _prompts(prompts)
            passage = None if text is None else _read(text)
        report = verify_export(model, None, artefacts, prompts=asked, text=passage, text_tokens=text_tokens)
    if json:
        print_json(plain(report.to_dict()))
    else:
        typer.echo(str(report))
    failed = [Path(artefact.path).name for artefact in report.artefacts if not artefact.ok]
    if failed:
        differ = "differs" if len(failed) == 1 else "differ"
        raise CheckFailed(f"{', '.join(failed)} {differ} from the trained model, or cannot be read")


def _has_gguf(path: Path) -> bool:
    return path.suffix == ".gguf" or (path.is_dir() and any([*path.glob("*.gguf"), *path.glob("*/*.gguf")]))


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as UTF-8 text ({error})") from error


def _prompts(path: Path) -> list[Any]:
    """Return the prompts of a file: on each line a JSON text, a list of messages, or {"messages": [...]}."""
    found, problems = [], []
    for number, line in enumerate(_read(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json_module.loads(line)
        except json_module.JSONDecodeError as error:
            problems.append(f"{path}:{number}: not JSON ({error})")
            continue
        value = value.get("messages") if isinstance(value, dict) else value
        if isinstance(value, str | list) and value:
            found.append(value)
        else:
            problems.append(Problem(f"{path}:{number}", line[:60], "a text, or a list of messages"))
    if problems or not found:
        raise UsageError(*(problems[:10] or [f"{path}: it holds no prompt"]))
    return found
