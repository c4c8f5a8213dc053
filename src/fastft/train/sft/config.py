"""The configuration of supervised fine-tuning: TRL's with other defaults and more fields, from any arguments."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import trl

from fastft.data import columns
from fastft.errors import Problem, did_you_mean
from fastft.state import get_state
from fastft.train import arguments, settings
from fastft.train.best import Measured
from fastft.train.cuda_graphs import MODES
from fastft.train.words import renamed

# What an evaluation gives, unless the user has it compute something else, and with a loss of the user's own.
MEASURED, LOSS_ALONE = Measured(("loss", "perplexity", "mean_token_accuracy")), Measured(("loss",))
# What fields may be, and older words for it that TRL takes.
CHOICES = {
    "cuda_graphs": (MODES, ()),
    "packing_strategy": (("bfd", "bfd_split"), ("bfd-requeue",)),
    "loss_type": (("nll", "dft"), ("chunked_nll",)),
}
# Choices of TRL's that are none here, and what to say of them.
NOT_HERE = {"wrapped": "It cuts rows in two and lets one attend to another; 'bfd', the default, packs them whole."}


@dataclasses.dataclass
class SFTConfig(settings.Settings, trl.SFTConfig):
    """TRL's SFTConfig with gradient checkpointing off (fastft's memory plan decides what is recomputed), and more.

    `gradient_checkpointing=True` compiles the layers with the memory plan "min"; where nothing is compiled,
    transformers recomputes. `max_length` left out is the length that `fastft.load` has set, or 1024 for another model.
    `bf16` left open means bf16 autocast where the GPU has it, and none on a CPU.

    `assistant_only_loss` left out means True for conversations (TRL: False), `completion_only_loss` left out True for
    prompts with completions. `dataset_text_field`, if given, wins over all other columns: that text is learnt whole.

    `embedding_learning_rate`: for trained embeddings and head. `loraplus_ratio`: LoRA's B matrices learn that many
    times faster. `early_stopping_patience`: evaluations without an improvement of `metric_for_best_model` (default
    eval_loss) before training stops with the best weights. `max_seq_length`: the older name of `max_length`.
    `compute`: "exact", "fp8" or "fp8+head", as `fastft.compile` takes it; other than "exact" it changes the numbers.

    `max_unlearnable`: the share of training rows that may be left with nothing to learn by `max_length`; they are then
    left out. `refuse_untrained_stop=False` allows data in which no stop token bears loss.

    `cuda_graphs`: "auto" replays steps of one shape as CUDA graphs where launching them takes the host long, "always"
    wherever it can be done, "never". run.json says how many were replayed, and why none is.
    """

    UNSAID: ClassVar[Mapping[str, Any]] = {"assistant_only_loss": False, "dataset_text_field": "text"}

    max_length: int | None = dataclasses.field(
        default=arguments.DEFAULT_LENGTH, metadata={"help": "Longest row in tokens; what is longer is cut off."}
    )
    dataset_text_field: str = dataclasses.field(
        default=arguments.DEFAULT_FIELD, metadata={"help": "Column to train on as text; wins over all others if given."}
    )
    assistant_only_loss: bool | None = dataclasses.field(
        default=None, metadata={"help": "Of conversations learn the assistant's turns (default), or all (False)."}
    )
    max_seq_length: int | None = dataclasses.field(default=None, metadata={"help": "Older name of max_length."})
    max_unlearnable: float = dataclasses.field(default=0.0, metadata={"help": "Share of rows that may be left out."})
    refuse_untrained_stop: bool = dataclasses.field(default=True, metadata={"help": "Refuse data without an end."})
    cuda_graphs: str = dataclasses.field(default="auto", metadata={"help": "Replay steps: auto, always or never."})

    def __post_init__(self) -> None:
        names = {}
        if self.max_seq_length is not None:
            self.max_length, self.max_seq_length = self.max_seq_length, None
            names = {"max_length": "max_seq_length"}
        with renamed((type(self),), type(self).__name__, names):
            super().__post_init__()

    def mistakes(self) -> list[Problem]:
        """Return all fields that cannot be meant."""
        wrong, owner = [], type(self).__name__
        for name, (known, older) in CHOICES.items():
            value = getattr(self, name)
            if value not in (*known, *older):
                remedy = NOT_HERE.get(str(value)) or did_you_mean(str(value), known)
                wrong.append(Problem(f"{owner} {name}", value, f"one of {', '.join(known)}", remedy))
        return [*wrong, *super().mistakes()]


def make_config(
    config: SFTConfig | None, options: Mapping[str, Any], output_dir: str, model: Any, evaluated: bool
) -> SFTConfig:
    """Return the config of `sft`: the one given, or one of its options, whose length may be left to `settle_length`.

    Raises `UsageError` for both.
    """
    settings.refuse_both("sft", config, options)
    if config is not None:
        return config
    fields = arguments.config_fields("sft", options, arguments.field_names(SFTConfig))
    defaults: dict[str, Any] = {
        **settings.model_defaults(model, output_dir, fields),
        "learning_rate": 2e-4 if hasattr(model, "peft_config") else 2e-5,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "max_length": get_state(model).max_length or arguments.DEFAULT_LENGTH,
    }
    if fields.get("padding_free") and not fields.get("packing"):
        defaults["max_length"] = None
    return arguments.made(SFTConfig, defaults, fields, evaluated)


def settle_length(args: SFTConfig, data: Iterable[Any]) -> None:
    """Set a `max_length` that was left open to that of the longest row of token ids; rows are packed to 1024 or more.

    Streams have no longest row: nothing is set for them, and they are not cut.
    """
    if not isinstance(args.max_length, arguments.DefaultLength):
        return
    longest = max((int(columns.lengths(rows).max()) for rows in data if hasattr(rows, "__len__")), default=None)
    args.max_length = max(longest or 0, int(arguments.DEFAULT_LENGTH)) if args.packing else longest
