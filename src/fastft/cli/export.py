"""`fastft export`: a trained model as a merged checkpoint, an adapter, or GGUF files with a Modelfile."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fastft.cli.output import JsonOption, print_json
from fastft.environment import installed
from fastft.errors import UsageError

app = typer.Typer(
    name="export",
    help="Export a trained model: merged weights, its adapter, or GGUF files.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
NEEDED = ("torch", "transformers", "peft", "safetensors")

Model = Annotated[str, typer.Argument(help="Folder of a run, an adapter or a model, or a model id of the hub.")]
Out = Annotated[Path, typer.Argument(help="Folder to write; it appears when it is whole.")]
Quants = Annotated[
    list[str] | None, typer.Option("--quant", "-q", help="A quant, q4_k_m by default; may be given several times.")
]
Base = Annotated[
    str, typer.Option(help="What adapters are merged into: dequantised (what training saw) or original (16 bits).")
]


@app.command()
def merged(
    model: Model,
    out: Out,
    precision: Annotated[str, typer.Option(help="bf16, fp16, fp32, nf4 or fp8.")] = "bf16",
    base: Base = "dequantised",
    json: JsonOption = False,
) -> None:
    """Write base and adapters as one plain checkpoint.

    For example: fastft export merged run/first merged
    """
    _check_installed(*NEEDED)
    from fastft.export.merge import merge

    with _quiet(json):
        report = merge(_folder(model), out, precision=precision, base=base)
    _show(report.to_dict() if json else str(report), json)


@app.command()
def lora(
    model: Model,
    out: Out,
    gguf: Annotated[bool, typer.Option("--gguf", help="Write OUT/adapter.gguf, beside the base's file.")] = False,
    quant: Annotated[str, typer.Option(help="With --gguf: f32, f16 or bf16.")] = "f16",
    json: JsonOption = False,
) -> None:
    """Write the adapter alone, with its tokenizer.

    For example: fastft export lora run/first adapter
    """
    _check_installed(*NEEDED, *(["gguf"] if gguf else []))
    with _quiet(json):
        if gguf:
            from fastft.export.gguf.lora import export_lora_gguf

            path = export_lora_gguf(_folder(model), out / "adapter.gguf", quant)
        else:
            from fastft.export.merge import save_adapter

            path = save_adapter(_folder(model), out)
    _show({"path": str(path)} if json else f"{path}: written", json)


@app.command()
def gguf(
    model: Model,
    out: Out,
    quant: Quants = None,
    base: Base = "dequantised",
    imatrix: Annotated[Path | None, typer.Option(help="An importance matrix, as llama.cpp writes them.")] = None,
    modelfile: Annotated[bool, typer.Option(help="Write a Modelfile for Ollama beside each file.")] = True,
    chat_format: Annotated[str | None, typer.Option(help="Its chat format; by default that of the tokenizer.")] = None,
    system: Annotated[str | None, typer.Option(help="Its system message.")] = None,
    num_ctx: Annotated[int | None, typer.Option(help="Its context in tokens.")] = None,
    ollama: Annotated[str | None, typer.Option(help="Also run `ollama create` with this name.")] = None,
    json: JsonOption = False,
) -> None:
    """Write GGUF files, all in one pass over the weights, and a Modelfile for each.

    For example: fastft export gguf run/first gguf --quant q4_k_m --quant q8_0
    """
    _check_installed(*NEEDED, "gguf")
    from fastft.export.gguf.export import export_gguf
    from fastft.export.gguf.imatrix import load_imatrix
    from fastft.export.modelfile import create_ollama_model, write_modelfile

    quant = quant or ["q4_k_m"]
    if ollama and (len(quant) > 1 or not modelfile):
        raise UsageError("--ollama takes one --quant, with its Modelfile")
    with _quiet(json):
        source = _folder(model)
        tokenizer = _tokenizer(source) if modelfile else None
        options = {"chat_format": chat_format, "system": system, "num_ctx": num_ctx}
        if modelfile:
            _check_modelfile(tokenizer, options)
        importance = load_imatrix(imatrix).importance() if imatrix else None
        report = export_gguf(source, tokenizer, out, quants=quant, base=base, importance=importance)
        made = [file.path for file in report.files]
        names = ["Modelfile"] if len(made) == 1 else [f"Modelfile.{path.stem}" for path in made]
        written = [write_modelfile(p, tokenizer, n, **options) for p, n in zip(made, names)] if modelfile else []
        said = create_ollama_model(written[0], ollama) if ollama else None
    if json:
        files = [{"quant": f.quant, "path": str(f.path), "bytes": f.size, "types": dict(f.types)} for f in report.files]
        _show({"files": files, "modelfiles": [str(p) for p in written], "ollama": said, "notes": report.notes}, json)
        return
    lines = [f"{file.path}: {file.quant}, {file.size / 1e9:.2f} GB" for file in report.files]
    lines += [f"{path}: written" for path in written] + ([said] if said else [])
    _show("\n".join(lines + [f"note: {note}" for note in report.notes]), json)


def _check_modelfile(tokenizer: Any, options: dict[str, Any]) -> None:
    """Refuse a Modelfile that cannot be written before the weights are."""
    from fastft.export.modelfile import modelfile

    try:
        modelfile("x", tokenizer, **options)
    except UsageError as error:
        raise UsageError(*error.problems, "--no-modelfile exports without one") from error


def _check_installed(*names: str) -> None:
    missing = [name for name in names if not installed(name)]
    if missing:
        raise UsageError(f"fastft export needs {', '.join(missing)}: pip install 'fastft[export]'")


def _folder(model: str) -> Path:
    """Return the folder of what is to be exported; a hub id is looked up as `fastft.load` does."""
    from fastft.model import files

    return Path(model).expanduser() if Path(model).expanduser().is_dir() else files.locate(model)


def _tokenizer(folder: Path) -> Any:
    """Return the tokenizer that belongs to a folder: an adapter's own, or else its base's."""
    from fastft.export.folder import base_folder, find_weights
    from fastft.model import files
    from fastft.model.tokenizer import load_tokenizer

    found = find_weights(folder)
    return load_tokenizer(found.folder if files.has_tokenizer(found.folder) else base_folder(found))


def _quiet(json: bool) -> Any:
    """With --json, what is printed on the way must not mix with the result."""
    return contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext()


def _show(value: Any, json: bool) -> None:
    if json:
        print_json(value)
    else:
        typer.echo(value)
