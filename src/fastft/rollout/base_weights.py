"""The base weights that an engine starts from: those that training computes with, adapters aside.

An engine that loaded a 16-bit checkpoint for a model that trains on its NF4 would sample from another policy than the
one that learns, and one that quantised for itself would be slow at it. So what is quantised is written once, as the
16-bit numbers that it stands for; what is not is taken from the checkpoint's own files.
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastft.errors import EngineError
from fastft.model import files
from fastft.model.dense import dense_like
from fastft.state import base_model, get_state

SHARD_BYTES = 2 << 30
# Ways to start an adapter that change the base weights beside it.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")


def bytes_to_write(model: Any) -> int:
    """Return how many bytes `write_base` will write; 0 where the checkpoint's own files serve."""
    if files_of(model):
        return 0
    base = base_model(model)
    numbers = sum(_numbers(p) for name, p in base.named_parameters() if "lora_" not in name)
    return numbers * base.dtype.itemsize


def files_of(model: Any) -> tuple[Path, ...]:
    """Return the safetensors files that hold the base weights of `model` as it computes with them, () if none do."""
    state = get_state(model)
    configs = (getattr(model, "peft_config", None) or {}).values()
    starts = [str(getattr(config, "init_lora_weights", True)).lower() for config in configs]
    changed = any(start.startswith(_CHANGES_BASE) for start in starts) or state.loftq or bool(state.added_tokens)
    if state.quant or state.full or changed or not state.source:
        return ()
    folder = files.locate(state.source, state.revision)
    return tuple(sorted(folder.glob("*.safetensors")))


def write_base(model: Any, folder: Path) -> Path:
    """Put a checkpoint of the base of `model` into `folder`, in its 16 or 32 bits, and return the folder.

    Weights that the checkpoint holds as they are become links to its files. The config is the model's own.
    """
    base = base_model(model)
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(base.config)
    config.architectures = [type(base).__name__]
    config.dtype = base.dtype
    for name in ("quantization_config", "_pre_quantization_dtype"):
        config.__dict__.pop(name, None)
    config.save_pretrained(folder)
    stored = files_of(model)
    for path in stored:
        (folder / path.name).symlink_to(path.resolve())
        index = path.parent / "model.safetensors.index.json"
        if index.is_file() and not (folder / index.name).exists():
            (folder / index.name).symlink_to(index.resolve())
    if not stored:
        _write_shards(base, folder)
    return folder


def base_tensors(base: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield name and dense tensor of every weight of a transformers model, wrappers of adapters looked through.

    Tensors are in the model's dtype and on its device; a weight that is tied to the embedding is left out.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    tied = base.get_input_embeddings().weight if base.config.get_text_config().tie_word_embeddings else None
    inside: tuple[str, ...] = ()
    for path, module in base.named_modules():
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, path)
        if any(path.startswith(f"{wrapper}.") and ".base_layer" not in path for wrapper in inside):
            continue  # an adapter's own matrices
        for name, parameter in module._parameters.items():
            if parameter is None or (parameter is tied and module is not base.get_input_embeddings()):
                continue
            full = f"{path}.{name}".replace(".base_layer.", ".")
            yield full, _dense(full, name, module, parameter, base.dtype)


def _dense(full: str, name: str, module: nn.Module, parameter: Tensor, dtype: torch.dtype) -> Tensor:
    if parameter.is_floating_point() and not hasattr(parameter, "quant_state"):
        return parameter.detach().to(dtype)
    return dense_like(full, name, module, parameter)[2]().to(dtype)


def _numbers(parameter: Tensor) -> int:
    state = getattr(parameter, "quant_state", None)
    return torch.Size(state.shape).numel() if state is not None else parameter.numel()


def _write_shards(base: Any, folder: Path) -> None:
    from safetensors.torch import save_file

    names: dict[str, str] = {}
    held: dict[str, Tensor] = {}
    size, total, count = 0, 0, 0

    def flush() -> None:
        nonlocal held, size, count
        count += 1
        file = f"model-{count:05d}.safetensors"
        save_file(held, folder / file, metadata={"format": "pt"})
        names.update(dict.fromkeys(held, file))
        held, size = {}, 0

    for name, tensor in base_tensors(base):
        if name in names or name in held:
            raise EngineError(f"base weights: two tensors are called {name!r}; engine='transformers' needs no names")
        held[name] = tensor.to("cpu", copy=True).contiguous()
        size += held[name].nbytes
        total += held[name].nbytes
        if size >= SHARD_BYTES:
            flush()
    if held:
        flush()
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
