"""The function `sft`: fine-tune on data, and leave everything in a folder."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

from attrs import evolve, field, frozen

from fastft import given
from fastft.data import check
from fastft.data.chat import tokenised
from fastft.data.files import told_by_file, told_of
from fastft.data.inputs import open_named_rows
from fastft.data.sets import evaluated, named_sets
from fastft.data.sources import Source, open_named
from fastft.errors import Problem
from fastft.train import arguments, handed
from fastft.train.record import curve, ends, last_evaluation
from fastft.train.resume import to_resume
from fastft.train.sft.config import SFTConfig, make_config, settle_length
from fastft.train.sft.reading import reading_of
from fastft.train.sft.trainer import SFTTrainer
from fastft.train.words import in_words_of


@frozen
class SftResult:
    """The outcome of `sft`: `losses` are (step, loss) pairs as logged; `record` is the content of run.json."""

    losses: tuple[tuple[int, float], ...] = field(repr=ends)
    final_loss: float | None
    metrics: dict[str, float] = field(repr=False)
    output_dir: str
    record: dict[str, Any] = field(repr=False)


def sft(
    model: Any,
    tokenizer: Any,
    train: Any,
    output_dir: str | Path = handed.RUN,
    eval: Any = None,
    *,
    config: SFTConfig | None = None,
    train_on: str = "assistant",
    alternate: bool = True,
    overlong: Literal["refuse", "truncate"] | None = None,
    resume: bool | str = False,
    compile: bool = True,
    callbacks: Sequence[Any] = (),
    compute_metrics: Any = None,
    **options: Any,
) -> SftResult:
    """Fine-tune `model` on `train` and leave model, checkpoints and run record in `output_dir`.

    `train` and `eval` are token ids (`chat_dataset`'s result) or what `chat_dataset` takes, which renders it with
    `train_on` and `alternate`; `eval` may be a dict of several sets by name. `dataset_text_field` names a column to
    learn whole, as text, whatever stands beside it.
    `overlong`: what becomes of rows of more than `max_length` tokens. "refuse" names them, by file and line where they
    are out of files; "truncate" cuts them at their end, and says how many, and of the rows that are left without
    anything to learn a share of `max_unlearnable` is left out. Left out it means "refuse", and with a `config`
    "truncate", as trainers do. Rows of a stream are cut.
    `options`: epochs, steps, batch_size, eval_batch_size, learning_rate, accumulate, packing, max_length, schedule,
    warmup_steps, optimizer, weight_decay, seed, log_every, save_every, eval_every, keep_checkpoints, report_to,
    embedding_learning_rate, loraplus_ratio, early_stopping_patience, label_smoothing, or any field of `SFTConfig`; or
    a whole `config`. What asks for evaluations wants `eval`. `resume` is True (the run's last checkpoint) or a
    checkpoint's folder.
    Ctrl-C ends it with the step that is running, saved; a second one at once (docs/how-to/resume.md).
    Raises `UsageError`, `DataError`, `SaveError`.
    """
    uncalled = [] if eval is not None else arguments.uncalled("sft", {"compute_metrics": compute_metrics})
    given.refuse(
        *handed.function_problems(
            "sft", SFTConfig, model, tokenizer, output_dir, config, callbacks, compute_metrics=compute_metrics
        ),
        *check.overlong_problems(overlong or "refuse"),
        *_said_by_train_on(options),
        *uncalled,
    )
    data = named_sets(train, eval)
    with in_words_of("sft", SFTTrainer, SFTConfig, config, options, arguments.PLAIN):
        args = make_config(config, options, str(output_dir), model, eval is not None)  # before any data are read
        resume_from = to_resume(resume, args)
        reading = evolve(reading_of(args, None), must=config is None)
        opened = partial(open_named_rows, alternate=alternate) if reading.text_field is None else open_named
        sources = {name: opened(rows, name) for name, rows in data.items()}
        whole_rows = partial(tokenised, num_proc=reading.processes)
        read = whole_rows if reading.text_field is None else reading.column
        made = {name: read(source, tokenizer, train_on, name, alternate) for name, source in sources.items()}
        if config is None:
            settle_length(args, made.values())
        if (overlong or ("refuse" if config is None else "truncate")) == "refuse":
            _refuse_overlong(made, sources, args.max_length)
        with ExitStack() as told:
            for name, source in sources.items():
                told.enter_context(told_by_file(source.files, name))
            trainer = SFTTrainer(
                model,
                args,
                train_dataset=made["train"],
                eval_dataset=evaluated(made, eval),
                processing_class=tokenizer,
                callbacks=list(callbacks or ()),
                compute_metrics=compute_metrics,
                compile=compile,
            )
        output = trainer.train(resume_from_checkpoint=resume_from)
    trainer.save_model()
    trainer.create_model_card()
    losses = curve(trainer.state.log_history, "loss")
    metrics = {**output.metrics, **last_evaluation(trainer.state.log_history)}
    final = losses[-1][1] if losses else None
    return SftResult(losses, final, metrics, args.output_dir, trainer.recorder.record)


def _said_by_train_on(options: Mapping[str, Any]) -> list[Problem]:
    """Return those of the options that say to a trainer what is learnt, which `train_on` has said by then."""
    remedy = "train_on says what is learnt: 'assistant', 'last', 'completion' or 'all'."
    named = (name for name in ("assistant_only_loss", "completion_only_loss") if options.get(name) is not None)
    return [Problem(f"sft {name}", options[name], "it left out", remedy) for name in named]


def _refuse_overlong(made: Mapping[str, Any], sources: Mapping[str, Source], limit: int | None) -> None:
    for name, rows in made.items():
        if limit is not None and hasattr(rows, "__len__"):
            with told_of(name, sources[name].files):
                check.refuse_overlong(rows, limit)
