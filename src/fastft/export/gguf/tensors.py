"""From the weights of a transformers checkpoint to the tensors of a GGUF file: names, order of rows, folded offsets."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from fastft.errors import UsageError
from fastft.export.gguf.architecture import Heads, heads_of
from fastft.export.weights import WeightSource
from fastft.registry.spec import ModelSpec


@frozen(eq=False)
class FileTensor:
    """One tensor of the file: its name there, its shape, the weight it comes from, and `read()` in fp32."""

    name: str
    shape: tuple[int, ...]
    weight: str
    read: Callable[[], Tensor]


def plan_tensors(source: WeightSource, spec: ModelSpec, extra: Mapping[str, Tensor]) -> list[FileTensor]:
    """Return the tensors of the file in the order of the source, `extra` first; nothing is read but small biases.

    Raises UsageError that names every weight that the architecture has no place for.
    """
    name_of, heads = _name_map(source.config.get_text_config(), spec), heads_of(source.config.get_text_config())
    planned = [
        FileTensor(f"{name}.weight", tuple(values.shape), name, partial(_given, values))
        for name, values in extra.items()
    ]
    problems = []
    for weight in source.names:
        name = name_of(weight)
        if name is None:
            problems.append(f"{weight}: the architecture {spec.gguf_architecture!r} has no place for this weight")
        elif weight.endswith(".bias") and weight.split(".")[-2] not in spec.gguf.biases:
            # models carry these as zeros; a real one cannot be dropped
            if source.read(weight).any():
                problems.append(f"{weight}: llama.cpp's {spec.gguf_architecture!r} reads no bias here, and it is not 0")
        else:
            change = change_of(weight, name, spec, heads)
            planned.append(FileTensor(name, source.shape(weight), weight, partial(_changed, source, weight, change)))
    if problems:
        raise UsageError(*problems)
    return planned


def _given(values: Tensor) -> Tensor:
    return values


def _changed(source: WeightSource, weight: str, change: Callable[[Tensor], Tensor] | None) -> Tensor:
    values = source.read(weight)
    return values if change is None else change(values)


def _name_map(config: Any, spec: ModelSpec) -> Callable[[str], str | None]:
    """Return the function from a checkpoint's names to those of GGUF, None for a weight without a place."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    number = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == spec.gguf_architecture)
    names = get_tensor_name_map(number, config.num_hidden_layers)
    return lambda weight: names.get_name(weight, try_suffixes=(".weight", ".bias"))


def gguf_name(config: Any, spec: ModelSpec, weight: str) -> str | None:
    """Return the name that a weight has in GGUF files, None if the architecture has no place for it."""
    return _name_map(config, spec)(weight)


def change_of(weight: str, name: str, spec: ModelSpec, heads: Heads) -> Callable[[Tensor], Tensor] | None:
    """Return what is done to a weight's values on the way into the file, None for nothing.

    * Queries and keys of a model that rotates features (i, i + R/2), for an architecture in which llama.cpp rotates
      (2i, 2i + 1): rows are reordered within each head, which changes no score.
    * Norms that multiply by (offset + weight): the offset is added.
    """
    module = weight.split(".")[-2] if "." in weight else weight
    if spec.gguf.rope == "interleaved" and spec.attentions[0].rope == "half" and module in _ROTATED:
        return partial(pairs_from_halves, heads=heads)
    offset = spec.norms[0].offset if name.endswith("_norm.weight") else 0.0
    return partial(torch.add, other=offset) if offset else None


_ROTATED = ("q_proj", "k_proj", "q_norm", "k_norm")


def pairs_from_halves(values: Tensor, heads: Heads) -> Tensor:
    """Reorder rows [heads * size, ...] so that the features (i, i + R/2) of each head become (2i, 2i + 1)."""
    by_head = values.reshape(-1, heads.size, *values.shape[1:])
    rotated, rest = by_head[:, : heads.rotated], by_head[:, heads.rotated :]
    pairs = rotated.unflatten(1, (2, heads.rotated // 2)).transpose(1, 2).flatten(1, 2)
    return torch.cat((pairs, rest), dim=1).reshape(values.shape)
