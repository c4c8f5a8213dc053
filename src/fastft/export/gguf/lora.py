"""Write adapters alone as a GGUF file, which llama.cpp applies to a base model's file as it loads it."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn

from fastft.errors import Problem, UsageError, did_you_mean
from fastft.export import deltas
from fastft.export.gguf.architecture import Heads, check_supported, heads_of
from fastft.export.gguf.file import FileWriter, Value, check_space, f32, tensor_entry, text, u32
from fastft.export.gguf.stream import check_folder, make_folder, stream
from fastft.export.gguf.tensors import FileTensor, change_of, gguf_name
from fastft.given import model_or_folder_problem, path_problem, refuse
from fastft.registry.resolve import resolve
from fastft.registry.spec import ModelSpec
from fastft.state import base_model

_FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32}
_MERGE = "merge the adapter and export the whole model instead (fastft.export_gguf)"


@frozen(eq=False)
class _Pair:
    """What the adapters at work add to one weight: `scale * b @ a`, both in fp32 as llama.cpp holds them."""

    name: str
    weight: str
    a: Tensor
    b: Tensor
    alpha: float | None  # scale * rank, where there is one adapter


def export_lora_gguf(
    model_or_folder: Any, path: str | Path, quant: str = "f32", *, name: str | None = None, progress: bool = False
) -> Path:
    """Write the active adapters of a model as the GGUF file `path`, to be loaded beside the base model's GGUF file.

    * `model_or_folder`: a model with LoRA or rsLoRA, or the folder of an adapter or a run. Several active adapters
      become one, of the sum of their ranks.
    * `quant`: "f32", "f16" or "bf16", for A and B.

    The base's file is made by `export_gguf` from the model without the adapter (its folder). Raises UsageError, with
    every reason at once, for what such a file cannot hold: DoRA, trained copies of whole modules, trained token rows,
    biases, adapters on tied embeddings; those can be merged.
    """
    where = path_problem("path", path, "the path of a .gguf file")
    refuse(model_or_folder_problem(model_or_folder, "model_or_folder"), where)
    check_quant(quant)
    path = Path(path).expanduser()
    check_folder(path.parent)
    if path.suffix != ".gguf" or path.is_dir():
        raise UsageError(Problem("path", str(path), "the name of a file that ends in .gguf"))
    model = _model(model_or_folder)
    inner = base_model(model)
    spec = resolve(inner.config)
    check_supported(spec)
    pairs = _pairs(inner, spec)
    alphas = {pair.alpha for pair in pairs}
    alpha = alphas.pop() if len(alphas) == 1 else None
    metadata = _metadata(spec, name or path.stem, quant, alpha)
    tensors = [tensor for pair in pairs for tensor in _tensors(pair, alpha)]
    entries = [tensor_entry(tensor.name, tensor.shape, quant) for tensor in tensors]
    writer = FileWriter(path, metadata, entries)
    make_folder(path.parent)
    check_space(path.parent, writer.size, "the adapter")
    stream(tensors, [writer], torch.device("cpu"), progress=progress)
    return path


def check_quant(quant: object) -> None:
    """Raise UsageError for a type that A and B cannot have in the file."""
    if not isinstance(quant, str) or quant not in _FILE_TYPES:
        near = did_you_mean(str(quant), _FILE_TYPES)
        raise UsageError(Problem("quant", quant, f"one of {', '.join(_FILE_TYPES)}", near))


def _model(model_or_folder: Any) -> nn.Module:
    from fastft.export.folder import find_weights, load_folder

    if isinstance(model_or_folder, nn.Module):
        return model_or_folder
    found = find_weights(Path(model_or_folder).expanduser())
    if not found.adapter:
        raise UsageError(f"{model_or_folder}: this folder holds no adapter; {_MERGE}")
    return load_folder(found)


def _metadata(spec: ModelSpec, name: str, quant: str, alpha: float | None) -> dict[str, Value]:
    keys = {
        "general.architecture": text(str(spec.gguf_architecture)),
        "general.type": text("adapter"),
        "general.name": text(name),
        "general.file_type": u32(_FILE_TYPES[quant]),
        "general.quantization_version": u32(2),
        "adapter.type": text("lora"),
    }
    # llama.cpp multiplies by alpha / rank, and by 1 where the file has no alpha (B then holds the scale)
    return keys | ({"adapter.lora.alpha": f32(alpha)} if alpha is not None else {})


def _tensors(pair: _Pair, alpha: float | None) -> Iterator[FileTensor]:
    own = pair.alpha / len(pair.a if pair.name != _EMBEDDING else pair.a.T) if pair.alpha is not None else 1.0
    b = pair.b if alpha is not None else pair.b * own
    for letter, values in (("a", pair.a), ("b", b)):
        yield FileTensor(f"{pair.name}.lora_{letter}", tuple(values.shape), pair.weight, partial(_given, values))


def _given(values: Tensor) -> Tensor:
    return values


# What the adapters hold -----------------------------------------------------------------------------------------------

_EMBEDDING = "token_embd.weight"


def _pairs(model: nn.Module, spec: ModelSpec) -> list[_Pair]:
    """Return a pair for every weight that an active adapter changes; raises UsageError for all that is no such pair."""
    config = model.config.get_text_config()
    tied = bool(getattr(config, "tie_word_embeddings", False))
    layers = dict(_adapted(model))
    problems = list(_problems(model, layers, tied))
    names = {path: gguf_name(config, spec, f"{path}.weight") for path in layers}
    problems += [
        f"{path}: llama.cpp has no place for this weight; {_MERGE}" for path, name in names.items() if not name
    ]
    if problems:
        raise UsageError(*problems)
    if not layers:
        raise UsageError("export_lora_gguf: the model has no active LoRA adapter; add one with fastft.add_lora")
    return [_pair(path, layer, str(names[path]), spec, heads_of(config)) for path, layer in layers.items()]


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora.layer import LoraLayer

    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and deltas.adapters_at_work(module):
            yield path, module


def _problems(model: nn.Module, layers: Mapping[str, Any], tied: bool) -> Iterator[str]:
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.utils.other import ModulesToSaveWrapper

    for path, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            yield f"{path}: a trained copy of a whole module (modules_to_save) is no low-rank change; {_MERGE}"
        if isinstance(module, TrainableTokensLayer):
            yield f"{path}: trained token rows are no low-rank change; {_MERGE}"
    for path, layer in layers.items():
        deltas.check_layer(path, layer)
        if any(deltas.is_dora(layer, adapter) for adapter in deltas.adapters_at_work(layer)):
            yield f"{path}: llama.cpp knows no DoRA; {_MERGE}"
        if deltas.has_extra_bias(layer):
            yield f"{path}: the adapter has a bias, which the file cannot hold; {_MERGE}"
        if tied and isinstance(layer.get_base_layer(), nn.Embedding):
            yield f"{path}: the embedding is also the output head, and the adapter is on one of them; {_MERGE}"
        if tied and path == "lm_head":
            yield f"{path}: the head is the embedding, and the adapter is on one of them; {_MERGE}"


def _pair(path: str, layer: Any, name: str, spec: ModelSpec, heads: Heads) -> _Pair:
    parts = [_factors(layer, adapter) for adapter in deltas.adapters_at_work(layer)]
    single = len(parts) == 1
    a = torch.cat([a for a, _, _ in parts])
    b = parts[0][1] if single else torch.cat([scale * b for _, b, scale in parts], dim=1)
    change = change_of(f"{path}.weight", name, spec, heads)
    b = b if change is None else change(b)  # reorders rows, as in the weight itself
    alpha = parts[0][2] * len(a) if single else None
    return _Pair(name, f"{path}.weight", a.T.contiguous() if name == _EMBEDDING else a, b, alpha)


def _factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor, float]:
    """Return A [r, in], B [out, r] in fp32, and the scale."""
    embedding = adapter in layer.lora_embedding_A
    a = layer.lora_embedding_A[adapter] if embedding else layer.lora_A[adapter].weight
    b = layer.lora_embedding_B[adapter] if embedding else layer.lora_B[adapter].weight
    return a.detach().float().cpu(), b.detach().float().cpu(), float(layer.scaling[adapter])
