"""`FastLanguageModel.get_peft_model`: arguments checked together, translated, and handed to `fastft.add_lora`."""

from collections.abc import Mapping, Sequence
from typing import Any

from attrs import evolve

from fastft.errors import Problem, UsageError, argument_names
from fastft.facade.methods import with_methods
from fastft.facade.names import IDLE_IN_ADAPTERS, REFUSED_IN_ADAPTERS, plan_for, sort_out
from fastft.given import model_problem, refuse
from fastft.model.adapters import DEFAULT_SEED, PASSED_ON, add_lora, linear_names, problems_of
from fastft.state import base_model, get_state, update_state

OWNER = "get_peft_model"
# What add_lora calls them -> what they are called here.
_NAMES = {
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "targets": "target_modules",
    "rslora": "use_rslora",
    "dora": "use_dora",
    "init": "init_lora_weights",
    "layers": "layers_to_transform",
    "seed": "random_state",
    "train_tokens": "trainable_token_indices",
}
Targets = str | Sequence[str] | None


def get_peft_model(
    model: Any,
    r: int = 16,
    target_modules: Targets = None,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    bias: str = "none",
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: str | Sequence[str] | None = None,
    use_gradient_checkpointing: bool | str | None = None,
    random_state: int = DEFAULT_SEED,
    max_seq_length: int | None = None,
    use_rslora: bool = False,
    modules_to_save: Sequence[str] | None = None,
    init_lora_weights: bool | str = True,
    loftq_config: Any = None,
    *,
    use_dora: bool = False,
    finetune_last_n_layers: int | None = None,
    finetune_language_layers: bool = True,
    finetune_attention_modules: bool = True,
    finetune_mlp_modules: bool = True,
    trainable_token_indices: Any = "added",
    task_type: Any = "CAUSAL_LM",
    **options: Any,
) -> Any:
    """Return a PEFT model with a LoRA adapter on `model` (`fastft.add_lora`), in training mode.

    * `target_modules`: names, "all-linear" or a regular expression; None is the family's own list (q, k, v, o, gate, up
      and down projections where they are separate). "embed_tokens" there is trained whole, as in `modules_to_save`.
    * `use_gradient_checkpointing`: True and "unsloth" ask for the memory plan "min", False for "keep", None leaves what
      `from_pretrained` was told.
    * `finetune_attention_modules`, `finetune_mlp_modules`: False takes these away from the targets;
      `finetune_last_n_layers` adapts the last layers alone.
    * `options`: those that `add_lora` passes on to PEFT; what has no meaning here is accepted with one line each.

    A model loaded with full_finetuning=True is returned as it is, with a line. So is one that carries the same adapter
    already; another adapter is an error. Raises `UsageError` with all mistakes at once.
    """
    check_model(OWNER, model)
    lines: list[str] = []
    plan, wrong_plan = plan_for(OWNER, use_gradient_checkpointing)
    layers, wrong_layers = _last_layers(model, layers_to_transform, finetune_last_n_layers)
    names, whole = _whole_embeddings(model, target_modules, modules_to_save, lines)
    parts = (finetune_language_layers, finetune_attention_modules, finetune_mlp_modules)
    targets, wrong_parts = _parts(model, names, *parts)
    known = argument_names(get_peft_model)
    rest = sort_out(OWNER, options, known, PASSED_ON, IDLE_IN_ADAPTERS, REFUSED_IN_ADAPTERS)
    wrong = [*rest.problems, wrong_plan, wrong_layers, *wrong_parts, _task_problem(task_type)]
    wrong += _loftq(loftq_config, init_lora_weights, lines)
    _tell_length(model, max_seq_length, lines)
    arguments = {
        "r": r,
        "alpha": lora_alpha,
        "dropout": lora_dropout,
        "targets": targets,
        "bias": bias,
        "rslora": use_rslora,
        "dora": use_dora,
        "init": init_lora_weights,
        "modules_to_save": whole,
        "layers": layers,
        "layers_pattern": layers_pattern,
        "train_tokens": trainable_token_indices,
        "seed": random_state,
    }
    problems = [problem for problem in wrong if problem is not None]
    return _attach(model, arguments, rest.passed, problems, [*lines, *rest.lines], plan)


def check_model(owner: str, model: Any) -> None:
    """Raise `UsageError` if `model` is not a language model, but its tokenizer, say."""
    refuse(model_problem(model, f"{owner} model"))


def _task_problem(task: Any) -> Problem | None:
    if getattr(task, "value", task) in (None, "CAUSAL_LM"):
        return None
    return Problem(f"{OWNER} task_type", task, "'CAUSAL_LM'", "Other tasks are not supported.")


def _tell_length(model: Any, length: Any, lines: list[str]) -> None:
    known = get_state(model).max_length
    if length is not None and length != known:
        why = f"from_pretrained has set the length, {known} tokens"
        lines.append(f"fastft: {OWNER}(max_seq_length={length!r}) has no effect: {why}.")


