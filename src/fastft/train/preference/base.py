"""What the trainers that learn from preferences share: arguments, data, counting; the loss is TRL's on our
log-probabilities.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from fastft.errors import Problem, UsageError
from fastft.state import base_model, get_state
from fastft.train import arguments, checkpoint, handed, settings, step
from fastft.train.base import Trained, built, load_named, take_recompute
from fastft.train.hygiene import own_adapters
from fastft.train.preference import data as preference_data
from fastft.train.preference.config import MEASURED, legacy_of


class Preferring(Trained):
    """The shared half of a preference trainer; its constructor is `construct`.

    THEIRS: TRL's class. CONFIG: ours. METHOD: the record's name. KINDS: the columns that rows may have. SEQUENCES: the
    columns of tokenised rows that make one sequence each. PROMPT: that of the prompt's tokens. ROWS: sequences in a
    micro-batch for each of its rows.
    """

    THEIRS: ClassVar[type]
    CONFIG: ClassVar[type]
    METHOD: ClassVar[str]
    KINDS: ClassVar[Sequence[Sequence[str]]] = (preference_data.PAIRS,)
    SEQUENCES: ClassVar[Sequence[Sequence[str]]]
    PROMPT: ClassVar[str]
    ROWS: ClassVar[int] = 2

    def construct(self, model: Any, args: Any, compile: bool, kwargs: dict[str, Any]) -> None:
        """Bring the arguments into form, run TRL's constructor, and equip the trainer."""
        name = type(self).__name__
        args, kwargs = settings.take_older_arguments(self.THEIRS, self.CONFIG, args, kwargs, legacy_of(self.CONFIG))
        if isinstance(model, str):
            model, kwargs = load_named(name, model, args, kwargs)
        handed.refuse_in_trainer(name, model, kwargs)
        args = settings.as_config(self.CONFIG, self.THEIRS, args)
        args = arguments.with_length(args, get_state(model).max_length)
        if kwargs.get("processing_class") is None:
            kwargs["processing_class"] = get_state(model).tokenizer
        kwargs |= preference_data.datasets_of(kwargs, self.KINDS)
        checkpoint.make_folder(Path(args.output_dir))
        refuse_router(model, args)
        self.check_evaluations(args, kwargs, MEASURED[self.METHOD])
        recompute = take_recompute(args, compile)
        self.before(model, args, kwargs)
        data = kwargs.get("train_dataset"), kwargs.get("eval_dataset")
        with built(model, *data), same_trainable(model), own_adapters(model):
            super().__init__(**{"model": model, "args": args, **kwargs})
        self.after()
        self.equip(model, self.METHOD, compile=compile, recompute=recompute)

    def before(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Prepare for TRL's constructor; `args` is a copy of the user's, `kwargs` goes to the constructor."""

    def after(self) -> None:
        """Put right what TRL's constructor has made."""

    def largest_batch(self) -> tuple[int, int] | None:
        """Return (rows, length) of the largest micro-batch, None where that is not known before the run."""
        length = preference_data.longest(self.train_dataset, self.SEQUENCES)
        if length is None:
            return None
        limit = self.args.max_length
        return self.ROWS * self.args.per_device_train_batch_size, min(length, limit) if limit else length

    def head_use(self) -> tuple[str, int | None]:
        """Return that log-probabilities are asked for."""
        return "logprobs", None

    def count(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> None:
        """Count what the record reports of a micro-batch, in training."""
        if self.model.training:
            batch: Mapping[str, Tensor] = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
            self.tally.add(batch)


def completion_labels(input_ids: Tensor, completion_mask: Tensor) -> Tensor:
    """Return the ids where `completion_mask` is 1, and -100 elsewhere."""
    return input_ids.masked_fill(completion_mask == 0, step.IGNORE)


def refuse_router(model: Any, args: Any) -> None:
    """Raise `UsageError` for a model whose router has a loss of its own, which log-probabilities leave out."""
    config = base_model(model).config.get_text_config()
    coefficient = getattr(args, "router_aux_loss_coef", None)
    if coefficient is None:
        coefficient = getattr(config, "router_aux_loss_coef", 0.0)
    if getattr(config, "output_router_logits", None) is None or not coefficient:
        return
    if hasattr(args, "router_aux_loss_coef") or config.output_router_logits:
        remedy = "Set it to 0.0, in the training arguments or the model's config."
        raise UsageError(Problem("router_aux_loss_coef", coefficient, "0.0: the router's loss is not computed", remedy))


@contextlib.contextmanager
def same_trainable(model: Any) -> Iterator[None]:
    """Put back which parameters are trained: switching adapters makes PEFT train all of the active one's."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, trained in before:
            parameter.requires_grad_(trained)
