"""Names: what older scripts pass, the plain names of `sft`, and what to say to an unknown one."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from fastft.errors import Problem, UsageError, did_you_mean

# What older scripts pass to the trainer itself -> the field of the config it has become.
LEGACY = {
    "dataset_text_field": "dataset_text_field",
    "max_seq_length": "max_length",
    "packing": "packing",
    "dataset_num_proc": "dataset_num_proc",
    "dataset_kwargs": "dataset_kwargs",
    "eval_packing": "eval_packing",
    "neftune_noise_alpha": "neftune_noise_alpha",
}

# Plain names of `sft` -> fields of SFTConfig.
PLAIN = {
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "accumulate": "gradient_accumulation_steps",
    "schedule": "lr_scheduler_type",
    "optimizer": "optim",
    "log_every": "logging_steps",
    "save_every": "save_steps",
    "eval_every": "eval_steps",
    "keep_checkpoints": "save_total_limit",
    "label_smoothing": "label_smoothing_factor",
}

# Fields that had another name in earlier versions of transformers or TRL.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "group_by_length": "train_sampling_strategy='group_by_length'",
}


def refuse_unknown(owner: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raise `UsageError` that names every one of `names` that is not in `known`, with the nearest that is."""
    known = sorted(known)
    problems = []
    for name in names:
        if name in known:
            continue
        near = f"it is called {RENAMED[name]} now" if name in RENAMED else did_you_mean(name, known)
        problems.append(f"{owner}: unknown argument {name!r}" + (f"; {near}" if near else ""))
    if problems:
        raise UsageError(*problems)


def field_names(config: type) -> list[str]:
    """Return the names that the dataclass `config` takes."""
    return [item.name for item in dataclasses.fields(config) if item.init]


def moved(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Turn what older scripts pass to the trainer into fields of the config, with one line about each."""
    fields = {LEGACY[name]: value for name, value in arguments.items()}
    lines = [
        f"fastft: SFTTrainer({name}=...) is now SFTConfig({LEGACY[name]}=...); {value!r} was moved there."
        for name, value in arguments.items()
    ]
    return fields, lines


def config_fields(options: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """Turn the plain names of `sft` into fields of SFTConfig; a field's own name is taken as well.

    Raises `UsageError` for unknown names, and for a field given under both names.
    """
    refuse_unknown("sft", options, {*known, *PLAIN})
    doubled = [
        Problem(
            f"sft: {plain} and {name}", (options[plain], options[name]), "one of the two: they are the same setting"
        )
        for plain, name in PLAIN.items()
        if plain in options and name in options
    ]
    if doubled:
        raise UsageError(*doubled)
    return {PLAIN.get(name, name): value for name, value in options.items() if value is not None}


def refuse_early_stopping(args: Any, eval_dataset: Any) -> None:
    """Raise `UsageError` if early stopping has no evaluation to watch."""
    if args.early_stopping_patience is None:
        return
    if eval_dataset is None or str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "no":
        remedy = "Pass eval data and eval_strategy='steps' or 'epoch', or leave early stopping out."
        raise UsageError(
            Problem("early_stopping_patience", args.early_stopping_patience, "an evaluation to watch", remedy)
        )


def refuse_numbers(args: Any) -> None:
    """Refuse numbers that cannot be meant, all at once."""
    least = {
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "early_stopping_patience": 1,
        "max_length": 2,
    }
    problems = [
        Problem(f"SFTConfig {name}", getattr(args, name), f"at least {bound}")
        for name, bound in least.items()
        if getattr(args, name) is not None and getattr(args, name) < bound
    ]
    for name in ("learning_rate", "embedding_learning_rate", "loraplus_ratio"):
        value = getattr(args, name)
        if value is not None and not (value >= 0 and math.isfinite(value)):
            problems.append(Problem(f"SFTConfig {name}", value, "a finite number of at least 0"))
    if problems:
        raise UsageError(*problems)


def evaluation_defaults(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return when to evaluate (and, with early stopping, to save) where the user has not said it."""
    every = fields.get("eval_steps")
    defaults: dict[str, Any] = {"eval_strategy": "steps" if every else "epoch"}
    if fields.get("early_stopping_patience") is not None:
        defaults |= {"save_strategy": defaults["eval_strategy"]}
        defaults |= {"save_steps": every} if every else {}
    return defaults
