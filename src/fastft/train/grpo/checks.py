"""Arguments of reinforcement learning: what is refused, and what is handed on in which form."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastft.errors import LoadError, Problem, UsageError
from fastft.model.files import locate
from fastft.rewards import guard
from fastft.rewards.guarding import columns_of, parameters_of, problems_of
from fastft.rewards.making import NO_COLUMNS, missing_column, missing_parameter
from fastft.rewards.traits import name_of
from fastft.state import base_model
from fastft.train.grpo import prompts
from fastft.train.grpo.config import GRPOConfig


def guarded(functions: Any, args: GRPOConfig) -> list[Any]:
    """Return the rewards, which `refuse` has seen, each under guard."""
    return guard(listed(functions), time_limit=args.reward_time_limit)


def listed(functions: Any) -> list[Any]:
    """Return rewards as a list, as which one alone may be given as well."""
    return [] if functions is None else list(functions) if isinstance(functions, list | tuple) else [functions]


def refuse_columns(functions: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise `UsageError` for columns that rewards look at, or must be called with, and the data do not have.

    Nothing is known where a `rollout_func` may give more of them with what it samples.
    """
    if kwargs.get("rollout_func") is not None:
        return
    problems = []
    for argument in ("train_dataset", "eval_dataset"):
        data = kwargs.get(argument)
        for rows in data.values() if isinstance(data, Mapping) else [data]:
            there = getattr(rows, "column_names", None)
            if there is None:
                continue  # a stream that does not say its columns
            others = [column for column in there if column not in ("prompt", "completion")]
            known = (*others, *NO_COLUMNS)
            for told, wanted in ((missing_column, columns_of), (missing_parameter, parameters_of)):
                problems += [told(name, one, others) for name, one in wanted(functions) if one not in known]
    if problems:
        raise UsageError(*problems)


def _deaf(functions: Sequence[Any]) -> list[Problem]:
    """Return the functions among rewards that refuse the names by which columns, token ids and more come."""
    problems = []
    for function in functions:
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):  # no function, or one that does not tell
            continue
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in signature.parameters.values()):
            remedy = "Columns of the data, completion_ids and more come by their names: end it with **columns."
            problems.append(
                Problem("reward", f"{name_of(function)}{signature}", "a function that takes any name", remedy)
            )
    return problems


def _model_problems(functions: Sequence[Any]) -> list[Problem]:
    """Return the texts among rewards that stand for no model that can be had."""
    problems = []
    for number, name in enumerate(functions):
        if not isinstance(name, str):
            continue
        try:
            locate(name)
        except LoadError as error:
            remedy = f"Pass the function itself, not its name. As a model it cannot be had: {error}"
            expected = "a function, or a model that scores (a folder, or a name of the hub)"
            problems.append(Problem(f"rewards[{number}]", name, expected, remedy))
    return problems


def datasets(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the trainer's data as data sets with a `prompt`. Raises `DataError`."""
    made = {}
    for argument, name in (("train_dataset", "train"), ("eval_dataset", "eval")):
        data = kwargs.get(argument)
        if data is None or kwargs.get("environment_factory") is not None:
            continue
        parts = isinstance(data, Mapping) and name == "eval"
        made[argument] = (
            {part: prompts.as_dataset(rows, part) for part, rows in data.items()}
            if parts
            else prompts.as_dataset(data, name)
        )
    return made


def refuse(model: Any, args: GRPOConfig, functions: Sequence[Any], kwargs: Mapping[str, Any], compile: bool) -> None:
    """Raise `UsageError` with everything that is missing or cannot be served, before anything is built."""
    problems: list[Problem | str] = [*problems_of(functions), *_model_problems(functions), *_deaf(functions)]
    if args.merge_micro_batches and not compile:
        remedy = "What fits is said by the memory plan of compiled layers."
        problems.append(Problem("GRPOConfig merge_micro_batches", True, "None or False with compile=False", remedy))
    environment = kwargs.get("environment_factory")
    if not functions and environment is None:
        problems.append(Problem("GRPOTrainer reward_funcs", functions, "at least one function (see fastft.rewards)"))
    if args.reward_weights is not None and environment is None and len(args.reward_weights) != len(functions):
        expected = f"{len(functions)} weights, one of each reward"
        problems.append(Problem("GRPOConfig reward_weights", args.reward_weights, expected))
    if kwargs.get("train_dataset") is None and environment is None:
        problems.append(Problem("GRPOTrainer train_dataset", None, "rows with a column 'prompt'"))
    processing = kwargs.get("processing_class")
    if processing is None or hasattr(processing, "image_processor"):
        given = type(processing).__name__ if processing is not None else None
        problems.append(
            Problem("GRPOTrainer processing_class", given, "a tokenizer", "Models of text alone are trained.")
        )
    config = base_model(model).config.get_text_config()
    coefficient = args.router_aux_loss_coef
    if coefficient is None:
        coefficient = getattr(config, "router_aux_loss_coef", 0.0)
    if hasattr(config, "output_router_logits") and coefficient:
        remedy = "Log-probabilities come without the router's loss; set router_aux_loss_coef=0.0."
        problems.append(Problem("GRPOConfig router_aux_loss_coef", coefficient, "0.0", remedy))
    if problems:
        raise UsageError(*problems)


def refuse_correction(args: GRPOConfig, corrects: bool) -> None:
    """Raise `UsageError` for a correction of the engine's log-probabilities that the loss cannot take."""
    if args.loss_type == "vespo" and corrects and not args.vllm_importance_sampling_mode.startswith("token"):
        expected = "'token_truncate' or 'token_mask' with loss_type='vespo'"
        raise UsageError(
            Problem("GRPOConfig vllm_importance_sampling_mode", args.vllm_importance_sampling_mode, expected)
        )


def vllm_options(args: GRPOConfig, largest: tuple[int, int] | None) -> dict[str, Any]:
    """Return the options of the engine "vllm" that TRL's fields, and the prompts, say."""
    options: dict[str, Any] = {"max_length": args.vllm_max_model_length or (largest[1] if largest else None)}
    if args.vllm_gpu_memory_utilization != GRPOConfig.vllm_gpu_memory_utilization:
        options["gpu_memory_utilization"] = args.vllm_gpu_memory_utilization
    return {name: value for name, value in options.items() if value is not None}


def drops_out(model: Any) -> bool:
    """Say whether the model drops anything out in training mode."""
    return any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
