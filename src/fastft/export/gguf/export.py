"""Write a model as GGUF files: each weight is read once, merged, quantised to every type asked for, and streamed."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, frozen
from torch import nn

from fastft.errors import Problem, UsageError, argument_names, did_you_mean, unknown_arguments
from fastft.export.folder import base_folder, find_weights
from fastft.export.gguf import mixture as mixtures
from fastft.export.gguf.architecture import Architecture, architecture_of, check_supported, heads_of
from fastft.export.gguf.file import (
    FileWriter,
    TensorEntry,
    Value,
    check_space,
    clear_leftovers,
    tensor_entry,
    text,
    u32,
)
from fastft.export.gguf.imatrix import ImportanceMatrix, load_imatrix
from fastft.export.gguf.mixture import MIXTURES, ModelFacts, mixture, tensor_types
from fastft.export.gguf.stream import Phases, check_folder, make_folder, stream
from fastft.export.gguf.tensors import FileTensor, plan_tensors
from fastft.export.gguf.vocabulary import vocabulary_of
from fastft.export.weights import WeightSource, weight_source
from fastft.given import refuse_export
from fastft.model.config import device_problem
from fastft.model.tokenizer import end_tokens
from fastft.registry.resolve import resolve
from fastft.registry.spec import ModelSpec
from fastft.state import base_model

# Names for people who do not want to know the types.
ALIASES = {"not_quantized": "f16", "fast_quantized": "q8_0", "quantized": "q4_k_m"}
_QUANTISATION_VERSION = 2


@frozen
class GgufFileReport:
    """One file that was written: its quant, path, size in bytes, and how many tensors have each type."""

    quant: str
    path: Path
    size: int
    types: Mapping[str, int]

    def __str__(self) -> str:
        types = ", ".join(f"{count} {kind}" for kind, count in self.types.items())
        return f"{self.path}: {self.quant}, {self.size / 1e6:,.1f} MB ({types})"


@frozen
class GgufReport:
    """What an export wrote, notes on where llama.cpp will differ from the model, and where the time went."""

    files: tuple[GgufFileReport, ...]
    notes: tuple[str, ...]
    phases: Phases

    def __str__(self) -> str:
        return "\n".join([*map(str, self.files), *(f"note: {note}" for note in self.notes)])


def export_gguf(
    model_or_folder: Any,
    tokenizer: Any = None,
    folder: str | Path = "gguf",
    quants: str | Sequence[str] = ("q4_k_m",),
    *,
    name: str | None = None,
    base: str = "dequantised",
    importance: Mapping[str, torch.Tensor] | ImportanceMatrix | str | Path | None = None,
    pre_tokenizer: str | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
    **unknown: Any,
) -> GgufReport:
    """Write `<folder>/<name>-<quant>.gguf` for each of `quants`; all are made in one pass over the weights.

    * `model_or_folder`: a model with or without adapters, or the folder of a checkpoint, an adapter or a run.
      Adapters are merged in fp32; no 16-bit copy is written. `base`: see `weight_source`.
    * `tokenizer`: by default the one that belongs to the model.
    * `quants`: llama.cpp's file types (`quant_names()`), or "not_quantized" (f16), "fast_quantized" (q8_0) and
      "quantized" (q4_k_m).
    * `name`: of the model and the files; by default that of the checkpoint.
    * `importance`: an importance matrix (how much an error in each column of a tensor counts): the path of llama.cpp's
      file, what `fastft.export.gguf.imatrix.collect` returns, or fp32 [columns] by GGUF's names.
    * `pre_tokenizer`: llama.cpp's name of the way text is split, for a tokenizer that fastft does not recognise.
    * `device`: where weights are read to and quantisers run; by default a GPU if there is one.
    * `unknown`: other names are refused, with the nearest that there is.

    A file gets its name once it is whole; an error leaves nothing of it, and what a killed process left is removed by
    the next run. Raises UsageError for what cannot be exported (before any work, all reasons at once) and SaveError
    for a disk that is too small or fails.
    """
    path = isinstance(tokenizer, str | Path)  # which may be where the files are to go: `_check_names` tells it
    refuse_export(model_or_folder, None if path else tokenizer, folder, "model_or_folder")
    _check_arguments(unknown, device)
    chosen = chosen_quants(quants)
    target = Path(folder).expanduser()
    _check_names(tokenizer, name)
    check_folder(target)
    spec = family(model_or_folder)
    check_supported(spec)
    place = _device(device)
    source = weight_source(model_or_folder, base, place)
    tokenizer = tokenizer if tokenizer is not None else source.tokenizer
    if tokenizer is None:
        raise UsageError("export_gguf: the model's tokenizer is not known; pass it as the second argument")
    name = name or model_name(model_or_folder, source)
    architecture, tensors = _plan(source, spec)
    vocabulary = vocabulary_of(tokenizer, _rows(source, tensors), pre_tokenizer, source.folder, _ends(source))
    facts, weighted = _facts(source, spec), _importance(importance, tensors)
    metadata = _general(name, spec, source) | architecture.metadata | vocabulary.metadata
    writers = [
        FileWriter(
            target / f"{name}-{quant}.gguf",
            metadata | {"general.file_type": u32(mixture(quant).file_type)},
            _entries(quant, tensors, facts, bool(weighted)),
        )
        for quant in chosen
    ]
    _prepare(target, writers)
    phases = stream(tensors, writers, place, weighted, progress)
    reports = tuple(
        GgufFileReport(quant, writer.path, writer.size, _counted(writer.tensors))
        for quant, writer in zip(chosen, writers)
    )
    return GgufReport(reports, (*source.notes, *architecture.notes, *vocabulary.notes), phases)


def _check_names(tokenizer: Any, name: str | None) -> None:
    problems = []
    if isinstance(tokenizer, str | Path):
        remedy = f"If it is where the files go, pass folder={str(tokenizer)!r}."
        problems.append(Problem("tokenizer", str(tokenizer), "a tokenizer, or None for the model's own", remedy))
    if name is not None and (not isinstance(name, str) or not name or re.search(r"[/\\\0]", name)):
        remedy = "folder= says where the files go."
        problems.append(Problem("name", name, "a name for files, without / and \\", remedy))
    if problems:
        raise UsageError(*problems)


def quant_names() -> tuple[str, ...]:
    """Return the names of the file types that can be written."""
    return tuple(MIXTURES)


def chosen_quants(quants: str | Sequence[str]) -> tuple[str, ...]:
    """Return the file types asked for, each once; raises UsageError that lists every wrong name."""
    known = [*MIXTURES, *mixtures.ALIASES, *ALIASES]
    if not isinstance(quants, str | Sequence):
        raise UsageError(Problem("quants", quants, f"one or several of {', '.join(known)}"))
    asked = [quants] if isinstance(quants, str) else list(quants)
    problems = []
    for quant in asked:
        if str(quant).lower() not in known:
            hint = did_you_mean(str(quant).lower(), known)
            problems.append(Problem("quants", quant, f"one of {', '.join(known)}", hint))
    if not asked:
        problems.append(Problem("quants", quants, f"at least one of {', '.join(known)}"))
    if problems:
        raise UsageError(*problems)
    lower = (str(quant).lower() for quant in asked)
    return tuple(dict.fromkeys(mixture(ALIASES.get(quant, quant)).name for quant in lower))


def model_name(model_or_folder: Any, source: WeightSource) -> str:
    """Return a name for files: that of the folder given, or of the checkpoint the model came from."""
    given = model_or_folder if isinstance(model_or_folder, str | Path) else source.state.source
    last = Path(str(given)).expanduser().resolve().name if given else ""
    return re.sub(r"[^\w.-]+", "-", last).strip("-.") or "model"


# The plan -------------------------------------------------------------------------------------------------------------


def _plan(source: WeightSource, spec: ModelSpec) -> tuple[Architecture, list[FileTensor]]:
    config = source.config.get_text_config()
    architecture = architecture_of(config, spec, config.vocab_size)
    return architecture, plan_tensors(source, spec, architecture.tensors)


def family(model_or_folder: Any) -> ModelSpec:
    """Return the spec of a model, or of what a folder holds, without reading weights."""
    if isinstance(model_or_folder, nn.Module):
        return resolve(base_model(model_or_folder).config)
    return resolve(base_folder(find_weights(Path(model_or_folder).expanduser())))


def _importance(
    given: Mapping[str, torch.Tensor] | ImportanceMatrix | str | Path | None, tensors: Sequence[FileTensor]
) -> Mapping[str, torch.Tensor]:
    """Return fp32 [columns] by tensor; raises UsageError for a matrix of another model."""
    if given is None:
        return {}
    matrix = load_imatrix(given) if isinstance(given, str | Path) else given
    values = matrix.importance() if isinstance(matrix, ImportanceMatrix) else matrix
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    wrong = {name: value for name, value in values.items() if name in shapes and value.shape != shapes[name][-1:]}
    if wrong or not set(values) & set(shapes):
        problems = [
            Problem(f"importance of {name}", f"shape {tuple(value.shape)}", f"({shapes[name][-1]},), one a column")
            for name, value in list(wrong.items())[:5]
        ]
        raise UsageError(*(problems or ["importance: none of its tensors is in this model; it is another model's"]))
    return values


def _rows(source: WeightSource, tensors: Sequence[FileTensor]) -> int:
    return next(tensor.shape[0] for tensor in tensors if tensor.name == "token_embd.weight")


def _ends(source: WeightSource) -> tuple[int, ...]:
    """Return the tokens that end an answer by the configs; the vocabulary adds the tokenizer's."""
    return tuple(end_tokens(None, source.generation_config, source.config))


