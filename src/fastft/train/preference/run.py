"""Training on preferences in one call: DPO, KTO, ORPO or SimPO."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from attrs import field, frozen

from fastft import given
from fastft.data.sets import evaluated, named_sets
from fastft.errors import Problem, UsageError
from fastft.train import arguments, handed
from fastft.train.preference import data as preference_data
from fastft.train.preference.config import PLAIN, make_config
from fastft.train.record import curve, ends, last_evaluation
from fastft.train.resume import to_resume
from fastft.train.words import in_words_of


@frozen
class _Loss:
    """Where the trainer of a loss is, what it is called there, and the fields of its config that make the loss."""

    module: str
    trainer: str
    config: str
    fixed: Mapping[str, Any]
    alone: Sequence[str] = ()  # fields of the config that mean nothing to another loss with the same one

    def named(self, name: str) -> type:
        """Return the class of that name, of the trainer or of its config."""
        return getattr(import_module(self.module), name)


LOSSES = {
    "dpo": _Loss("fastft.train.preference.referenced", "DPOTrainer", "DPOConfig", {}),
    "kto": _Loss("fastft.train.preference.referenced", "KTOTrainer", "KTOConfig", {}),
    "orpo": _Loss("fastft.train.preference.reference_free", "ORPOTrainer", "ORPOConfig", {}),
    "cpo": _Loss("fastft.train.preference.reference_free", "CPOTrainer", "CPOConfig", {}),
    "simpo": _Loss(
        "fastft.train.preference.reference_free",
        "CPOTrainer",
        "CPOConfig",
        {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0},
        alone=("simpo_gamma",),
    ),
}


@frozen
class PreferenceResult:
    """The outcome of `preference`: (step, value) pairs as logged, and the content of run.json as `record`.

    `accuracies`: the share of pairs whose chosen answer has the higher reward (empty for KTO, which has no pairs).
    `margins`: mean reward of chosen answers over that of rejected ones.
    """

    losses: tuple[tuple[int, float], ...] = field(repr=ends)
    accuracies: tuple[tuple[int, float], ...] = field(repr=ends)
    margins: tuple[tuple[int, float], ...] = field(repr=ends)
    metrics: dict[str, float] = field(repr=False)
    output_dir: str
    record: dict[str, Any] = field(repr=False)


def preference(
    model: Any,
    tokenizer: Any,
    rows: Any,
    output_dir: str | Path = handed.RUN,
    eval: Any = None,
    *,
    loss: str = "dpo",
    ref_model: Any = None,
    config: Any = None,
    resume: bool | str = False,
    compile: bool = True,
    callbacks: Sequence[Any] = (),
    **options: Any,
) -> PreferenceResult:
    """Train `model` on preferences and leave model, checkpoints and run record in `output_dir`.

    `rows` and `eval`: pairs with `chosen` and `rejected` (texts with a `prompt`, or conversations), as
    `fastft.load_rows` takes them; for KTO also answers with a verdict (`prompt`, `completion`, `label`). With a
    tokenizer that has a chat template texts are turns. `eval` may be a dict of several sets by name.

    `loss`: "dpo", "kto", "orpo", "cpo" or "simpo" (CPO's trainer with beta 2 and gamma 1 and no further loss). DPO and
    KTO measure against a reference: `ref_model`, or the model as it is now, without a second model. For KTO the rows
    are put in a random order, which its trainer leaves as it is.

    `options`: beta, max_length, max_prompt_length, epochs, steps, batch_size, learning_rate, accumulate, schedule,
    optimizer, seed, log_every, save_every, eval_every, report_to, or any field of the loss's config; or a whole
    `config`. `resume` is True (the run's last checkpoint) or a checkpoint's folder. Ctrl-C ends it with the step
    that is running, saved; a second one at once (docs/how-to/resume.md). Raises `UsageError`, `DataError`, `SaveError`.
    """
    if not isinstance(loss, str) or loss not in LOSSES:
        near = arguments.did_you_mean(str(loss), LOSSES)
        raise UsageError(Problem("preference loss", loss, f"one of {', '.join(LOSSES)}", near))
    if ref_model is not None and loss not in ("dpo", "kto"):
        raise UsageError(Problem("preference ref_model", "a model", f"none: {loss!r} has no reference"))
    chosen = LOSSES[loss]
    trainer_class, config_class = chosen.named(chosen.trainer), chosen.named(chosen.config)
    given.refuse(
        *handed.function_problems(
            "preference", config_class, model, tokenizer, output_dir, config, callbacks, ref_model=ref_model
        )
    )
    with in_words_of("preference", trainer_class, config_class, config, options, PLAIN):
        others = _of_others(loss, options)
        args = make_config(config_class, config, options, str(output_dir), model, eval, chosen.fixed, others)
        resume_from = to_resume(resume, args)
        rows_of = {
            name: preference_data.preference_dataset(part, tokenizer, trainer_class.KINDS, name)
            for name, part in named_sets(rows, eval).items()
        }
        if loss == "kto":
            rows_of = {name: preference_data.mixed_verdicts(part, args.seed) for name, part in rows_of.items()}
        reference = {} if ref_model is None else {"ref_model": ref_model}
        trainer = trainer_class(
            model,
            args=args,
            processing_class=tokenizer,
            callbacks=list(callbacks or ()),
            compile=compile,
            train_dataset=rows_of["train"],
            eval_dataset=evaluated(rows_of, eval),
            **reference,
        )
        output = trainer.train(resume_from_checkpoint=resume_from)
    trainer.save_model()
    trainer.create_model_card()
    history = trainer.state.log_history
    curves = [curve(history, name) for name in ("loss", "rewards/accuracies", "rewards/margins")]
    metrics = {**output.metrics, **last_evaluation(history)}
    return PreferenceResult(*curves, metrics, args.output_dir, trainer.recorder.record)


def _of_others(loss: str, options: Mapping[str, Any]) -> dict[str, str]:
    """Return what to say of those of the options that another loss takes."""
    own = {*arguments.field_names(LOSSES[loss].named(LOSSES[loss].config)), *PLAIN}
    told = {}
    for name in (name for name in options if name not in own):
        takers = [other for other, one in LOSSES.items() if name in arguments.field_names(one.named(one.config))]
        takers = [other for other in takers if name in LOSSES[other].alone] or takers
        if takers:
            told[name] = f"it belongs to {' and '.join(f'loss={other!r}' for other in takers)}"
    return told
