"""Parameter groups: a learning rate of their own for embeddings, and LoRA+ (arXiv 2402.12354) for the B matrices.

And whether the state of an optimizer fits another one, which is asked before a run goes on from a checkpoint.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastft.errors import Problem, UsageError
from fastft.state import base_model
from fastft.train.arguments import text_of
from fastft.train.overrides import has_own

# Optimizers that differ in how they compute or where they keep a state, and not in what it holds.
ALIKE = (
    ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused"),
    ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"),
    ("ademamix", "paged_ademamix_32bit"),
    ("ademamix_8bit", "paged_ademamix_8bit"),
    ("lion_32bit", "paged_lion_32bit"),
    ("lion_8bit", "paged_lion_8bit"),
    ("rmsprop_bnb", "rmsprop_bnb_32bit"),
)
# Methods of a trainer that make its optimizer or choose it: by the config, unless they are the user's own.
MAKING = ("create_optimizer", "create_optimizer_and_scheduler", "get_optimizer_cls_and_kwargs")
# Of a run's record: whether its optimizer was given, whatever the record's config says.
GIVEN = "optimizer_given"
# Fields that put parameters into groups of their own where they are set, whatever rate they say.
GROUPING = ("embedding_learning_rate", "loraplus_ratio")


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


def is_given(trainer: Any, made: torch.optim.Optimizer | None) -> bool:
    """Say whether a trainer's optimizer is its user's, or a subclass's to make, whatever its config says.

    `made`: the one that was made as the config says, None before that.
    """
    if trainer.optimizer_cls_and_kwargs is not None:
        return True
    there = trainer.optimizer
    if there is not None and getattr(there, "optimizer", there) is not made:  # accelerate may have wrapped it
        return True
    return has_own([trainer], *MAKING)


def unlike(args: Any, record: Mapping[str, Any], folder: Path) -> list[Problem]:
    """Return where an optimizer that `args` ask for cannot take up the state in the checkpoint `folder`.

    `record` is the checkpoint's; what it does not say is not compared, nor an optimizer that was given to its run.
    """
    if record.get(GIVEN):
        return []
    there = {**(record.get("config") or {}), **(record.get("held") or {})}
    owner, problems = type(args).__name__, []
    weights = f"fastft.load({str(folder)!r}) takes the weights alone, for a new run."
    made, asked = there.get("optim"), text_of(args.optim)
    if made is not None and made != asked and not any({made, asked} <= set(names) for names in ALIKE):
        expected, remedy = f"{made!r}, whose state {folder} has", f"Say optim={made!r} to go on from it. {weights}"
        problems.append(Problem(f"{owner} optim", asked, expected, remedy))
    for name in GROUPING:
        if name not in there or (there[name] is None) == (getattr(args, name) is None):
            continue
        say = f"Leave {name} out" if there[name] is None else f"Say {name}={there[name]!r}"
        expected = f"{there[name]!r}, by which the optimizer of {folder} has its groups of parameters"
        problems.append(Problem(f"{owner} {name}", getattr(args, name), expected, f"{say} to go on from it. {weights}"))
    return problems
