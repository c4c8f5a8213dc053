"""What is handed to a training function or a trainer beside numbers: is each the kind of thing that it has to be?

Asked before anything is read, moved or written, and all mistakes are told together.
"""

from collections.abc import Collection, Mapping
from typing import Any

from transformers import TrainerCallback

from fastft import given
from fastft.errors import Problem, short


class Unsaid(str):
    """The folder of a run that the user has not chosen, to be told from the same name given."""


RUN = Unsaid("run")
_CALLBACK = "a transformers.TrainerCallback"


def function_problems(
    owner: str,
    kind: type,
    model: Any,
    tokenizer: Any,
    output_dir: Any,
    config: Any,
    callbacks: Any,
    compute_metrics: Any = None,
    ref_model: Any = None,
) -> list[Problem]:
    """Return what is wrong with the arguments of the function `owner`, whose config is of the class `kind`."""
    wrong = [
        given.model_problem(model),
        given.tokenizer_problem(tokenizer),
        _reference_problem(f"{owner} ref_model", ref_model),
        _folder_problem(owner, output_dir, config),
        _config_problem(owner, kind, config),
        *_callback_problems(owner, callbacks),
        _metrics_problem(owner, compute_metrics),
    ]
    return [problem for problem in wrong if problem is not None]


def refuse_in_trainer(trainer: str, model: Any, kwargs: Mapping[str, Any]) -> None:
    """Raise `UsageError` for arguments of a trainer that are not what they have to be: a model that can be trained."""
    processing = kwargs.get("processing_class")
    given.refuse(
        *given.pair_problems(model, getattr(processing, "tokenizer", processing)),
        _untrainable(model, kwargs.get("peft_config")),
        _reference_problem(f"{trainer} ref_model", kwargs.get("ref_model")),
        *_callback_problems(trainer, kwargs.get("callbacks")),
        _metrics_problem(trainer, kwargs.get("compute_metrics")),
    )


def _folder_problem(owner: str, folder: Any, config: Any) -> Problem | None:
    """Return what is wrong with a run's folder, which a `config` says, too."""
    where = f"{owner} output_dir"
    if config is None:
        return folder_problem(where, folder)
    said = getattr(config, "output_dir", None)
    if isinstance(folder, Unsaid) or said is None or str(folder) == str(said):
        return None
    return Problem(where, str(folder), f"that of the config, {str(said)!r}", "Leave one of the two out.")


def folder_problem(where: str, folder: Any) -> Problem | None:
    """Return what is wrong with something that is given as the folder of a run."""
    return given.path_problem(where, folder, remedy="Name one, or leave it out for 'run'.")


def _untrainable(model: Any, peft_config: Any) -> str | None:
    """Return what to say of a model of which no weight is trainable, where no adapter is to be put on it."""
    able = peft_config is not None or given.model_problem(model) is not None
    if able or any(parameter.requires_grad for parameter in model.parameters()):
        return None
    return (
        "model: none of its weights is trainable; put an adapter on it with add_lora(model), or load it with full=True "
        "to train every weight"
    )


def of_trl(kind: type) -> type | None:
    """Return the class of TRL's that `kind` is or was made from, None where there is none."""
    return next((base for base in kind.__mro__ if base.__module__.partition(".")[0] == "trl"), None)


def _config_problem(owner: str, kind: type, config: Any) -> Problem | None:
    if config is None or isinstance(config, of_trl(kind) or kind):  # of TRL's own the trainer makes one of ours
        return None
    where, expected = f"{owner} config", f"a fastft.{kind.__name__}"
    if isinstance(config, Mapping):
        remedy = f"Pass its entries as options, {owner}(..., **config), or make one: fastft.{kind.__name__}(**config)."
        return Problem(where, short(dict(config)), expected, remedy)
    return Problem(where, type(config).__name__, expected, f"Make one: fastft.{kind.__name__}(...).")


def _callback_problems(owner: str, callbacks: Any) -> list[Problem]:
    where, expected = f"{owner} callbacks", f"a list, each {_CALLBACK}"
    if callbacks is None:
        return []
    if _is_callback(callbacks):
        return [Problem(where, short(callbacks), expected, "Put it into a list: callbacks=[it].")]
    if not isinstance(callbacks, Collection) or isinstance(callbacks, str | Mapping):
        return [Problem(where, short(callbacks), expected)]
    remedy = "Make a class of it that inherits from TrainerCallback, with the method that is meant: on_log, say."
    return [
        Problem(f"{where}[{number}]", short(one), _CALLBACK, remedy)
        for number, one in enumerate(callbacks)
        if not _is_callback(one)
    ]


def _is_callback(one: Any) -> bool:
    """Say whether it is a callback, or a class of them, which transformers makes one of."""
    return isinstance(one, TrainerCallback) or (isinstance(one, type) and issubclass(one, TrainerCallback))


def _metrics_problem(owner: str, compute_metrics: Any) -> Problem | None:
    if compute_metrics is None or callable(compute_metrics):
        return None
    expected = "a function that takes a transformers.EvalPrediction and returns a dict, or None"
    return Problem(f"{owner} compute_metrics", short(compute_metrics), expected, "Pass the function itself.")


def _reference_problem(where: str, model: Any) -> Problem | None:
    """Return what is wrong with a reference; a name is none, for what it is loaded in is the user's to say."""
    remedy = "Leave it out, and the reference is the model as it is now."
    return None if model is None else given.model_problem(model, where, remedy)
