"""Supervised fine-tuning: TRL's trainer with fastft's data, loss and evaluation (`base` has what trainers share).

Beside `config` the one file that subclasses TRL's SFT classes. Nothing of TRL is replaced: methods are overridden.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import trl
from accelerate import PartialState
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from fastft.data import packing
from fastft.data.training_collator import CountingCollator, lengths_vary, longest_document
from fastft.errors import Problem, UsageError
from fastft.noise import quiet
from fastft.state import get_state
from fastft.train import arguments, checkpoint, handed, memory, settings, step
from fastft.train.base import Trained, built, load_named, take_recompute
from fastft.train.cuda_graphs import Replayer, moves_activations
from fastft.train.sft import preparation, reading
from fastft.train.sft.config import LOSS_ALONE, MEASURED, SFTConfig


class SFTTrainer(Trained, trl.SFTTrainer):
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
        kwargs = settings.by_name(trl.SFTTrainer, positional, kwargs)
        args, kwargs = settings.take_older_arguments(trl.SFTTrainer, SFTConfig, args, kwargs, arguments.LEGACY)
        if isinstance(model, str):
            model, kwargs = load_named("SFTTrainer", model, args, kwargs)
        handed.refuse_in_trainer("SFTTrainer", model, kwargs)
        args = settings.as_config(SFTConfig, trl.SFTTrainer, args)
        args = arguments.with_length(args, get_state(model).max_length)
        self._reading = reading.reading_of(args, kwargs.get("formatting_func"))
        given_ids = reading.is_token_ids(kwargs.get("train_dataset"))
        self.check_evaluations(args, kwargs, MEASURED if kwargs.get("compute_loss_func") is None else LOSS_ALONE)
        kwargs |= reading.datasets_of(kwargs, self._reading, args.chat_template_path)
        checkpoint.make_folder(Path(args.output_dir))
        recompute = take_recompute(args, compile)
        args.dataset_text_field = str(args.dataset_text_field)
        if not self._reading.skip and not given_ids:  # else TRL would exchange the template, and format once more
            args.assistant_only_loss, kwargs["formatting_func"] = False, None
        with built(model, kwargs.get("train_dataset"), kwargs.get("eval_dataset")):
            super().__init__(model, args, **kwargs)
        args.assistant_only_loss = self._reading.assistant_only
        self.model_accepts_loss_kwargs = True
        if type(self.data_collator) is DataCollatorForLanguageModeling:
            own = self.data_collator
            self.data_collator = CountingCollator(**{f.name: getattr(own, f.name) for f in dataclasses.fields(own)})
        preparation.check_labels(
            self.train_dataset, self.data_collator, self.processing_class, self.args.refuse_untrained_stop
        )
        preparation.refuse_beyond_positions(self.train_dataset, self.model, "train")
        self._statistics: list[torch.Tensor] = []
        self.replayer: Replayer | None = None
        self.equip(model, "sft", compile=compile, recompute=recompute)
        self._training_collator, self._lengths_vary = self._of_few_shapes()
        if self.packing_statistics:
            self.recorder.extra["packing"] = self.packing_statistics

    @property
    def logs_late(self) -> bool:
        """Say whether the line of a step may be logged while the next one runs: on a GPU, if no subclass adds to it."""
        own = type(self)
        whole = own.log is trl.SFTTrainer.log and own.compute_loss is SFTTrainer.compute_loss
        return whole and self.args.device.type == "cuda"

    def largest_batch(self) -> tuple[int, int] | None:
        """Return (rows, length) of the largest micro-batch, None where that is not known before the run."""
        return memory.largest_batch(self.args, self.train_dataset)

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
                loss = self._loss(model, inputs, num_items_in_batch)
            if return_outputs and outputs is None:
                with torch.no_grad():
                    outputs = model(**step.without_labels(inputs), use_cache=False)
        if num_items_in_batch is not None:
            loss = loss * self._averaged
        return (loss, outputs) if return_outputs else loss

    @property
    def _averaged(self) -> int:
        """Return over how many processes gradients are averaged, where the count of targets is that of all of them."""
        return self.accelerator.num_processes // self._tp_size if self.args.average_tokens_across_devices else 1

    def _router_share(self, items: Any) -> float:
        """Return what a micro-batch's router loss counts: a mean of its own, not a sum over targets as the rest is."""
        steps = self.current_gradient_accumulation_steps
        return 1.0 if items is None else 1.0 / (steps * self._averaged)

    def _loss(self, model: Any, inputs: Any, num_items: torch.Tensor | None) -> torch.Tensor:
        def loss(batch: Mapping[str, Any], items: torch.Tensor | None) -> torch.Tensor:
            smoothing, kind, share = self.args.label_smoothing_factor, self.args.loss_type, self._router_share(items)
            return step.loss(model, batch, items, label_smoothing=smoothing, loss_type=kind, router_share=share)

        if num_items is None or not model.training:
            return loss(inputs, num_items)
        if self._lengths_vary:
            inputs = {**inputs, "lengths_vary": True}
        if self.replayer is None or self.replayer.model is not model:
            self.replayer = Replayer(model, loss, self.args.cuda_graphs)
        value = self.replayer(inputs, num_items)
        self.recorder.extra["cuda_graphs"] = self.replayer.told()
        return value

    def begin_evaluation(self) -> None:
        """Let go of the recorded step where memory is short enough for activations to be moved."""
        if moves_activations(self.model):
            self.end_training()

    def end_training(self) -> None:
        """Let go of the recorded step, whose memory is its own."""
        if self.replayer is not None:
            self.replayer.recording = None

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

    # ---- data

    def _of_few_shapes(self) -> tuple[Any, bool]:
        """Return a collator of training batches of as few kinds as can be for compiled layers, and if lengths vary.

        Rows are not filled up where every token counts (in the loss of a router, in one of the user's), nor where
        batches of fewer rows are meant to come, or all have as few.
        """
        own, compiled, args = self.data_collator, get_state(self.model).compiled, self.args
        if type(own) is not CountingCollator or compiled is None or not compiled.layers:
            return own, False
        if not step.head_check(self.model).fused:
            return own, False
        rows, data = args.per_device_train_batch_size, self.train_dataset
        vary = lengths_vary(data, own, rows)
        if own.padding_free:
            return dataclasses.replace(own, longest=longest_document(data)), vary
        theirs = type(self).compute_loss is not SFTTrainer.compute_loss or self.compute_loss_func is not None
        fewer = (
            args.auto_find_batch_size,
            args.accelerator_config.split_batches,
            getattr(args, "train_sampling_strategy", "") == "batch_rebalance",
            hasattr(data, "__len__") and len(data) <= rows,
        )
        return (own if theirs or any(fewer) else dataclasses.replace(own, rows=rows)), vary

    def get_train_dataloader(self) -> Any:
        """Return the loader of training batches; those of evaluations and predictions have the rows there are."""
        own, self.data_collator = self.data_collator, self._training_collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = own

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
        theirs_args = args if theirs else preparation.without_needless_cut(args, dataset)
        made = super()._prepare_dataset(dataset, processing_class, theirs_args, theirs, formatting_func, dataset_name)
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
