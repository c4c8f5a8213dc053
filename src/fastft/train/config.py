"""The configuration of supervised fine-tuning: TRL's with other defaults and more fields, from any arguments."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch
import trl
from transformers import TrainingArguments

from fastft.data import check, columns
from fastft.errors import Problem, UsageError
from fastft.state import base_model, get_state
from fastft.train import arguments


@dataclasses.dataclass
class SFTConfig(trl.SFTConfig):
    """TRL's SFTConfig with gradient checkpointing off (fastft's memory plan decides what is recomputed), and more.

    `gradient_checkpointing=True` compiles the layers with the memory plan "min"; where nothing is compiled,
    transformers recomputes. `max_length` left out is the length that `fastft.load` has set, or 1024 for another model.
    `bf16` left open means bf16 autocast where the GPU has it, and none on a CPU.

    `assistant_only_loss` left out means True for conversations (TRL: False), `completion_only_loss` left out True for
    prompts with completions. `dataset_text_field`, if given, wins over all other columns: that text is learnt whole.

    `embedding_learning_rate`: for trained embeddings and head. `loraplus_ratio`: LoRA's B matrices learn that many
    times faster. `early_stopping_patience`: evaluations without an improvement of `metric_for_best_model` (default
    eval_loss) before training stops with the best weights. `max_seq_length`: the older name of `max_length`.

    `max_unlearnable`: the share of training rows that may be left with nothing to learn by `max_length`; they are then
    left out. `refuse_untrained_stop=False` allows data in which no stop token bears loss.
    """

    gradient_checkpointing: bool = dataclasses.field(default=False, metadata={"help": "Memory plan 'min'."})
    max_length: int | None = dataclasses.field(
        default=arguments.DEFAULT_LENGTH, metadata={"help": "Longest row in tokens; what is longer is cut off."}
    )
    dataset_text_field: str = dataclasses.field(
        default=arguments.DEFAULT_FIELD, metadata={"help": "Column to train on as text; wins over all others if given."}
    )
    assistant_only_loss: bool | None = dataclasses.field(
        default=None, metadata={"help": "Of conversations learn the assistant's turns (default), or all (False)."}
    )
    embedding_learning_rate: float | None = dataclasses.field(default=None, metadata={"help": "Rate for embeddings."})
    loraplus_ratio: float | None = dataclasses.field(
        default=None, metadata={"help": "LoRA+: rate of B over rate of A."}
    )
    early_stopping_patience: int | None = dataclasses.field(default=None, metadata={"help": "Evaluations to wait."})
    early_stopping_threshold: float = dataclasses.field(default=0.0, metadata={"help": "Least improvement."})
    max_seq_length: int | None = dataclasses.field(default=None, metadata={"help": "Older name of max_length."})
    max_unlearnable: float = dataclasses.field(default=0.0, metadata={"help": "Share of rows that may be left out."})
    refuse_untrained_stop: bool = dataclasses.field(default=True, metadata={"help": "Refuse data without an end."})

    def __new__(cls, *args: Any, **kwargs: Any) -> "SFTConfig":
        """Refuse unknown names with the nearest known one, before the dataclass sees them."""
        arguments.refuse_unknown(cls.__name__, kwargs, arguments.field_names(cls))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if self.max_seq_length is not None:
            self.max_length, self.max_seq_length = self.max_seq_length, None
        if self.early_stopping_patience is not None:
            self.metric_for_best_model = self.metric_for_best_model or "eval_loss"
            self.load_best_model_at_end = True
        arguments.refuse_values(self)
        if self.bf16 is None and not self.fp16:
            self.bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        super().__post_init__()


def make_config(
    config: SFTConfig | None, options: Mapping[str, Any], output_dir: str, model: Any, train: Any, eval: Any
) -> SFTConfig:
    """Return the config of `sft`: the one given, or one of its options.

    Raises `UsageError` for both, and `DataError` for rows that are longer than the options' `max_length`.
    """
    if config is not None:
        if options:
            raise UsageError(f"sft: give config or {', '.join(sorted(options))}, not both; put them into the config")
        return config
    fields = arguments.config_fields(options, arguments.field_names(SFTConfig))
    dtype = base_model(model).get_input_embeddings().weight.dtype
    sized = {name: data for name, data in (("train", train), ("eval", eval)) if hasattr(data, "__len__")}
    longest = max((int(columns.lengths(data).max()) for data in sized.values()), default=None)
    defaults: dict[str, Any] = {
        "output_dir": output_dir,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        "use_cpu": base_model(model).get_input_embeddings().weight.device.type == "cpu",
        "learning_rate": 2e-4 if hasattr(model, "peft_config") else 2e-5,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "max_length": get_state(model).max_length or longest,
    }
    if "bf16" in fields or "fp16" in fields:
        defaults |= {"bf16": False, "fp16": False}
    if fields.get("packing"):
        defaults["max_length"] = get_state(model).max_length or max(longest or 0, 1024)
    if fields.get("padding_free") and not fields.get("packing"):
        defaults["max_length"] = None
    if eval is not None:
        defaults |= arguments.evaluation_defaults(fields)
    made = SFTConfig(**defaults | fields)
    if made.max_length is not None:
        for name, data in sized.items():
            check.refuse_overlong(data, made.max_length, name)
    return made


def take_older_arguments(args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Move what older scripts pass to the trainer to where it belongs, and refuse what nothing knows."""
    known = [name for name in inspect.signature(trl.SFTTrainer.__init__).parameters if name != "self"]
    arguments.refuse_unknown("SFTTrainer", kwargs, [*known, "tokenizer", "compile", *arguments.LEGACY])
    kwargs = dict(kwargs)
    if "tokenizer" in kwargs:
        if kwargs.get("processing_class") is not None:
            raise UsageError("SFTTrainer: tokenizer and processing_class are the same thing; give one of them")
        kwargs["processing_class"] = kwargs.pop("tokenizer")
    older = {name: kwargs.pop(name) for name in list(kwargs) if name in arguments.LEGACY}
    fields, lines = arguments.moved(older)
    for line in lines:
        print(line)
    return (_evolve(args, fields) if fields else args), kwargs


