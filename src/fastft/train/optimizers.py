"""Parameter groups: a learning rate of their own for embeddings, and LoRA+ (arXiv 2402.12354) for the B matrices."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from fastft.errors import Problem, UsageError
from fastft.state import base_model


def embedding_parameters(model: Any) -> dict[str, nn.Parameter]:
    """Return the trainable parameters of the input embeddings and, unless they are LoRA's, of the output head."""
    base = base_model(model)
    inside = {id(parameter) for parameter in _parameters(base.get_input_embeddings())}
    head = base.get_output_embeddings()
    if head is not None:
        inside |= {id(parameter) for name, parameter in head.named_parameters() if "lora_" not in name}
    return {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) in inside}


def is_lora_b(name: str) -> bool:
    """Say whether a parameter is the B matrix of a LoRA pair (of a linear layer or an embedding)."""
    return "lora_B" in name or "lora_embedding_B" in name


def param_groups(
    model: Any,
    decayed: Iterable[str],
    *,
    learning_rate: float,
    weight_decay: float,
    embedding_learning_rate: float | None = None,
    loraplus_ratio: float | None = None,
) -> list[dict[str, Any]]:
    """Return optimizer groups over every trainable parameter, the plain group first.

    Embeddings get `embedding_learning_rate`, LoRA's B matrices `learning_rate * loraplus_ratio`, the rest
    `learning_rate`; weight decay goes to the names in `decayed` alone. Raises `UsageError` where a rate was asked for
    that no parameter would use.
    """
    decayed, embeddings = set(decayed), embedding_parameters(model)
    rates = {
        "plain": learning_rate,
        "embedding": embedding_learning_rate,
        "lora_b": learning_rate * (loraplus_ratio or 1.0),
    }
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {("plain", True): []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = "plain"
        if loraplus_ratio is not None and is_lora_b(name):
            kind = "lora_b"
        elif embedding_learning_rate is not None and name in embeddings:
            kind = "embedding"
        groups.setdefault((kind, name in decayed), []).append(parameter)
    _refuse_unused({kind for kind, _ in groups}, embedding_learning_rate, loraplus_ratio)
    return [
        {
            "params": parameters,
            "lr": rates[kind],
            "weight_decay": weight_decay if decay else 0.0,
            "name": f"{kind}{'' if decay else ' without decay'}",
        }
        for (kind, decay), parameters in groups.items()
        if parameters
    ]


def _refuse_unused(kinds: set[str], embedding_learning_rate: float | None, loraplus_ratio: float | None) -> None:
    problems = []
    if embedding_learning_rate is not None and "embedding" not in kinds:
        remedy = "Train them (add_lora(..., modules_to_save=['embed_tokens', 'lm_head'])), or leave the rate out."
        problems.append(
            Problem("embedding_learning_rate", embedding_learning_rate, "a model whose embeddings are trained", remedy)
        )
    if loraplus_ratio is not None and "lora_b" not in kinds:
        problems.append(
            Problem("loraplus_ratio", loraplus_ratio, "a model with trainable LoRA matrices", "Call add_lora first.")
        )
    if problems:
        raise UsageError(*problems)


def _parameters(module: nn.Module | None) -> list[nn.Parameter]:
    return [] if module is None else list(module.parameters())


def with_groups(
    made: tuple[Any, dict[str, Any]], model: Any, config: Any, decayed: Sequence[str]
) -> tuple[Any, dict[str, Any]]:
    """Return the optimizer class and its settings with the groups of `param_groups` in them. Raises `UsageError`."""
    kind, settings = made
    if (
        not isinstance(kind, type)
        or not issubclass(kind, torch.optim.Optimizer)
        or {"params", "model", "optimizer_dict"} & set(settings)
    ):
        remedy = "Use an optimizer over parameter groups (AdamW, its 8-bit and paged kinds, Lion, SGD ...)."
        expected = "no optimizer that chooses its own parameter groups, with separate rates"
        raise UsageError(Problem(f"{type(config).__name__} optim", config.optim, expected, remedy))
    groups = param_groups(
        model,
        decayed,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        embedding_learning_rate=config.embedding_learning_rate,
        loraplus_ratio=config.loraplus_ratio,
    )
    return kind, {**settings, "params": groups}
