"""What every config of a fastft trainer has beside TRL's fields, and how a trainer's arguments become one.

A config is `class XConfig(Settings, trl.XConfig)`, a dataclass. `names` are the arguments of TRL's trainer.
"""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from fastft.errors import Problem, UsageError, argument_names
from fastft.state import base_model
from fastft.train import arguments, best, handed, recomputing


@dataclasses.dataclass
class Settings:
    """The shared fields, with unknown names and impossible values refused, all at once.

    `gradient_checkpointing` (in newer transformers also `activation_checkpointing`) is off if it is left out: fastft's
    memory plan decides what is recomputed; True by either name compiles the layers with the plan "min".
    `embedding_learning_rate`: for trained embeddings and head. `loraplus_ratio`: LoRA's B matrices learn that many
    times faster. `early_stopping_patience`: evaluations without an improvement of `metric_for_best_model` (default
    eval_loss) before training stops with the best weights; one that no evaluation gives is refused before training,
    unless `compute_metrics`, a subclass, a reward or the `on_evaluate` of one of the trainer's `callbacks` may add it.
    `bf16` left open means bf16 autocast where the GPU has it, and none on a CPU. `compute`: "exact", "fp8" or
    "fp8+head", as `fastft.compile` takes it; other than "exact" it changes the numbers. `warmup_ratio` is the older
    name of a `warmup_steps` below 1. Fields that ask for evaluations (`eval_strategy`, `eval_steps`,
    `early_stopping_patience`) want evaluation data beside them.
    """

    # TRL's defaults that mean here that the user has not said anything, in training arguments of another kind
    UNSAID: ClassVar[Mapping[str, Any]] = {}
    # fields that a config works out from others, and that are not copied with them
    DERIVED: ClassVar[tuple[str, ...]] = ()

    gradient_checkpointing: bool | None = dataclasses.field(default=None, metadata={"help": "Memory plan 'min'."})
    embedding_learning_rate: float | None = dataclasses.field(default=None, metadata={"help": "Rate for embeddings."})
    loraplus_ratio: float | None = dataclasses.field(
        default=None, metadata={"help": "LoRA+: rate of B over rate of A."}
    )
    early_stopping_patience: int | None = dataclasses.field(default=None, metadata={"help": "Evaluations to wait."})
    early_stopping_threshold: float = dataclasses.field(default=0.0, metadata={"help": "Least improvement."})
    compute: str | None = dataclasses.field(
        default=None, metadata={"help": "exact, fp8 or fp8+head (not exact); as the model is compiled, else exact."}
    )
    warmup_ratio: float | None = dataclasses.field(default=None, metadata={"help": "warmup_steps as a share."})

    def __new__(cls, *args: Any, **kwargs: Any) -> "Settings":
        """Refuse unknown names with the nearest known one, before the dataclass sees them."""
        arguments.refuse_unknown(cls.__name__, kwargs, arguments.field_names(cls))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        best.settle(self)
        if mistakes := self.mistakes():
            raise UsageError(*mistakes)
        recomputing.settle(self)
        if self.warmup_ratio is not None:  # the older way to say it; a number of steps below 1 is a share of all
            self.warmup_steps, self.warmup_ratio = self.warmup_ratio or self.warmup_steps, None
        if not torch.accelerator.is_available():  # which transformers wants to be told before it takes bf16
            self.use_cpu = True
        if self.bf16 is None and not self.fp16:
            self.bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        if self.accelerator_config is None or isinstance(self.accelerator_config, dict):
            # the host does not wait until a batch has been copied, nor for the steps before that
            pinned = self.dataloader_pin_memory and not self.use_cpu
            self.accelerator_config = {"non_blocking": pinned, **(self.accelerator_config or {})}
        super().__post_init__()

    def mistakes(self) -> list[Problem]:
        """Return all fields that cannot be meant."""
        folder = self.output_dir  # None is transformers' own
        wrong = None if folder is None else handed.folder_problem(f"{type(self).__name__} output_dir", folder)
        told = [] if wrong is None else [wrong]
        return [*told, *arguments.value_problems(self), *best.problems(self), *_idle_on_cpu(self)]


def _idle_on_cpu(args: Settings) -> list[Problem]:
    """Return an fp16 that would do nothing: on a CPU there is neither autocast to it nor a scale of gradients."""
    if args.fp16 is not True or args.bf16 is True or not (args.use_cpu or not torch.accelerator.is_available()):
        return []
    remedy = "Leave it out: the model's own dtype decides, which fastft.load(dtype=...) chooses."
    return [Problem(f"{type(args).__name__} fp16", True, "False on a CPU, which trains in bf16 or fp32", remedy)]