def _general(name: str, spec: ModelSpec, source: WeightSource) -> dict[str, Value]:
    keys = {
        "general.architecture": text(str(spec.gguf_architecture)),
        "general.type": text("model"),
        "general.name": text(name),
        "general.quantization_version": u32(_QUANTISATION_VERSION),
    }
    origin = source.state.source
    if origin and not Path(origin).expanduser().exists():
        keys["general.source.huggingface.repository"] = text(origin)
    return keys


def _prepare(target: Path, writers: Sequence[FileWriter]) -> None:
    make_folder(target)
    for writer in writers:
        clear_leftovers(writer.path)
    check_space(target, sum(writer.size for writer in writers), f"the export of {len(writers)} files")


# What the same thing is called here, for names that people know from elsewhere.
_RENAMED = {
    "quant": "quants",
    "quantization": "quants",
    "quantization_method": "quants",
    "imatrix": "importance",
    "imatrix_file": "importance",
    "model": "the first argument",
    "output_dir": "folder",
    "out": "folder",
}


def _check_arguments(unknown: Mapping[str, Any], device: Any) -> None:
    problems: list[Any] = unknown_arguments("export_gguf", unknown, argument_names(export_gguf), _RENAMED)
    if wrong := device_problem(device, ""):
        problems.append(evolve(wrong, where="export_gguf device"))
    if problems:
        raise UsageError(*problems)


def _device(device: str | torch.device | None) -> torch.device:
    return torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _facts(source: WeightSource, spec: ModelSpec) -> ModelFacts:
    config = source.config.get_text_config()
    heads = heads_of(config)
    return ModelFacts(str(spec.gguf_architecture), config.num_hidden_layers, heads.queries, heads.keys)


def _entries(quant: str, tensors: Sequence[FileTensor], facts: ModelFacts, importance: bool) -> list[TensorEntry]:
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    types = tensor_types(shapes, quant, facts, importance=importance)
    return [tensor_entry(name, shape, types[name] or "f32") for name, shape in shapes.items()]


def _counted(entries: Sequence[TensorEntry]) -> dict[str, int]:
    types = [entry.type for entry in entries]
    return {kind: types.count(kind) for kind in dict.fromkeys(types)}