def _attach(
    model: Any,
    arguments: Mapping[str, Any],
    passed: Mapping[str, Any],
    problems: list[Problem | str],
    lines: list[str],
    plan: str | None,
) -> Any:
    full, carried = get_state(model).full, getattr(model, "peft_config", None)
    if carried:
        problems += _differences(carried, arguments)
    elif not full:
        problems += [_renamed(problem) for problem in problems_of(model, arguments, passed)]
    if problems:
        raise UsageError(*problems)
    if full:
        lines.append(f"fastft: {OWNER}: full_finetuning=True trains every weight, so no adapter is put on the model.")
    elif carried:
        lines.append(f"fastft: {OWNER}: the model carries this adapter already and goes on with it.")
    for line in lines:
        print(line)
    if not full and not carried:
        model = add_lora(model, **arguments, **passed)
    if plan is not None:
        update_state(model, plan=plan)
    return with_methods(model.train())


def _renamed(problem: Problem | str) -> Problem | str:
    if isinstance(problem, str):
        return problem.replace("add_lora:", f"{OWNER}:", 1)
    return evolve(problem, where=f"{OWNER} {_NAMES.get(problem.where, problem.where)}")


def _last_layers(model: Any, layers: Any, last: Any) -> tuple[Any, Problem | None]:
    """Return the layers to adapt, of which `last` counts from the end."""
    if last is None:
        return layers, None
    where, count = f"{OWNER} finetune_last_n_layers", base_model(model).config.get_text_config().num_hidden_layers
    if layers is not None:
        return layers, Problem(where, last, "None together with layers_to_transform")
    if not isinstance(last, int) or isinstance(last, bool) or not 1 <= last <= count:
        return None, Problem(where, last, f"a whole number from 1 to {count}")
    return list(range(count - last, count)), None


def _whole_embeddings(
    model: Any, targets: Targets, whole: Sequence[str] | None, lines: list[str]
) -> tuple[Targets, Sequence[str] | None]:
    """Move embeddings named as targets to the modules trained whole, and a head that shares their weight with them."""
    if targets is None or isinstance(targets, str) or "embed_tokens" not in targets:
        return targets, whole
    base = base_model(model)
    head = base.get_output_embeddings()
    tied = head is not None and head.weight is base.get_input_embeddings().weight
    moved = [name for name in ("embed_tokens", "lm_head") if name in targets and (tied or name == "embed_tokens")]
    lines.append(f"fastft: {OWNER}: {' and '.join(moved)} of target_modules moved to modules_to_save: trained whole.")
    return [name for name in targets if name not in moved], [*(whole or ()), *moved]


def _parts(model: Any, targets: Targets, language: bool, attention: bool, mlp: bool) -> tuple[Targets, list[Problem]]:
    """Take the attention's or the MLP's projections away from the targets."""
    if not language:
        remedy = "There are no other layers in a text model."
        return targets, [Problem(f"{OWNER} finetune_language_layers", language, "True", remedy)]
    if attention and mlp:
        return "spec" if targets is None else targets, []
    base, spec = base_model(model), get_state(model).spec
    where = f"{OWNER} finetune_attention_modules, finetune_mlp_modules"
    kinds = {name.rpartition(".")[2]: _in_attention(name) for name in linear_names(base)}
    if isinstance(targets, str) and targets != "all-linear":
        remedy = "Write the parts into target_modules itself."
        return targets, [Problem(where, (attention, mlp), f"True with target_modules={targets!r}", remedy)]
    if targets is None and spec is not None:
        targets = [name for name in spec.lora_targets if name in kinds]
    if targets in (None, "all-linear"):
        targets = list(kinds)
    # A name that is no linear layer stays, so that it is refused under its own name.
    left = [name for name in targets if name not in kinds or (attention if kinds[name] else mlp)]
    if not left:
        return targets, [Problem(where, (attention, mlp), f"something of {', '.join(targets)} left to adapt")]
    return left, []


def _in_attention(path: str) -> bool:
    return any("attn" in part or "attention" in part for part in path.split(".")[:-1])


def _loftq(config: Any, init: Any, lines: list[str]) -> list[Problem]:
    """Check a loftq_config: LoftQ here is 4 bits and one step."""
    if not config:
        return []
    plain = config if isinstance(config, Mapping) else vars(config)
    if init != "loftq":
        lines.append(f"fastft: {OWNER}(loftq_config=...) has no effect without init_lora_weights='loftq'.")
        return []
    where, only = f"{OWNER} loftq_config", {"loftq_bits": 4, "loftq_iter": 1}
    return [
        Problem(f"{where} {name}", value, f"{only[name]}" if name in only else f"only {', '.join(only)}")
        for name, value in plain.items()
        if value != only.get(name)
    ]


def _differences(carried: Mapping[str, Any], arguments: Mapping[str, Any]) -> list[Problem]:
    """Return where the adapter that the model carries differs from the one that is asked for."""
    config = next(iter(carried.values()))
    has = {
        "r": config.r,
        "alpha": config.lora_alpha,
        "dropout": config.lora_dropout,
        "bias": config.bias,
        "rslora": config.use_rslora,
        "dora": config.use_dora,
    }
    if not isinstance(arguments["targets"], str):
        has["targets"] = (
            sorted(config.target_modules) if not isinstance(config.target_modules, str) else config.target_modules
        )
    remedy = "Leave it as it is to go on with that adapter, or merge it (merge_and_unload) before adding another."
    asked = {**arguments, "targets": sorted(arguments["targets"]) if "targets" in has else None}
    return [
        Problem(f"{OWNER} {_NAMES.get(name, name)}", asked[name], f"{value!r}, as the model's adapter has it", remedy)
        for name, value in has.items()
        if asked[name] != value
    ]
