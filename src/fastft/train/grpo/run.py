"""The function `grpo`: train on rewards, and leave everything in a folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import field, frozen

from fastft import given
from fastft.data.sets import evaluated, named_sets
from fastft.rewards.texts import of_texts
from fastft.rollout.base import Engine
from fastft.train import handed
from fastft.train.grpo import prompts as prompt_data
from fastft.train.grpo.checks import listed
from fastft.train.grpo.config import PLAIN, GRPOConfig, make_config
from fastft.train.grpo.trainer import GRPOTrainer
from fastft.train.record import curve, ends, last_evaluation
from fastft.train.resume import to_resume
from fastft.train.words import in_words_of

# Arguments of the trainer -> those of `grpo`.
OWN = {"reward_funcs": "rewards", "processing_class": "tokenizer"}


@frozen
class GrpoResult:
    """The outcome of `grpo`: `rewards`, `losses`, `kl` and `lengths` are (step, value) pairs as logged.

    `kl` is empty without a `beta`, `lengths` are means in tokens; `record` is the content of run.json. `notes`: that
    nothing was learnt, where no completion had a reward.
    """

    rewards: tuple[tuple[int, float], ...] = field(repr=ends)
    losses: tuple[tuple[int, float], ...] = field(repr=ends)
    kl: tuple[tuple[int, float], ...] = field(repr=ends)
    lengths: tuple[tuple[int, float], ...] = field(repr=ends)
    metrics: dict[str, float] = field(repr=False)
    output_dir: str
    record: dict[str, Any] = field(repr=False)
    notes: tuple[str, ...] = ()


def grpo(
    model: Any,
    tokenizer: Any,
    prompts: Any,
    rewards: Sequence[Any],
    output_dir: str | Path = handed.RUN,
    eval: Any = None,
    *,
    engine: str | Engine = "auto",
    engine_options: Mapping[str, Any] | None = None,
    config: GRPOConfig | None = None,
    chat: bool = True,
    resume: bool | str = False,
    compile: bool = True,
    callbacks: Sequence[Any] = (),
    **options: Any,
) -> GrpoResult:
    """Train `model` to earn `rewards` with its own answers to `prompts` (GRPO and its kin).

    `prompts` (and `eval`): texts, or rows with a `prompt` (a text or messages) and columns for the rewards, as
    `fastft.load_rows` takes them; `eval` may be a dict of several sets by name. With `chat` a text is what the user
    says, else it is continued as it stands.
    `rewards`: functions `f(prompts, completions, **columns)` that return a number or None for each completion, such as
    those of `fastft.rewards`; a list, or one alone. They get texts where the prompts were texts, and lists of messages
    where they were messages. `engine`: "transformers", "vllm", "auto" or an `Engine`, with `engine_options`.
    `options`: generations (completions of a prompt), max_new_tokens, temperature, loss, kl (`beta`), epochs, steps,
    batch_size (completions of a forward pass), accumulate, learning_rate, schedule, optimizer, seed, log_every,
    save_every, report_to, or any field of `GRPOConfig`; or a whole `config`. `resume` is True (the last checkpoint)
    or a checkpoint's folder. Leaves model, checkpoints, record, curves and sample completions in `output_dir`.
    Ctrl-C ends it with the step that is running, saved; a second one at once (docs/how-to/resume.md).
    Raises `UsageError`, `DataError`, `EngineError`, `RewardError`, `SaveError`.
    """
    given.refuse(*handed.function_problems("grpo", GRPOConfig, model, tokenizer, output_dir, config, callbacks))
    with in_words_of("grpo", GRPOTrainer, GRPOConfig, config, options, PLAIN, OWN):
        args = make_config(config, options, str(output_dir), model, evaluated=eval is not None)
        if engine_options is not None:
            args.engine_options = {**(args.engine_options or {}), **engine_options}
        resume_from = to_resume(resume, args)
        rows = named_sets(prompts, eval, "prompts")
        functions = listed(rewards)
        data, texts = prompt_data.prompt_datasets(rows, tokenizer, chat)
        trainer = GRPOTrainer(
            model,
            [of_texts(function) for function in functions] if texts else functions,
            args,
            train_dataset=data["prompts"],
            eval_dataset=evaluated(data, eval),
            processing_class=tokenizer,
            callbacks=list(callbacks or ()),
            engine=engine,
            compile=compile,
        )
        try:
            output = trainer.train(resume_from_checkpoint=resume_from)
        finally:
            if not isinstance(engine, Engine):
                trainer.engine.close()
    trainer.save_model()
    trainer.create_model_card()
    names = ("reward", "loss", "kl", "completions/mean_length")
    history, recorder = trainer.state.log_history, trainer.recorder  # only the main process has a record
    curves = [curve(history, name) for name in names]
    metrics = {**output.metrics, **last_evaluation(history)}
    return GrpoResult(*curves, metrics, args.output_dir, recorder.record, tuple(recorder.noted()))
