"""Supervised fine-tuning: TRL's trainer with fastft's loss, evaluation, checkpoints and run record.

Beside `config` the one file that subclasses TRL's SFT classes. Nothing of TRL is replaced: methods are overridden, and
what TRL's constructor changes on a model (its forward, the dtype of its adapters) is put back.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import trl
from accelerate import PartialState
from attrs import frozen
from transformers import EarlyStoppingCallback
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from fastft.data import packing
from fastft.data.chat import tokenised
from fastft.data.training_collator import CountingCollator
from fastft.errors import Problem, SaveError, UsageError
from fastft.model.quantize import quiet
from fastft.state import base_model, get_state
from fastft.train import arguments, card, checkpoint, flops, hygiene, memory, optimizers, preparation, reading, step
from fastft.train import resume as resuming
from fastft.train.compiling import CompileCallback
from fastft.train.config import SFTConfig, as_config, by_name, make_config, take_older_arguments
from fastft.train.record import RecordCallback, Tally


class SFTTrainer(trl.SFTTrainer):
    """A TRL SFTTrainer that trains through fastft.

    `compile=True` compiles the model's layers (`fastft.compile`) unless that was done before. It also takes what older
    scripts pass: `tokenizer`, `dataset_text_field`, `max_seq_length`, `packing`, `dataset_num_proc`; each is moved
    into the config with one line.

    `train_dataset` and `eval_dataset` are token ids, or what `sft` takes: rows are recognised, rendered and masked by
    `chat_dataset`, and one line says what is learnt. Of conversations that is the assistant's turns; every token with
    `SFTConfig(assistant_only_loss=False)`, which in TRL is the default. `SFTConfig(dataset_text_field=...)` trains on
    that column as text, `formatting_func` on the text it makes of a row. Rows are left alone with
    `dataset_kwargs={"skip_prepare_dataset": True}`.

    Raises `UsageError` for unknown arguments and combinations that cannot work, `DataError` for data that cannot be
    trained on, `SaveError` when a checkpoint cannot be written.

    The log holds `loss`, `grad_norm` and `learning_rate` (tokens and speed go to metrics.jsonl); evaluation gives
    `eval_loss` (the mean over all targets), `eval_perplexity`, `eval_mean_token_accuracy` and `eval_num_targets`.
    Training steps do not measure token accuracy and entropy: that would need the logits a second time.
    """

    def __init__(
        self, model: Any = None, args: Any = None, *positional: Any, compile: bool = True, **kwargs: Any
    ) -> None:
        args, kwargs = take_older_arguments(args, by_name(positional, kwargs))
        if isinstance(model, str):
            model, kwargs = _load(model, args, kwargs)
        arguments.refuse_pair(model)
        args = arguments.with_length(as_config(args, model), get_state(model).max_length)
        self._reading = reading.reading_of(args, kwargs.get("formatting_func"))
        given_ids = reading.is_token_ids(kwargs.get("train_dataset"))
        kwargs |= reading.datasets_of(kwargs, self._reading, args.chat_template_path)
        checkpoint.make_folder(Path(args.output_dir))
        arguments.refuse_untrainable(model, kwargs.get("peft_config"))
        arguments.refuse_early_stopping(args, kwargs.get("eval_dataset"))
        recompute, args.gradient_checkpointing = (
            args.gradient_checkpointing,
            args.gradient_checkpointing and not compile,
        )
        args.dataset_text_field = str(args.dataset_text_field)
        if not self._reading.skip and not given_ids:  # else TRL would exchange the template, and format once more
            args.assistant_only_loss, kwargs["formatting_func"] = False, None
        with quiet(), hygiene.own_dtypes(model), hygiene.unpatched(model), hygiene.head_out_of_sight(model):
            super().__init__(model, args, **kwargs)
        args.assistant_only_loss = self._reading.assistant_only
        if self.model is not model:  # TRL has wrapped it with the `peft_config` it was given
            base_model(self.model).__dict__.pop("forward", None)
        self.model_accepts_loss_kwargs = True
        if type(self.data_collator) is DataCollatorForLanguageModeling:
            own = self.data_collator
            self.data_collator = CountingCollator(**{f.name: getattr(own, f.name) for f in dataclasses.fields(own)})
        preparation.check_labels(
            self.train_dataset, self.data_collator, self.processing_class, self.args.refuse_untrained_stop
        )
        if compile:
            self._compile(recompute)
        self.tally = Tally(windows={window for window in flops.work_of(self.model).windows if window is not None})
        self._statistics: list[torch.Tensor] = []
        self._staging: Path | None = None
        self._to_push: str | None = None
        self.recorder = RecordCallback(
            args.output_dir, self.tally, dataset=self.train_dataset, reduce=self._sum_processes
        )
        if self.packing_statistics:
            self.recorder.extra["packing"] = self.packing_statistics
        self.compiling = CompileCallback(self.recorder.extra)
        self.add_callback(self.compiling)  # before the recorder, which writes what this one adds
        self.add_callback(self.recorder)
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience, args.early_stopping_threshold))

    # ---- the loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a micro-batch over `num_items_in_batch`, the targets of the whole accumulated batch."""
        outputs = None
        with self.accelerator.autocast():
            if self.compute_loss_func is not None:
                outputs = model(**step.without_labels(inputs), use_cache=False)
                labels = step.document_labels(inputs)
                loss = self.compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
            else:
                smoothing, kind = self.args.label_smoothing_factor, self.args.loss_type
                loss = step.loss(model, inputs, num_items_in_batch, label_smoothing=smoothing, loss_type=kind)
            if return_outputs and outputs is None:
                with torch.no_grad():
                    outputs = model(**step.without_labels(inputs), use_cache=False)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # the count is that of all processes, and their gradients are averaged
            loss = loss * (self.accelerator.num_processes // self._tp_size)
        return (loss, outputs) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        """Count the tokens that bear loss, over micro-batches and processes; count what the record reports."""
        if not batch_samples or "labels" not in batch_samples[0]:
            return None
        for batch in batch_samples:
            self.tally.add(batch)
        items = sum(step.shifted_labels(batch).ne(step.IGNORE).sum() for batch in batch_samples).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            items = self.accelerator.gather(items).sum()
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        return items // parallelism.non_data_parallel_size if parallelism else items

    def _sum_processes(self, counts: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(counts, "sum") if self.args.world_size > 1 else counts

    # ---- evaluation

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """Sum loss and right tokens of a batch; build all its logits only when metrics ask for them."""
        inputs = self._prepare_inputs(inputs)
        logits = labels = None
        with torch.no_grad(), self.accelerator.autocast():
            if self.compute_loss_func is not None:
                loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
                logits = None if prediction_loss_only else outputs.logits
            else:
                if prediction_loss_only:
                    rows = step.token_statistics(model, inputs)
                else:
                    logits = model(**step.without_labels(inputs), use_cache=False).logits
                    rows = step.statistics_of_logits(logits, inputs)
                self._statistics.append(self.accelerator.gather_for_metrics(rows))
                loss = (rows[:, 0].sum() / rows[:, 2].sum().clamp(min=1)).float()
        if not prediction_loss_only:
            labels = inputs["labels"]
        return loss, logits, labels

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate; loss, perplexity and accuracy are means over all targets, not over batches."""
        self._statistics = []
        with quiet():
            output = super().evaluation_loop(*args, **kwargs)
        if self._statistics:
            loss, right, count = torch.cat(self._statistics).sum(dim=0).tolist()
            prefix, count = kwargs.get("metric_key_prefix", "eval"), max(count, 1.0)
            output.metrics[f"{prefix}_loss"] = loss / count
            output.metrics[f"{prefix}_perplexity"] = math.exp(min(loss / count, 700.0))
            output.metrics[f"{prefix}_mean_token_accuracy"] = right / count
            output.metrics[f"{prefix}_num_targets"] = int(count)
        self._statistics = []
        return output

    # ---- optimizer, training, saving

    def create_optimizer(self, *args: Any) -> Any:
        """Make the optimizer; embeddings and LoRA's B matrices get rates of their own where the config asks."""
        config = self.args
        if self.optimizer is None and (config.embedding_learning_rate, config.loraplus_ratio) != (None, None):
            model = args[0] if args else self.model
            made = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(config, model)
            self.optimizer_cls_and_kwargs = optimizers.with_groups(
                made, model, config, self.get_decay_parameter_names(model)
            )
        return super().create_optimizer(*args)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; the record says how the run ended, and the model has its own forward back."""
        resuming.check(args[0] if args else kwargs.get("resume_from_checkpoint"), self.args, self.model)
        try:
            with quiet(), hygiene.unpatched(self.model):
                return super().train(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            memory.let_go(error, self.model)
            told = memory.out_of_memory(error, self.model, self._rescue())
            self._record_failure(told)
            raise told from error
        except BaseException as error:
            self._record_failure(error)
            raise
        finally:
            self.compiling.stop()

    def _record_failure(self, error: BaseException) -> None:
        if self.recorder.record and self.is_world_process_zero():
            with contextlib.suppress(SaveError):
                self.recorder.write_record("failed", f"{type(error).__name__}: {error}")

    def _rescue(self) -> str:
        """Save what was trained up to the last whole step, unless it is saved already, and say where it is."""
        done, folder = self.state.global_step, Path(self.args.output_dir)
        if not done or self.args.world_size > 1:
            last = checkpoint.checkpoints(folder)
            return f"The last checkpoint is {last[-1]}." if last else "No step had been completed."
        target = folder / f"checkpoint-{done}"
        try:
            if target not in checkpoint.checkpoints(folder):
                with quiet():
                    self._save_checkpoint(self.model, None)
        except (SaveError, RuntimeError) as problem:
            return f"Step {done} could not be saved: {problem}"
        return f"Step {done}, the last whole one, is saved in {target}; resume=True goes on from it."

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint beside its place and rename it when it is whole. Raises `SaveError`."""
        folder = Path(super()._get_output_dir(trial))
        target = folder / f"checkpoint-{self.state.global_step}"
        last = [path for path in checkpoint.checkpoints(folder) if path != target]
        untouched = f"The last whole checkpoint is {last[-1]}." if last else "There is no earlier checkpoint."
        main, self._staging = self.is_world_process_zero(), checkpoint.staging_folder(target)
        try:
            with checkpoint.staged(target, untouched) if main else contextlib.nullcontext():
                self.accelerator.wait_for_everyone()
                super()._save_checkpoint(model, None)
                self.accelerator.wait_for_everyone()
                if main:
                    self._publish(target)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if main:
            checkpoint.rotate(folder, self.args.save_total_limit, self.state.best_model_checkpoint)
        if self._to_push is not None:
            self._to_push = None
            super()._push_from_checkpoint(str(target))

    def _publish(self, target: Path) -> None:
        whole = self._staging / target.name
        best = self.state.best_model_checkpoint
        if best is not None and Path(best).parent == self._staging:
            self.state.best_model_checkpoint = str(target)
            self.state.save_to_json(str(whole / "trainer_state.json"))
        checkpoint.put_in_place(whole, target)
        self._staging.rmdir()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)
        else:
            self._to_push = checkpoint_folder

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model and tokenizer; files in `output_dir` are replaced only when all are written."""
        if _internal_call or self.args.world_size > 1:
            super().save_model(output_dir, _internal_call=_internal_call)
            return
        target = Path(output_dir or self.args.output_dir)
        with checkpoint.staged(target / "model", f"What stood in {target} is untouched.") as folder:
            super().save_model(str(folder), _internal_call=True)
            (folder / "README.md").unlink(missing_ok=True)
            checkpoint.move_files(folder, target)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card from the run record."""
        if self.is_world_process_zero():
            text = card.model_card(checkpoint.plain(self.recorder.record))
            checkpoint.write_text(Path(self.args.output_dir) / "README.md", text)

    def _send_telemetry(self) -> None:
        """Send nothing."""

    def _compile(self, recompute: bool) -> None:
        """Compile the layers; with `recompute` so that least is kept, by transformers where nothing is compiled."""
        from fastft.graph.compile import compile as compile_layers

        state = get_state(self.model)
        if state.compiled is None:
            with quiet():
                largest = memory.largest_batch(self.args, self.train_dataset)
                compile_layers(self.model, plan="min" if recompute else "auto", batch=largest)
            state = get_state(self.model)
        if not recompute:
            return
        if not state.compiled.layers:
            self.args.gradient_checkpointing = True
            how = "transformers recomputes the layers, since none is compiled"
        elif state.compiled.settings.plan == "min":
            how = "the layers are compiled with the memory plan 'min'"
        else:
            plan = state.compiled.settings.plan
            how = f"no effect, since the model was compiled before with the plan {plan!r}; fastft.compile(model, 'min')"
        print(f"fastft: gradient_checkpointing=True: {how}.")

    @functools.cached_property
    def packing_statistics(self) -> dict[str, dict[str, Any]]:
        """How full the packed data sets are, by name (`Packing.statistics`)."""
        return {}

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing_: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        """Tokenise as `sft` does, cut as TRL does; say what was cut, refuse rows with nothing to learn, and pack."""
        ours = packing_ and args.packing_strategy == "bfd"
        if ours and args.max_length is None:
            raise UsageError(Problem("SFTConfig max_length", None, "a number of tokens to pack into"))
        theirs = packing_ and not ours
        with PartialState().main_process_first():
            dataset = self._reading.token_ids(dataset, processing_class, dataset_name)
        made = super()._prepare_dataset(dataset, processing_class, args, theirs, formatting_func, dataset_name)
        if theirs:
            return made
        if not hasattr(made, "__len__"):
            if args.max_length is not None:
                print(
                    f"fastft: {dataset_name} is a stream: what is longer than max_length={args.max_length} is cut off."
                )
            return packing.pack_stream(made, args.max_length) if ours else made
        made = preparation.without_unlearnable(dataset, made, args.max_length, args.max_unlearnable, dataset_name)
        if not ours:
            return made
        made, self.packing_statistics[dataset_name] = packing.pack(made, args.max_length)
        return made.shuffle(seed=args.seed) if args.shuffle_dataset else made


@frozen
class SftResult:
    """The outcome of `sft`: `losses` are (step, loss) pairs as logged; `record` is the content of run.json."""

    losses: tuple[tuple[int, float], ...]
    final_loss: float | None
    metrics: dict[str, float]
    output_dir: str
    record: dict[str, Any]


def sft(
    model: Any,
    tokenizer: Any,
    train: Any,
    output_dir: str | Path = "run",
    eval: Any = None,
    *,
    config: SFTConfig | None = None,
    train_on: str = "assistant",
    alternate: bool = True,
    resume: bool | str = False,
    compile: bool = True,
    callbacks: Sequence[Any] = (),
    compute_metrics: Any = None,
    **options: Any,
) -> SftResult:
    """Fine-tune `model` on `train` and leave model, checkpoints and run record in `output_dir`.

    `train` and `eval` are token ids (`chat_dataset`'s result) or what `chat_dataset` takes, which renders it with
    `train_on` and `alternate`.
    `options`: epochs, steps, batch_size, eval_batch_size, learning_rate, accumulate, packing, max_length, schedule,
    warmup_steps, optimizer, weight_decay, seed, log_every, save_every, eval_every, keep_checkpoints, report_to,
    embedding_learning_rate, loraplus_ratio, early_stopping_patience, label_smoothing, or any field of `SFTConfig`; or
    a whole `config`. `resume` is True (the newest checkpoint) or a checkpoint's folder.
    Raises `UsageError`, `DataError`, `SaveError`.
    """
    arguments.refuse_pair(model, tokenizer)
    train = tokenised(train, tokenizer, train_on, "train", alternate)
    eval = None if eval is None else tokenised(eval, tokenizer, train_on, "eval", alternate)
    args = make_config(config, options, str(output_dir), model, train, eval)
    resume_from = checkpoint.to_resume(resume, Path(args.output_dir))
    trainer = SFTTrainer(
        model,
        args,
        train_dataset=train,
        eval_dataset=eval,
        processing_class=tokenizer,
        callbacks=list(callbacks),
        compute_metrics=compute_metrics,
        compile=compile,
    )
    output = trainer.train(resume_from_checkpoint=resume_from)
    trainer.save_model()
    trainer.create_model_card()
    losses = tuple((row["step"], row["loss"]) for row in trainer.state.log_history if "loss" in row)
    metrics = {**output.metrics, **_last_evaluation(trainer.state.log_history)}
    final = losses[-1][1] if losses else None
    return SftResult(losses, final, metrics, args.output_dir, trainer.recorder.record)


def _last_evaluation(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    rows = [row for row in history if "eval_loss" in row]
    return {key: value for key, value in rows[-1].items() if key.startswith("eval_")} if rows else {}


def _load(name: str, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Load a model given by name, with its tokenizer unless another is given."""
    if kwargs.get("quantization_config") is not None or getattr(args, "model_init_kwargs", None):
        raise UsageError(
            "SFTTrainer: load the model with fastft.load(...) to choose its quantisation and dtype, and pass it"
        )
    from fastft.model.load import load

    model, tokenizer = load(name)
    return model, {**kwargs, "processing_class": kwargs.get("processing_class") or tokenizer}
