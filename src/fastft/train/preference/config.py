"""What the configurations of preference training share, and the older names of their fields."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from fastft.errors import Problem, did_you_mean
from fastft.train import arguments, settings
from fastft.train.best import Measured

# What older scripts pass to the trainers themselves -> the field of the config it has become.
LEGACY = {
    **{name: name for name in ("beta", "max_length", "max_prompt_length", "max_completion_length", "loss_type")},
    **{name: name for name in ("label_smoothing", "dataset_num_proc", "disable_dropout", "precompute_ref_log_probs")},
    "max_seq_length": "max_length",
}
# Plain names of `preference` -> fields of the configs.
PLAIN = {name: field for name, field in arguments.PLAIN.items() if name != "label_smoothing"}


def _logged(*names: str) -> Measured:
    both = [f"{kind}/{one}" for kind in ("rewards", "logps", "logits") for one in ("chosen", "rejected")]
    return Measured(("loss",), ("rewards/margins", *both, *names))


# Method -> what an evaluation gives.
MEASURED = {
    "dpo": _logged("rewards/accuracies", "entropy", "mean_token_accuracy"),
    "kto": _logged("kl", "entropy"),
    "orpo": _logged("rewards/accuracies", "nll_loss", "log_odds_ratio", "log_odds_chosen"),
    "cpo": _logged("rewards/accuracies", "nll_loss"),
}


@dataclasses.dataclass
class PreferenceSettings(settings.Settings):
    """What the configs of preference training have beside TRL's fields and `Settings`.

    `max_length` left out is the length that `fastft.load` has set. `max_prompt_length`: rows with a longer prompt are
    left out, and one line says how many. `token_metrics`: log the entropy, mean logits and accuracy of tokens in
    training steps, as TRL does; that costs the head's forward pass once more. Evaluation always logs them.
    """

    # the method in the words of `preference`
    LOSS: ClassVar[str] = ""

    max_length: int | None = dataclasses.field(
        default=arguments.DEFAULT_LENGTH, metadata={"help": "Longest row in tokens; what is longer is cut off."}
    )
    max_prompt_length: int | None = dataclasses.field(default=None, metadata={"help": "Longer prompts are left out."})
    token_metrics: bool = dataclasses.field(default=True, metadata={"help": "Entropy, logits, accuracy of tokens."})

    def mistakes(self) -> list[Problem]:
        """Return all fields that cannot be meant."""
        return [*super().mistakes(), *_wrong_beta(self), *_wrong_loss_types(self)]


# What TRL computes for each method -> its losses. ORPO has one.
LOSS_TYPES = {
    "dpo": (
        "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
        "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
    ),
    "kto": ("kto", "apo_zero_unpaired"),
    "cpo": ("sigmoid", "hinge", "ipo", "simpo", "alphapo"),
}  # fmt: skip


def _wrong_beta(args: PreferenceSettings) -> list[Problem]:
    """Return what is wrong with beta: below 0 the worse answers are learnt, at 0 only ORPO learns anything."""
    beta, weight = args.beta, args.LOSS == "orpo"
    number = isinstance(beta, int | float) and not isinstance(beta, bool) and math.isfinite(beta)
    if number and (beta > 0 or (beta == 0 and weight)):
        return []
    return [Problem(f"{type(args).__name__} beta", beta, f"a finite number {'of at least 0' if weight else 'above 0'}")]


def _wrong_loss_types(args: PreferenceSettings) -> list[Problem]:
    known = LOSS_TYPES.get(args.LOSS)
    if known is None:
        return []
    alone, several = isinstance(args.loss_type, str), args.LOSS == "dpo"
    if not alone and not (several and isinstance(args.loss_type, list | tuple) and args.loss_type):
        expected = f"one of {', '.join(known)}{', or a list of some' if several else ''}"
        return [Problem(f"{type(args).__name__} loss_type", args.loss_type, expected)]
    given = [args.loss_type] if alone else list(args.loss_type)
    problems = []
    for name in given:
        if name in known:
            continue
        others = [f"preference(loss={loss!r})" for loss, names in LOSS_TYPES.items() if name in names]
        near = f"{' and '.join(others)} {'has' if len(others) == 1 else 'have'} it." if others else ""
        near = near or did_you_mean(str(name), known)
        problems.append(Problem(f"{type(args).__name__} loss_type", name, f"one of {', '.join(known)}", near))
    return problems


def has_no_effect(config: Any, name: str, default: Any, why: str) -> None:
    """Say that a field that was set has no effect, and why; set it back."""
    if getattr(config, name) != default:
        print(f"fastft: {type(config).__name__}({name}=...) has no effect: {why}.")
        setattr(config, name, default)


def legacy_of(config: type) -> dict[str, str]:
    """Return the older arguments that are fields of `config`."""
    known = arguments.field_names(config)
    return {older: field for older, field in LEGACY.items() if field in known}


def make_config(
    kind: type,
    config: Any,
    options: Mapping[str, Any],
    output_dir: str,
    model: Any,
    eval: Any,
    own: Mapping[str, Any],
    belonging: Mapping[str, str],
) -> Any:
    """Return the config of `preference`: the one given, or a `kind` of the loss's `own` fields and the options.

    `belonging`: what to say of options that belong to another loss. Raises `UsageError` for both a config and options.
    """
    settings.refuse_both("preference", config, options)
    if config is not None:
        return config
    fields = arguments.config_fields("preference", options, arguments.field_names(kind), PLAIN, belonging)
    defaults: dict[str, Any] = {
        **settings.model_defaults(model, output_dir, fields),
        "learning_rate": 2e-5 if hasattr(model, "peft_config") else 1e-6,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        **own,
    }
    return arguments.made(kind, defaults, fields, eval is not None)
