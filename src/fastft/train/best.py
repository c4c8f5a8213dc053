"""The best weights, which are loaded at the end: what they ask of the other fields, and what a run says of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from attrs import frozen
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import CallbackHandler

from fastft.errors import MetricError, Problem, UsageError, did_you_mean
from fastft.train.arguments import is_above_zero, text_of
from fastft.train.record import RecordCallback


def settle(args: Any) -> None:
    """Set the fields of a config that follow from early stopping, and which way its metric is better."""
    if args.early_stopping_patience is not None:
        args.metric_for_best_model = args.metric_for_best_model or "eval_loss"
        args.load_best_model_at_end = True
    if args.greater_is_better is None and str(args.metric_for_best_model).endswith("perplexity"):
        args.greater_is_better = False  # transformers knows that of losses alone


def problems(args: Any) -> list[Problem]:
    """Return why there would be no best weights to load: they are those of a checkpoint that has been evaluated."""
    owner, evaluated, saved = type(args).__name__, text_of(args.eval_strategy), text_of(args.save_strategy)
    known = evaluated in ("no", "steps", "epoch") and saved in ("no", "steps", "epoch", "best")
    if not args.load_best_model_at_end or not known:  # unknown ones are told as such
        return []
    early = args.early_stopping_patience is not None
    asked = "early_stopping_patience" if early else "load_best_model_at_end"
    if evaluated == "no":
        remedy = f"Set eval_strategy='steps' or 'epoch', or leave {'early stopping' if early else 'it'} out."
        expected = "an evaluation to watch" if early else "an evaluation to tell the best weights by"
        return [Problem(f"{owner} {asked}", getattr(args, asked), expected, remedy)]
    remedy = f"{asked}={getattr(args, asked)} loads the best weights at the end: they are saved where it is evaluated."
    if saved not in (evaluated, "best"):
        expected = f"{evaluated!r}, as eval_strategy is, or 'best'"
        return [Problem(f"{owner} save_strategy", saved, expected, remedy)]
    # transformers evaluates as often as it logs where it is not told
    name = "logging_steps" if args.eval_steps is None else "eval_steps"
    every, save = getattr(args, name), args.save_steps
    if not evaluated == saved == "steps" or _is_multiple(save, every):
        return []
    return [Problem(f"{owner} save_steps", save, f"a multiple of {name}={every}", remedy)]


def _is_multiple(save: Any, every: Any) -> bool:
    """Say whether each save is at an evaluation, as transformers asks for it; what is no number is told elsewhere."""
    if not all(map(is_above_zero, (save, every))):
        return True
    if (save < 1) is not (every < 1):  # a share of all steps, and a number of them
        return False
    scale = 1_000_000 if save < 1 else 1
    return (save * scale) % (every * scale) == 0


@frozen
class Measured:
    """The metrics that an evaluation gives, without "eval_".

    Of several data sets each has those `of_each`, by its name; `logged` are without a name, those of the last. `remedy`
    is what else there is to say to who asks for another.
    """

    of_each: Sequence[str]
    logged: Sequence[str] = ()
    remedy: str = ""


def refuse_unmeasured(args: Any, measured: Measured, eval_dataset: Any) -> None:
    """Raise `UsageError` if `metric_for_best_model` is none of what an evaluation of the data gives.

    A name may be written with "eval_" or without.
    """
    if eval_dataset is None:
        return
    parts = [f"{part}_" for part in eval_dataset] if isinstance(eval_dataset, Mapping) else [""]
    known = [f"eval_{part}{one}" for part in parts for one in measured.of_each]
    known += [f"eval_{one}" for one in measured.logged]
    if wrong := _not_among(args, known, "what an evaluation gives", measured.remedy):
        raise UsageError(wrong)


def refuse_missing(args: Any, metrics: Mapping[str, Any]) -> None:
    """Raise `MetricError` if `metric_for_best_model` is none of the metrics that an evaluation gave."""
    given = [name for name in metrics if name.startswith("eval_")]
    if wrong := _not_among(args, given, "what the evaluation gave"):
        raise MetricError(wrong)


def _not_among(args: Any, known: Sequence[str], what: str, more: str = "") -> Problem | None:
    """Return what is wrong with `metric_for_best_model` where it is none of the `known`; `more` is to be said then."""
    name = args.metric_for_best_model
    if name is None or _full_name(args) in known:
        return None
    near = did_you_mean(str(name), [*known, *(one.removeprefix("eval_") for one in known)])
    remedy = " ".join(filter(None, (near, more)))
    return Problem(f"{type(args).__name__} metric_for_best_model", name, f"{what}: {', '.join(known)}", remedy)


def _full_name(args: Any) -> str:
    """Return the name under which `metric_for_best_model` is logged, which may be written without "eval_"."""
    return f"eval_{str(args.metric_for_best_model).removeprefix('eval_')}"


class EarlyStopping(EarlyStoppingCallback):
    """transformers' early stopping, which of several evaluation sets looks at the one that its metric is of."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, Any], **kwargs: Any) -> None:
        """Look at the metric of an evaluation that has it; where none has it, the trainer says so."""
        if _full_name(args) in metrics:
            super().on_evaluate(args, state, control, metrics, **kwargs)


class BestWeights(TrainerCallback):
    """Has the record say which weights a run has come to, and why it stopped early; hung up before the recorder.

    `handler` is that of the trainer's callbacks: early stopping may be the user's own, and is exchanged in a run that
    goes on with `restore_callback_states_from_checkpoint`.
    """

    def __init__(self, handler: CallbackHandler, recorder: RecordCallback) -> None:
        self.handler, self.recorder = handler, recorder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget an earlier run of the same trainer."""
        self.recorder.notes.pop("stopped", None)
        self.recorder.extra.pop("best", None)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell it: transformers has loaded the best weights by now."""
        best, loaded = state.best_global_step, ""
        metric = _full_name(args)
        if args.load_best_model_at_end and best is not None and state.best_model_checkpoint is not None:
            self.recorder.extra["best"] = {"step": best, "metric": metric, "value": state.best_metric}
            loaded = f"; the weights are those of step {best}"
        for one in self.handler.callbacks:
            stopping = isinstance(one, EarlyStoppingCallback) and state.global_step < state.max_steps
            if stopping and one.early_stopping_patience_counter >= one.early_stopping_patience:
                patience, threshold = one.early_stopping_patience, one.early_stopping_threshold
                lately = f"for {patience} evaluation{'' if patience == 1 else 's'}"
                more = f" by more than {threshold:g}" if threshold else ""
                told = f"stopped early at step {state.global_step}: {metric} has not improved{more} {lately}{loaded}"
                self.recorder.notes["stopped"] = [told]
