"""A GGUF file read back: its tensors dequantised, and put where a transformers model has them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastft.errors import LoadError, UsageError
from fastft.export.engines import fill
from fastft.export.gguf.architecture import heads_of
from fastft.export.gguf.file import GgufFile
from fastft.export.gguf.tensors import change_of, gguf_name
from fastft.export.weights import weight_source


def dequantised_model(file: GgufFile, model: Any) -> Any:
    """Return a transformers model in fp32 with the weights of a GGUF file.

    `model` gives architecture and config: what the file's metadata says of these is not tried. Raises `LoadError` for
    a file that lacks weights of the model, and `UsageError` for an architecture without a spec.
    """
    from transformers import AutoModelForCausalLM

    from fastft.registry.resolve import find

    source = weight_source(model)
    spec = source.state.spec or find(source.config)
    if spec is None:
        raise UsageError(f"{file.path}: fastft has no spec for {source.config.model_type!r} and cannot read it back")
    config = source.config.get_text_config()
    heads = heads_of(config)
    stored: dict[str, Callable[[], Tensor]] = {}
    problems = []
    for name, weight in source.weights.items():
        there = gguf_name(config, spec, name)
        change = None if there is None else change_of(name, there, spec, heads)
        if there in file.tensors:
            stored[name] = lambda there=there, shape=weight.shape, change=change: restored(
                dequantised(file, there).reshape(shape), change
            )
        elif name.endswith(".bias"):
            stored[name] = lambda shape=weight.shape: torch.zeros(shape)  # zeros are not written
        else:
            problems.append(f"{file.path}: it lacks {name} (as {there})")
    if problems:
        raise LoadError(*problems[:10])
    filled = AutoModelForCausalLM.from_config(source.config, dtype=torch.float32)
    return fill(filled, list(stored), lambda name: stored[name]()).eval()


def dequantised(file: GgufFile, name: str) -> Tensor:
    """Return a tensor of a GGUF file as fp32, shaped as torch has it, through gguf-py's own dequantisation."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    entry = file.tensors[name]
    data = file.data(name).reshape(*entry.shape[:-1], -1)
    return torch.from_numpy(dequantize(data, GGMLQuantizationType[entry.type.upper()]).copy()).reshape(entry.shape)


def restored(values: Tensor, change: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Undo what was done to a weight on its way into the file: an order of rows, and a constant that was added.

    Both are read off what the change makes of the rows' numbers and of zeros.
    """
    if change is None:
        return values
    probe = (values.shape[0], *(1 for _ in values.shape[1:]))
    constant = change(torch.zeros(probe))
    rows = (change(torch.arange(values.shape[0], dtype=torch.float64).reshape(probe)) - constant).reshape(-1)
    out = torch.empty_like(values)
    out[rows.round().long()] = values - constant
    return out
