"""`fastft export`: a trained model as a merged checkpoint, an adapter, or GGUF files with a Modelfile."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fastft.cli.models import check_weights, folder_of
from fastft.cli.output import ArgumentsError, JsonOption, checking_arguments, print_json
from fastft.environment import installed
from fastft.errors import Problem, SaveError, UsageError

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
OutFiles = Annotated[Path, typer.Argument(help="Folder to write into; each file appears when it is whole.")]
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
    from fastft.export.merge import chosen_precision, merge
    from fastft.export.place import check_target
    from fastft.export.weights import check_base

    with checking_arguments():
        chosen_precision(precision)
        check_base(base)
        check_target(out.expanduser(), (Path(model).expanduser(),))
        check_weights(model)
    with _quiet(json):
        report = merge(folder_of(model), out, precision=precision, base=base)
    _show(report.to_dict() if json else str(report), json)


@app.command()
def lora(
    model: Model,
    out: Out,
    gguf: Annotated[bool, typer.Option("--gguf", help="Write OUT/adapter.gguf, beside the base's file.")] = False,
    quant: Annotated[str | None, typer.Option(help="With --gguf: f32 (the default), f16 or bf16.")] = None,
    json: JsonOption = False,
) -> None:
    """Write the adapter alone, with its tokenizer.

    For example: fastft export lora run/first adapter
    """
    _check_installed(*NEEDED, *(["gguf"] if gguf else []))
    if quant is not None and not gguf:
        remedy = "The adapter's weights are written as they are; --gguf writes a GGUF file in that type."
        raise ArgumentsError(Problem("--quant", quant, "to be left out without --gguf", remedy))
    with _quiet(json):
        if gguf:
            path, said = _lora_gguf(model, out, quant or "f32")
        else:
            from fastft.export.merge import save_adapter
            from fastft.export.place import check_target

            with checking_arguments():
                check_target(out.expanduser(), (Path(model).expanduser(),))
                check_weights(model)
            path = save_adapter(folder_of(model), out)
            said = f"{path}: written"
    _show({"path": str(path)} if json else said, json)


def _lora_gguf(model: str, out: Path, quant: str) -> tuple[Path, str]:
    """Write the GGUF file of an adapter; returns its path, and the line that says what it is."""
    from fastft.export.folder import find_weights
    from fastft.export.gguf.lora import check_quant, export_lora_gguf
    from fastft.export.gguf.stream import check_folder
    from fastft.model import files

    with checking_arguments():
        check_quant(quant)
        check_folder(out.expanduser())
        check_weights(model)
    folder = folder_of(model)
    path = export_lora_gguf(folder, out / "adapter.gguf", quant)
    base = files.read_json(find_weights(folder).folder / files.ADAPTER_CONFIG).get("base_model_name_or_path")
    return (
        path,
        f"{path}: {quant}, {path.stat().st_size / 1e6:.1f} MB, to be used beside a GGUF file of its base, {base}",
    )


@app.command()
def gguf(
    model: Model,
    out: OutFiles,
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
    _check_gguf(model, quant, base, out.expanduser(), ollama, modelfile)
    with _quiet(json):
        source = folder_of(model)
        tokenizer = _tokenizer(source) if modelfile else None
        options = {"chat_format": chat_format, "system": system, "num_ctx": num_ctx}
        if modelfile:
            _check_modelfile(tokenizer, options)
        importance = load_imatrix(imatrix).importance() if imatrix else None
        report = export_gguf(source, tokenizer, out, quants=quant, base=base, importance=importance)
        made = [file.path for file in report.files]
        names = ["Modelfile"] if len(made) == 1 else [f"Modelfile.{path.stem}" for path in made]
        written = [write_modelfile(p, tokenizer, n, **options) for p, n in zip(made, names)] if modelfile else []
        said, failure = None, None
        try:
            said = create_ollama_model(written[0], ollama) if ollama else None
        except SaveError as error:
            failure = error  # the files are written, and told of first
    if json:
        files = [{"quant": f.quant, "path": str(f.path), "bytes": f.size, "types": dict(f.types)} for f in report.files]
        _show({"files": files, "modelfiles": [str(p) for p in written], "ollama": said, "notes": report.notes}, json)
    else:
        lines = [str(file) for file in report.files]
        lines += [f"{path}: written" for path in written] + ([said] if said else [])
        _show("\n".join(lines + [f"note: {note}" for note in report.notes]), json)
    if failure is not None:
        raise failure


def _check_gguf(model: str, quant: list[str], base: str, out: Path, ollama: str | None, modelfile: bool) -> None:
    """Raise `ArgumentsError` for what can be seen before anything is loaded."""
    from fastft.export.gguf.export import chosen_quants
    from fastft.export.gguf.stream import check_folder
    from fastft.export.modelfile import MODELFILE, ollama_program
    from fastft.export.weights import check_base

    with checking_arguments():
        chosen_quants(quant)
        check_base(base)
        check_folder(out)
        check_weights(model)
        if ollama and (len(quant) > 1 or not modelfile):
            raise UsageError("--ollama takes one --quant, with its Modelfile")
    if ollama:
        try:
            ollama_program(ollama, out / MODELFILE)
        except UsageError as error:
            raise UsageError(*error.problems, "nothing was written; leave --ollama out to export first") from error


def _check_modelfile(tokenizer: Any, options: dict[str, Any]) -> None:
    """Refuse a Modelfile that cannot be written before the weights are."""
    from fastft.export.modelfile import modelfile

    try:
        modelfile("x", tokenizer, **options)
    except UsageError as error:
        raise ArgumentsError(*error.problems, "--no-modelfile exports without one") from error


def _check_installed(*names: str) -> None:
    missing = [name for name in names if not installed(name)]
    if missing:
        raise UsageError(f"fastft export needs {', '.join(missing)}: pip install 'fastft[export]'")


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