def model_defaults(model: Any, output_dir: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields of a config that follow from the model where the user has not said them in `fields`."""
    weight = base_model(model).get_input_embeddings().weight
    chosen = "bf16" in fields or "fp16" in fields
    return {
        "output_dir": output_dir,
        "bf16": weight.dtype is torch.bfloat16 and not chosen,
        "fp16": weight.dtype is torch.float16 and not chosen and weight.device.type != "cpu",
        "use_cpu": weight.device.type == "cpu",
        "logging_steps": 1,
    }


def refuse_both(owner: str, config: Any, options: Mapping[str, Any]) -> None:
    """Raise `UsageError` for a whole config together with single options."""
    if config is not None and options:
        told = ", ".join(sorted(options))
        raise UsageError(f"{owner}: give config or {told}, not both; put them into the config")


def by_name(trainer: type, positional: tuple[Any, ...], kwargs: dict[str, Any], skip: int = 3) -> dict[str, Any]:
    """Return `kwargs` with the arguments that were given by their place behind the first `skip`, self among them.

    `trainer` is TRL's class. Raises `UsageError`.
    """
    names = list(inspect.signature(trainer.__init__).parameters)[skip:]
    doubled = [name for name in names[: len(positional)] if name in kwargs]
    if doubled or len(positional) > len(names):
        told = f"{', '.join(doubled)} given twice" if doubled else "too many arguments"
        raise UsageError(f"{trainer.__name__}: {told}; pass all behind args by their names")
    return {**dict(zip(names, positional, strict=False)), **kwargs}


def take_older_arguments(
    trainer: type,
    config: type,
    args: Any,
    kwargs: Mapping[str, Any],
    legacy: Mapping[str, str],
    own: Sequence[str] = ("compile",),
) -> tuple[Any, dict[str, Any]]:
    """Move what older scripts pass to a trainer to where it belongs, and refuse what nothing knows.

    `legacy` maps such arguments to fields of `config`; `own` are arguments that fastft adds to TRL's. Raises
    `UsageError`.
    """
    known = [*argument_names(trainer.__init__)[1:], "tokenizer", *own]
    arguments.refuse_unknown(trainer.__name__, kwargs, known, legacy, config)
    kwargs = dict(kwargs)
    if "tokenizer" in kwargs:
        if kwargs.get("processing_class") is not None:
            raise UsageError(f"{trainer.__name__}: tokenizer and processing_class are the same thing; give one of them")
        kwargs["processing_class"] = kwargs.pop("tokenizer")
    older = {name: kwargs.pop(name) for name in list(kwargs) if name in legacy}
    for name, value in older.items():
        place = f"{config.__name__}({legacy[name]}=...)"
        print(f"fastft: {trainer.__name__}({name}=...) is now {place}; {value!r} was moved there.")
    fields = {legacy[name]: value for name, value in older.items()}
    if fields and args is not None:
        args = as_config(config, trainer, args)  # before it is one: what of TRL's is not taken over is said here
    return (evolved(config, args, fields) if fields else args), kwargs


def evolved(config: type, args: Any, fields: Mapping[str, Any]) -> Any:
    """Return `args` as a `config` with some fields changed, whatever training arguments they were."""
    if args is None:
        return config(**{"output_dir": "run", **fields})
    taken = set(arguments.field_names(config)) - set(config.DERIVED)
    same = {
        item.name: getattr(args, item.name) for item in dataclasses.fields(args) if item.init and item.name in taken
    }
    if not isinstance(args, config):
        for name, default in config.UNSAID.items():
            if same.get(name) == default:
                del same[name]
        if same.get("accelerator_config") == AcceleratorConfig():
            del same["accelerator_config"]
    return config(**{**same, **fields})


def as_config(config: type, trainer: type, args: Any) -> Any:
    """Return a `config`; TRL's own default of gradient checkpointing is not taken over, and that is said.

    Raises `UsageError` for anything but training arguments, and for those of another trainer.
    """
    if isinstance(args, config):
        return args
    theirs = handed.of_trl(type(args))
    anothers = theirs is not None and not issubclass(config, theirs)
    if not anothers and (args is None or isinstance(args, TrainingArguments)):
        fields = {}
        if recomputing.is_asked(args):
            print(
                "fastft: gradient checkpointing is left to the memory plan; "
                f"fastft.{config.__name__}(gradient_checkpointing=True) asks for it."
            )
            fields = recomputing.fields(config, False)
        return evolved(config, args, fields)
    expected = f"a fastft.{config.__name__} or transformers TrainingArguments"
    raise UsageError(Problem(f"{trainer.__name__} args", type(args).__name__, expected))
