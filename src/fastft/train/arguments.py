"""Names: what older scripts pass, the plain names of `sft`, and what to say to an unknown one."""

import copy
import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, Optional

from fastft.environment import installed
from fastft.errors import Problem, UsageError, did_you_mean, unknown_arguments
from fastft.memory.estimate import COMPUTE

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

# Fields that had another name in earlier versions of transformers or TRL, or have one elsewhere.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "group_by_length": "train_sampling_strategy='group_by_length'",
    "lr": "learning_rate",
}
ELSEWHERE = {
    name: f"fastft.compile(model, {name}=...) takes it, before"
    for name in ("plan", "backend", "disable", "implementations")
}
# Arguments of one training function alone, which its options are not -> the function.
ALONE = {
    **dict.fromkeys(("train_on", "alternate", "overlong", "compute_metrics"), "sft"),
    **dict.fromkeys(("rewards", "engine", "engine_options", "chat"), "grpo"),
    **dict.fromkeys(("loss", "ref_model"), "preference"),
}


class DefaultLength(int):
    """A number of tokens that the user has not chosen, to be told from the same number given."""


DEFAULT_LENGTH = DefaultLength(1024)


class DefaultField(str):
    """A column's name that the user has not chosen, to be told from the same name given."""


DEFAULT_FIELD = DefaultField("text")


def with_length(args: Any, loaded: int | None) -> Any:
    """Return a copy of `args` whose `max_length`, if the user has not chosen one, is that of the loaded model."""
    args = copy.copy(args)
    if isinstance(args.max_length, DefaultLength):
        args.max_length = loaded or int(args.max_length)
        if loaded:
            owner = type(args).__name__
            print(f"fastft: max_length={loaded}, as the model was loaded; {owner}(max_length=...) changes it.")
    return args


def refuse_unknown(
    owner: str,
    names: Iterable[str],
    known: Iterable[str],
    unlisted: Iterable[str] = (),
    config: type | None = None,
    belonging: Mapping[str, str] | None = None,
) -> None:
    """Raise `UsageError` that tells every one of `names` that `owner` does not know, with what it is called here.

    `config`: the class of the config beside `owner`'s own arguments, where fields belong into that. `belonging`: what
    to say of names that belong to something else.
    """
    renamed, elsewhere = RENAMED, {**ELSEWHERE, **(belonging or {})}
    if config is not None:
        place = config.__name__
        renamed = {name: f"{place}({field if '=' in field else f'{field}=...'})" for name, field in RENAMED.items()}
        elsewhere |= {name: f"{place}({name}=...) takes it" for name in field_names(config)}
    if problems := unknown_arguments(owner, names, known, renamed, elsewhere, unlisted):
        raise UsageError(*problems)


def field_names(config: type) -> list[str]:
    """Return the names that the dataclass `config` takes."""
    return [item.name for item in dataclasses.fields(config) if item.init]