def by_name(positional: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments with those that were given by their place behind `args`. Raises `UsageError`."""
    names = list(inspect.signature(trl.SFTTrainer.__init__).parameters)[3:]
    doubled = [name for name in names[: len(positional)] if name in kwargs]
    if doubled or len(positional) > len(names):
        told = f"{', '.join(doubled)} given twice" if doubled else "too many arguments"
        raise UsageError(f"SFTTrainer: {told}; pass all behind args by their names")
    return {**dict(zip(names, positional, strict=False)), **kwargs}


def _evolve(args: Any, fields: Mapping[str, Any]) -> "SFTConfig":
    """Return `args` as a SFTConfig with some fields changed, whatever training arguments they were."""
    if args is None:
        return SFTConfig(output_dir="run", **fields)
    taken = {item.name for item in dataclasses.fields(SFTConfig) if item.init}
    same = {
        item.name: getattr(args, item.name) for item in dataclasses.fields(args) if item.init and item.name in taken
    }
    if not isinstance(args, SFTConfig):  # what TRL has by default is not what the user has said
        for name, default in (("assistant_only_loss", False), ("dataset_text_field", "text")):
            if same.get(name) == default:
                del same[name]
    return SFTConfig(**{**same, **fields})


def as_config(args: Any, model: Any) -> "SFTConfig":
    """Return a SFTConfig; TRL's own default of gradient checkpointing is not taken over, and that is said."""
    if isinstance(args, SFTConfig):
        return args
    if args is None or isinstance(args, TrainingArguments):
        fields = {}
        if getattr(args, "gradient_checkpointing", False):
            print(
                "fastft: gradient checkpointing is left to the memory plan; "
                "fastft.SFTConfig(gradient_checkpointing=True) asks for it."
            )
            fields["gradient_checkpointing"] = False
        return _evolve(args, fields)
    raise UsageError(
        Problem("SFTTrainer args", type(args).__name__, "a fastft.SFTConfig or transformers TrainingArguments")
    )
