"""The configuration of reinforcement learning: TRL's with an engine, a bound on its log-probabilities, older names."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import trl
from torch import distributed

from fastft.errors import Problem
from fastft.rollout.requests import SAMPLING
from fastft.train import arguments, settings

LOSSES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "luspo", "sapo", "vespo")
# Plain names of `grpo` -> fields of GRPOConfig.
PLAIN = {
    **arguments.PLAIN,
    "generations": "num_generations",
    "max_new_tokens": "max_completion_length",
    "loss": "loss_type",
    "kl": "beta",
}
# What older scripts pass to the trainer itself -> the field of the config it has become.
LEGACY = {
    name: name for name in ("max_prompt_length", "max_completion_length", "num_generations", "max_seq_length", "beta")
}
# Fields that scripts for Unsloth set and that have no effect here -> why.
IDLE = {
    "unsloth_num_chunks": "log-probabilities are always computed in chunks, whose size follows from the vocabulary",
    "unsloth_logit_chunk_multiplier": "log-probabilities are always computed in chunks of a size of their own",
    "unsloth_grpo_mini_batch": "per_device_train_batch_size and merge_micro_batches say what a forward pass has",
}
# Fields that count something; those of the second line may be None.
COUNTS = (
    "num_generations",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_iterations",
    "keep_completions",
)
OPTIONAL = (
    "generation_batch_size",
    "steps_per_generation",
    "max_completion_length",
    "max_prompt_length",
    "max_seq_length",
    "num_generations_eval",
    "top_k",
)
# What of vLLM's SamplingParams is a field of the config.
SAMPLED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# Fields that fastft cannot serve, with the value that is no wish -> what to do instead.
REFUSED = {
    "use_transformers_continuous_batching": (False, "The engine batches; choose it with engine=."),
    "transformers_continuous_batching_config": (None, "The engine batches; choose it with engine=."),
    "cache_implementation": (None, "The engine has a cache of its own; leave it out."),
    "vllm_structured_outputs_regex": (None, "Reward the format instead: fastft.rewards.matches."),
    "cast_lm_head_to_fp32": (False, "Load the model with dtype=torch.float32 for logits computed in fp32."),
    "use_liger_kernel": (False, "fastft rewrites the layers itself; leave it out."),
    "sync_ref_model": (False, "The reference is the model without its adapter, which does not move."),
    "log_completions_hub_repo": (None, "Completions are kept in completions.jsonl of the run's folder."),
    "auto_find_batch_size": (False, "Lower per_device_train_batch_size and raise gradient_accumulation_steps."),
}


@dataclasses.dataclass
class GRPOConfig(settings.Settings, trl.GRPOConfig):
    """TRL's GRPOConfig with gradient checkpointing off (fastft's memory plan decides what is recomputed), and more.

    `engine`: what samples the completions, "transformers", "vllm" or "auto" (vLLM where it is installed and there is a
    GPU). Left out it is "vllm" with `use_vllm=True`, else "auto". `engine_options` go to `fastft.rollout.make_engine`.
    `max_logprob_difference`: how far the engine's log-probabilities may be from the trainer's, in nats a token in the
    mean over an update; beyond it the run stops before the optimizer steps, with the likely reasons (None: never).
    Where top_p, top_k or min_p cut the distribution off, only what is lower than the trainer's counts; with a
    repetition penalty nothing is refused.
    `reward_time_limit`: seconds that one call of a reward may take. `keep_completions`: of every generation, how many
    sample completions go to completions.jsonl.
    `merge_micro_batches`: micro-batches of an update are computed as one where the update is the same and the memory
    plan recomputes and moves no more of it; a line says so. None does that on a GPU, True on any device, False nowhere.

    `max_prompt_length`: prompts of more tokens are left out, and one line says how many. `max_seq_length`: the same for
    a prompt and its completion together. `vllm_sampling_params`: an older place of temperature, top_p, top_k, min_p and
    repetition_penalty, which are moved to the fields of these names. Fields that other tools add and that have no
    effect here are accepted with a line that says why.

    Of a batch of completions every prompt must have all its `num_generations`; anything else raises `UsageError` with
    the numbers to use. All mistakes are told together.
    """

    DERIVED: ClassVar[tuple[str, ...]] = ("generation_batch_size",)  # from steps_per_generation, which is copied

    engine: str | None = dataclasses.field(default=None, metadata={"help": "What samples: auto, transformers, vllm."})
    engine_options: dict[str, Any] | None = dataclasses.field(default=None, metadata={"help": "Of the engine."})
    max_logprob_difference: float | None = dataclasses.field(
        default=0.25, metadata={"help": "Bound on mean |engine - trainer| of log-probabilities, nats a token."}
    )
    reward_time_limit: float = dataclasses.field(default=600.0, metadata={"help": "Seconds for a call of a reward."})
    keep_completions: int = dataclasses.field(default=4, metadata={"help": "Samples kept of every generation."})
    merge_micro_batches: bool | None = dataclasses.field(
        default=None, metadata={"help": "Compute micro-batches of an update as one where they fit."}
    )
    max_prompt_length: int | None = dataclasses.field(default=None, metadata={"help": "Longer prompts are left out."})
    max_seq_length: int | None = dataclasses.field(default=None, metadata={"help": "Prompt and completion together."})
    vllm_sampling_params: Any = dataclasses.field(default=None, metadata={"help": "Moved to the fields it holds."})
    unsloth_num_chunks: int | None = dataclasses.field(default=None, metadata={"help": "No effect."})
    unsloth_logit_chunk_multiplier: int | None = dataclasses.field(default=None, metadata={"help": "No effect."})
    unsloth_grpo_mini_batch: int | None = dataclasses.field(default=None, metadata={"help": "No effect."})

    def __post_init__(self) -> None:
        if not _count_problems(self) and not arguments.wrong_switches(self):  # it goes by them
            self._take_older()
        super().__post_init__()

    def mistakes(self) -> list[Problem]:
        """Return all fields that cannot be meant or served; of a field, what is said of it first."""
        counts = _count_problems(self)
        found = [
            *counts,
            *_problems(self),
            *([] if counts else batch_problems(self, _processes())),
            *super().mistakes(),
        ]
        return list({problem.where: problem for problem in reversed(found)}.values())[::-1]

    def _take_older(self) -> None:
        for name, why in IDLE.items():
            if getattr(self, name) not in (None, -1):
                print(f"fastft: GRPOConfig({name}=...) has no effect: {why}.")
            setattr(self, name, None)
        if self.vllm_sampling_params is not None:
            moved = _sampling_of(self.vllm_sampling_params)
            for name, value in moved.items():
                setattr(self, name, value)
            told = ", ".join(f"{name}={value!r}" for name, value in moved.items()) or "nothing that differs"
            print(f"fastft: GRPOConfig(vllm_sampling_params=...) is moved to fields of the config: {told}.")
            self.vllm_sampling_params = None
        if self.top_k == -1:  # vLLM's way of saying that all tokens are kept
            self.top_k = 0
        if self.max_seq_length is not None:
            room = self.max_seq_length - (self.max_completion_length or 0)
            self.max_prompt_length = min(room, self.max_prompt_length or room)
            self.max_seq_length = None
        self.use_vllm, wanted = False, self.use_vllm  # the engine is fastft's, for TRL's constructor there is none
        if self.engine is None:
            self.engine = "vllm" if wanted else "auto"


def batch_problems(args: Any, processes: int = 1) -> list[Problem]:
    """Return what does not divide in the batches of a config, each with the numbers that would."""
    batch, group = args.per_device_train_batch_size * processes, args.num_generations
    if group < 2:
        remedy = "The advantage of a completion is measured against the others of its prompt."
        return [Problem("GRPOConfig num_generations", group, "at least 2", remedy)]
    if args.generation_batch_size is not None and args.steps_per_generation is not None:
        both = (args.generation_batch_size, args.steps_per_generation)
        return [Problem("GRPOConfig generation_batch_size and steps_per_generation", both, "one of the two")]
    if args.generation_batch_size is not None:
        wholes = args.generation_batch_size
        step = math.lcm(batch, group)
        if wholes % step:
            near = -(-wholes // step) * step
            expected = f"a multiple of both the batch ({batch}) and num_generations ({group})"
            return [Problem("GRPOConfig generation_batch_size", wholes, expected, f"Use generation_batch_size={near}.")]
        return []
    name = "steps_per_generation" if args.steps_per_generation is not None else "gradient_accumulation_steps"
    times = getattr(args, name)
    total = batch * times
    if total % group == 0:
        return []
    step = math.lcm(batch, group) // batch
    more = -(-times // step) * step
    fits = [size for size in range(2, total + 1) if total % size == 0]
    parts = f"{args.per_device_train_batch_size} x {times}" + (f" x {processes} processes" if processes > 1 else "")
    remedies = [
        f"{name}={more}",
        f"per_device_train_batch_size={group}" if processes == 1 else "",
        f"num_generations={min(fits, key=lambda size: abs(size - group))}" if fits else "",
    ]
    remedy = f"Use {', or '.join(part for part in remedies if part)}."
    where = f"GRPOConfig completions a generation (per_device_train_batch_size x {name})"
    return [Problem(where, f"{parts} = {total}", f"a multiple of num_generations={group}", remedy)]


def _processes() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _count_problems(args: Any) -> list[Problem]:
    """Return the fields that count something and hold no whole number."""
    return [
        Problem(f"GRPOConfig {name}", value, "a whole number" + (" or None" if name in OPTIONAL else ""))
        for name in (*COUNTS, *OPTIONAL)
        if (value := getattr(args, name)) is not None or name not in OPTIONAL
        if not hasattr(value, "__index__") or isinstance(value, bool)
    ]


def _problems(args: Any) -> list[Problem]:
    """Return every field that cannot be meant or cannot be served."""
    problems = [
        Problem(f"GRPOConfig {name}", getattr(args, name), repr(plain), remedy)
        for name, (plain, remedy) in REFUSED.items()
        if getattr(args, name, plain) not in (plain, None)
    ]
    if args.loss_type not in LOSSES:
        near = arguments.did_you_mean(args.loss_type, LOSSES)
        problems.append(Problem("GRPOConfig loss_type", args.loss_type, f"one of {', '.join(LOSSES)}", near))
    choices = {
        "importance_sampling_level": ("token", "sequence"),
        "scale_rewards": ("group", "batch", "none", True, False),
        "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
        "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
        "merge_micro_batches": (None, True, False),
    }
    for name, known in choices.items():
        if getattr(args, name) not in known:
            problems.append(Problem(f"GRPOConfig {name}", getattr(args, name), f"one of {known}"))
    bounds = {
        "temperature": (lambda v: v > 0, "above 0: at 0 all completions of a prompt are equal"),
        "max_completion_length": (lambda v: v >= 1, "at least 1"),
        "max_prompt_length": (lambda v: v >= 1, "at least 1 (max_seq_length less max_completion_length)"),
        "num_iterations": (lambda v: v >= 1, "at least 1"),
        "beta": (lambda v: v >= 0, "at least 0"),
        "epsilon": (lambda v: v >= 0, "at least 0"),
        "reward_time_limit": (lambda v: v > 0, "above 0"),
        "keep_completions": (lambda v: v >= 0, "at least 0"),
        "max_logprob_difference": (lambda v: v >= 0, "at least 0, or None"),
    }
    for name, (holds, expected) in bounds.items():
        value = getattr(args, name)
        if value is None and name in ("max_prompt_length", "max_logprob_difference"):
            continue
        if not isinstance(value, int | float) or isinstance(value, bool) or not holds(value):
            problems.append(Problem(f"GRPOConfig {name}", value, f"a number {expected}"))
    for name in ("top_p", "top_k", "min_p", "repetition_penalty"):
        value, (holds, expected) = getattr(args, name), SAMPLING[name]
        if not holds(value) and not (value is None and name in ("top_k", "min_p")):
            problems.append(Problem(f"GRPOConfig {name}", value, expected))
    weights = args.reward_weights
    listed = weights is None or isinstance(weights, list | tuple)
    if not listed or any(isinstance(one, bool) or not isinstance(one, int | float) for one in weights or ()):
        problems.append(Problem("GRPOConfig reward_weights", weights, "a list of numbers, one of each reward"))
    if args.generation_kwargs:
        remedy = "Temperature, top_p, top_k, min_p and repetition_penalty are fields; options of the engine go into "
        problems.append(
            Problem("GRPOConfig generation_kwargs", args.generation_kwargs, "none", remedy + "engine_options.")
        )
    return problems


def _sampling_of(given: Any) -> dict[str, Any]:
    """Return the fields that a mapping or vLLM's SamplingParams sets."""
    names = (*SAMPLED, "stop")
    values = dict(given) if isinstance(given, Mapping) else {name: getattr(given, name, None) for name in names}
    if values.get("stop"):
        stop = values["stop"]
        print(f"fastft: stop={stop!r} of vllm_sampling_params is left out: a completion ends at the model's own end.")
    if values.get("top_k") == -1:  # vLLM's way of saying that all tokens are kept
        values["top_k"] = 0
    unset = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    return {name: values[name] for name in SAMPLED if values.get(name) not in (None, unset[name])}


def make_config(
    config: GRPOConfig | None, options: Mapping[str, Any], output_dir: str, model: Any, evaluated: bool = False
) -> GRPOConfig:
    """Return the config of `grpo`: the one given, or one of its options. Raises `UsageError` for both."""
    settings.refuse_both("grpo", config, options)
    if config is not None:
        return config
    fields = arguments.config_fields("grpo", options, arguments.field_names(GRPOConfig), PLAIN)
    group = fields.get("num_generations")
    meant = hasattr(group, "__index__") and group > 1  # else it is told as the only mistake
    defaults: dict[str, Any] = {
        **settings.model_defaults(model, output_dir, fields),
        "learning_rate": 1e-5 if hasattr(model, "peft_config") else 1e-6,
        "per_device_train_batch_size": group if meant else 8,
        "num_train_epochs": 1,
    }
    if "generation_batch_size" not in fields and "steps_per_generation" not in fields:
        defaults["gradient_accumulation_steps"] = 4 if "per_device_train_batch_size" not in fields else 1
    return arguments.made(GRPOConfig, defaults, fields, evaluated)