def config_fields(
    owner: str,
    options: Mapping[str, Any],
    known: Iterable[str],
    plain: Mapping[str, str] = PLAIN,
    belonging: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Turn the plain names of the function `owner` into fields of its config; a field's own name is taken as well.

    Raises `UsageError` for unknown names, and for a field given under both names. `belonging`: what to say of names
    that belong to something else; what to say of those of another training function is known.
    """
    others = {
        name: f"it belongs to fastft.{function}({name}=...)" for name, function in ALONE.items() if function != owner
    }
    known = [*known, *plain, *(name for name, function in ALONE.items() if function == owner)]
    refuse_unknown(owner, options, known, belonging={**others, **(belonging or {})})
    doubled = [
        Problem(
            f"{owner}: {short} and {name}", (options[short], options[name]), "one of the two: they are the same setting"
        )
        for short, name in plain.items()
        if short in options and name in options
    ]
    if doubled:
        raise UsageError(*doubled)
    return {plain.get(name, name): value for name, value in options.items() if value is not None}


NO_EVAL = "Pass them (eval=, of a trainer eval_dataset=), or leave it out."
# Fields that ask for evaluations.
EVALUATING = ("eval_strategy", "eval_steps", "early_stopping_patience", "load_best_model_at_end")


def unevaluated(owner: str, asked: Mapping[str, Any]) -> list[Problem]:
    """Return what of the fields `asked` wants evaluations, where there are no data for them.

    Who says that nothing is evaluated needs none: how often is `contradictions`' to refuse then.
    """
    never = "eval_strategy" in asked and text_of(asked["eval_strategy"]) == "no"
    names = EVALUATING[2:] if never else EVALUATING
    wanted = {name: asked[name] for name in names if asked.get(name) is not None and asked[name] is not False}
    return [Problem(f"{owner} {name}", value, "evaluation data beside it", NO_EVAL) for name, value in wanted.items()]


def uncalled(owner: str, functions: Mapping[str, Any]) -> list[Problem]:
    """Return those of the functions given that evaluations would call, where there are no data for them."""
    given = {name: getattr(one, "__name__", one) for name, one in functions.items() if one is not None}
    return [Problem(f"{owner} {name}", one, "evaluation data beside it", NO_EVAL) for name, one in given.items()]


def refuse_unevaluated(args: Any, eval_dataset: Any) -> None:
    """Raise `UsageError` for evaluations without data."""
    if eval_dataset is not None:
        return
    asked = {name: getattr(args, name) for name in EVALUATING}
    if text_of(args.eval_strategy) == "steps":
        del asked["eval_steps"]  # transformers fills it in
    if args.early_stopping_patience is not None:
        del asked["load_best_model_at_end"]  # which follows from it
    if problems := unevaluated(type(args).__name__, asked):
        raise UsageError(*problems)


def text_of(choice: Any) -> str:
    """Return a choice as its text, which transformers may have made a member of an enumeration."""
    return str(getattr(choice, "value", choice))


def value_problems(args: Any) -> list[Problem]:
    """Return the numbers and switches of a config that cannot be meant, and the choices that there are not."""
    return [*_wrong_numbers(args), *wrong_switches(args), *_wrong_choices(args), *_two_for_one(args), *_unwatched(args)]


def _unwatched(args: Any) -> list[Problem]:
    """Return a schedule that goes by an evaluation's metric, where nothing is evaluated."""
    schedule = text_of(args.lr_scheduler_type)
    if schedule not in ("reduce_lr_on_plateau", "greedy") or text_of(args.eval_strategy) != "no":
        return []
    remedy = "Set eval_strategy='steps' or 'epoch', with evaluation data, or take another one."
    return [Problem(f"{type(args).__name__} lr_scheduler_type", schedule, "an evaluation to watch", remedy)]


def _two_for_one(args: Any) -> list[Problem]:
    """Return where two fields say the same thing, each in its way, or contradict each other in it."""
    problems, owner = [], type(args).__name__
    warmups = {name: getattr(args, name) for name in ("warmup_steps", "warmup_ratio")}
    warmups = {name: value for name, value in warmups.items() if is_above_zero(value)}
    if args.bf16 is True and args.fp16 is True:
        remedy = "Leave both out: the model's own dtype decides."
        problems.append(Problem(f"{owner} bf16 and fp16", (True, True), "one of the two", remedy))
    if text_of(args.lr_scheduler_type) == "constant":  # a warm-up that is left out is 0
        remedy = "That schedule has none: 'constant_with_warmup' has."
        expected = "no warm-up beside lr_scheduler_type='constant'"
        problems += [Problem(f"{owner} {name}", value, expected, remedy) for name, value in warmups.items()]
    elif len(warmups) == 2:
        remedy = "Leave warmup_ratio out: it is the older name of a warmup_steps below 1."
        both = tuple(warmups.values())
        problems.append(Problem(f"{owner} warmup_steps and warmup_ratio", both, "one of the two", remedy))
    return problems


def is_above_zero(value: Any) -> bool:
    """Say whether it is a number above 0; what is no number is told as such."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


# The least that a field may be: of those that count, which are whole numbers, and of the others.
COUNTS = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "eval_accumulation_steps": 1,
    "early_stopping_patience": 1,
    "max_length": 2,
    "max_prompt_length": 1,
    "pad_to_multiple_of": 1,
    "max_steps": -1,
    "save_total_limit": 1,
    "dataset_num_proc": 1,
    "dataloader_num_workers": 0,
    "seed": 0,
    "data_seed": 0,
}
MEASURES = {
    "num_train_epochs": 0,
    "learning_rate": 0,
    "embedding_learning_rate": 0,
    "loraplus_ratio": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "label_smoothing_factor": 0,
    "max_unlearnable": 0,
    "neftune_noise_alpha": 0,
}
MOST = {"label_smoothing_factor": 1}
# Fields that count steps, or say below 1 a share of them all.
SHARES = ("warmup_steps", "logging_steps", "eval_steps", "save_steps")
# Of these, those that say how often -> the field that says whether they do.
EVERY = {"logging_steps": "logging_strategy", "eval_steps": "eval_strategy", "save_steps": "save_strategy"}
REMEDIES = {
    "save_total_limit": "Left out, all are kept; save_strategy='no' writes none.",
    "neftune_noise_alpha": "Left out, no noise is added.",
}


def _wrong_numbers(args: Any) -> list[Problem]:
    problems, owner = [], type(args).__name__
    ratio = args.warmup_ratio
    if ratio is not None and not (isinstance(ratio, int | float) and 0 <= ratio < 1):
        problems.append(Problem(f"{owner} warmup_ratio", ratio, "a share of all steps, from 0 to below 1"))
    if args.compute is not None and args.compute not in COMPUTE:
        near = did_you_mean(str(args.compute), COMPUTE)
        problems.append(Problem(f"{owner} compute", args.compute, f"one of {', '.join(COMPUTE)}", near))
    for name in (*COUNTS, *MEASURES, *SHARES):
        value = getattr(args, name, None)  # of the shared names, a config has those that mean something in it
        left = value is None or (name == "pad_to_multiple_of" and value == "auto")
        told = None if left else _wrong_number(name, value)
        if told:
            problems.append(Problem(f"{owner} {name}", value, *told))
    for name, strategy in EVERY.items():
        value = getattr(args, name)
        if value == 0 and not isinstance(value, bool) and text_of(getattr(args, strategy)) == "steps":
            expected = "a number of steps above 0, or a share of them"
            problems.append(Problem(f"{owner} {name}", value, expected, f"{strategy}='no' means never."))
    if args.num_train_epochs == 0 and not isinstance(args.num_train_epochs, bool) and args.max_steps == -1:
        problems.append(Problem(f"{owner} num_train_epochs", args.num_train_epochs, "a number above 0, or max_steps"))
    if args.max_steps == 0 and not isinstance(args.max_steps, bool):
        problems.append(Problem(f"{owner} max_steps", 0, "at least 1, or -1 to go by num_train_epochs"))
    return problems


def _wrong_number(name: str, value: Any) -> tuple[str, str] | None:
    """Return what is expected of the field instead of `value`, and the remedy; None where nothing is wrong."""
    kind, bound = "number" if name in MEASURES else "whole number", {**COUNTS, **MEASURES}.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"a {kind}", "Write it without quotes." if isinstance(value, str) else ""
    if name in SHARES:
        fits = math.isfinite(value) and value >= 0 and (value < 1 or value == int(value))
        return None if fits else ("a whole number of steps, or a share of them all below 1", "")
    if name in COUNTS and not isinstance(value, int):
        near = f"Write {value:.0f}." if math.isfinite(value) and value == round(value) else ""
        return f"a whole number of at least {bound}", near
    if not (value >= bound and math.isfinite(value)):
        return f"a finite number of at least {bound}", REMEDIES.get(name, "")
    return (f"at most {MOST[name]}", "") if value > MOST.get(name, value) else None


# What fields that are on or off are annotated with, evaluated or not.
SWITCHES = (bool, bool | None, Optional[bool], "bool", "bool | None", "Optional[bool]")  # noqa: UP045


def wrong_switches(args: Any) -> list[Problem]:
    """Return the fields that are on or off and hold something else; None leaves one as it is left out.

    Such a field has a default that is on, off or None: parsers of command lines change what fields are annotated with.
    """
    problems = []
    for one in dataclasses.fields(args):
        name, value = one.name, getattr(args, one.name, None)
        switch = one.type in SWITCHES and (one.default is None or isinstance(one.default, bool))
        if not switch or value is None or on_or_off(value):
            continue
        near = f"Write {value.capitalize()} without quotes." if str(value).lower() in ("true", "false") else ""
        problems.append(Problem(f"{type(args).__name__} {name}", value, "True or False", near))
    return problems


def on_or_off(value: Any) -> bool:
    """Say whether a value is True or False, or 1 or 0; numpy has its own."""
    return (isinstance(value, int) and value in (0, 1)) or type(value).__name__ in ("bool", "bool_")


# What others, `fastft plan` among them, call a choice.
MEANT = {"adam": "adamw_torch", "adamw": "adamw_torch"}


# The package that a tracker needs, where it is called like it; of others transformers says it.
REPORTING = (
    "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "mlflow", "neptune", "swanlab", "tensorboard", "trackio",
    "wandb",
)  # fmt: skip


def _wrong_choices(args: Any) -> list[Problem]:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
    from transformers.training_args import OptimizerNames

    choices = {
        "optim": OptimizerNames,
        "lr_scheduler_type": SchedulerType,
        "eval_strategy": IntervalStrategy,
        "logging_strategy": IntervalStrategy,
        "save_strategy": SaveStrategy,
    }
    problems, owner = [], type(args).__name__
    for name, kind in choices.items():
        value, known = getattr(args, name), [member.value for member in kind]
        if value is not None and getattr(value, "value", value) not in known:
            near = did_you_mean(MEANT.get(str(value), str(value)), known)
            problems.append(Problem(f"{owner} {name}", value, f"one of {', '.join(known)}", near))
    known = ["all", "none", *sorted(INTEGRATION_TO_CALLBACK)]
    for value in [args.report_to] if isinstance(args.report_to, str) else args.report_to or ():
        if value not in known:
            near = did_you_mean(str(value), known)
            problems.append(Problem(f"{owner} report_to", value, f"one of {', '.join(known)}", near))
        elif value in REPORTING and not installed(value) and not installed(f"{value}X"):  # there is a tensorboardX
            remedy = f"pip install {value}, or leave report_to out."
            problems.append(Problem(f"{owner} report_to", value, "a tracker that is installed here", remedy))
    return problems


def evaluation_defaults(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return when to evaluate (and to save, if the best weights are to be loaded) where the user has not said it."""
    every = fields.get("eval_steps")
    defaults: dict[str, Any] = {"eval_strategy": "epoch" if every is None else "steps"}
    strategy = text_of(fields.get("eval_strategy", defaults["eval_strategy"]))
    best = fields.get("early_stopping_patience") is not None or fields.get("load_best_model_at_end")
    if best and strategy in ("steps", "epoch"):
        every = every or fields.get("logging_steps", 1)  # as often as it is logged, if nothing is said
        defaults |= {"save_strategy": strategy} | ({"save_steps": every} if strategy == "steps" else {})
    return defaults


def contradictions(
    owner: str, fields: Mapping[str, Any], defaults: Mapping[str, Any], evaluated: bool
) -> list[Problem]:
    """Return the `fields` of which one makes another mean nothing: steps with epochs, or with as long a warm-up.

    Also those that say after how many steps, where it goes by something else or never happens: that would be ignored.
    A number of 0 says "never", too, and contradicts nothing there.

    Only of what a function's user has said that is known: a config holds a number always.
    """
    problems, steps, warmup = [], fields.get("max_steps"), fields.get("warmup_steps")
    counted = isinstance(steps, int) and steps > 0
    if counted and "num_train_epochs" in fields:
        both = (steps, fields["num_train_epochs"])
        remedy = "Steps end the run whatever the epochs say: leave one of them out."
        problems.append(Problem(f"{owner} max_steps and num_train_epochs", both, "one of the two", remedy))
    warms = text_of(fields.get("lr_scheduler_type", defaults.get("lr_scheduler_type"))) != "constant"
    counts = isinstance(warmup, int | float) and warmup >= 1  # below, it is a share of all steps
    if counted and counts and warms and warmup >= steps:  # who warms up where there is none, the config tells
        remedy = "The learning rate would never be reached: a number below 1, such as 0.1, is a share of all steps."
        problems.append(Problem(f"{owner} warmup_steps", warmup, f"fewer than max_steps={steps}", remedy))
    for name, strategy in EVERY.items():
        kind = text_of(fields.get(strategy, defaults.get(strategy)))
        untold = name == "eval_steps" and not evaluated and kind != "no"  # `unevaluated` says it
        if name not in fields or kind not in ("epoch", "best", "no") or untold:
            continue
        if kind == "no" and fields[name] == 0:
            continue
        remedy = f"Leave {name} out, or set {strategy}='steps'."
        if strategy not in fields:
            best = "early stopping" if "early_stopping_patience" in fields else "load_best_model_at_end"
            remedy = f"With {best} it is saved when it is evaluated: set eval_steps, or leave {name} out."
        problems.append(Problem(f"{owner} {name}", fields[name], f"nothing beside {strategy}={kind!r}", remedy))
    return problems


def made(kind: type, defaults: Mapping[str, Any], fields: Mapping[str, Any], evaluated: bool) -> Any:
    """Return the config `kind` of a function's defaults and of the `fields` that its user has said.

    evaluated: whether there are evaluation data. Raises `UsageError` with everything that is wrong with it.
    """
    problems = [] if evaluated else unevaluated(kind.__name__, fields)
    defaults = {**defaults, **(evaluation_defaults(fields) if evaluated else {})}
    problems += contradictions(kind.__name__, fields, defaults, evaluated)
    told = {problem.where.split()[-1] for problem in problems}
    fields = {name: value for name, value in fields.items() if name not in told}
    try:
        config = kind(**defaults | fields)
    except UsageError as error:
        raise UsageError(*problems, *error.problems) from None
    if problems:
        raise UsageError(*problems)
    return config
