"""One arm's job: a model shape, how it is trained, and the batch; every arm's data; what is measured."""

import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from attrs import asdict, field, frozen
from transformers import TrainerCallback

from benchmarks.cells import Cell
from benchmarks.shapes import shape_of
from fastft.train.grpo.phases import Phases

WARMUP = 2  # steps that compile and fill caches, left out of the medians
PHASES = ("rollout", "hand_over", "logprobs", "rewards", "update")


@frozen
class Job:
    """One arm on one cell. Of each step `prompts` prompts get `generations` completions; `rows` are trained at once.

    `prompt` and `completion` are tokens. `folder` holds the model and its tokenizer, for arms that load from one. The
    step that ends after `until`, in seconds since 1970, is the last; 0 for none.
    """

    arm: str
    shape: str
    mode: str
    steps: int
    prompts: int = 8
    generations: int = 8
    prompt: int = 128
    completion: int = 256
    rows: int = 16
    rank: int = 16
    layers: int = 0
    engine: str = "vllm"
    engine_options: Mapping[str, Any] = field(factory=dict)
    backend: str = "inductor"
    folder: str = ""
    output: str = ""
    until: float = 0.0

    @property
    def cell(self) -> Cell:
        """Return the model's cell of the other benchmarks, whose weights these are."""
        return Cell(self.shape, self.mode, self.rows, self.prompt + self.completion, layers=self.layers, rank=self.rank)

    @property
    def completions(self) -> int:
        """The completions of a step."""
        return self.prompts * self.generations

    def to_dict(self) -> dict[str, Any]:
        """Return the job as plain data, ready for JSON."""
        return asdict(self)

    def settings(self) -> dict[str, Any]:
        """Return the fields of TRL's GRPOConfig that every arm has."""
        return {
            "output_dir": self.output,
            "max_steps": self.steps,
            "per_device_train_batch_size": self.rows,
            "gradient_accumulation_steps": self.completions // self.rows,
            "num_generations": self.generations,
            "max_completion_length": self.completion,
            "learning_rate": 1e-5,
            "beta": 0.0,
            "loss_type": "dapo",
            "temperature": 1.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "bf16": torch.cuda.is_available(),
            "use_cpu": not torch.cuda.is_available(),
            "disable_tqdm": True,
            "seed": 0,
        }


def tokenizer_of(vocabulary: int) -> Any:
    """Return a tokenizer with a word for every id of a model's vocabulary, so that any sampled id is text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"bos_token": "<s>", "unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
    words = ["<s>", "<unk>", "</s>", "<pad>", *(f"w{number}" for number in range(4, vocabulary))]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def dataset_of(job: Job) -> Any:
    """Return random prompts of exactly `job.prompt` tokens, another for every place of every step."""
    from datasets import Dataset

    generator = torch.Generator().manual_seed(1)
    vocabulary = shape_of(job.shape).vocabulary
    ids = torch.randint(4, vocabulary, (job.steps * job.prompts, job.prompt), generator=generator)
    return Dataset.from_list([{"prompt": " ".join(f"w{number}" for number in row)} for row in ids.tolist()])


def reward(prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Any], **_: Any) -> list[float]:
    """Return the share of even ids: a reward that differs within a group."""
    return [sum(number % 2 == 0 for number in ids) / max(1, len(ids)) for ids in completion_ids]


class Timed:
    """Takes the time of the phases of a TRL trainer; stands before it among the bases."""

    phases: Phases

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        own = getattr(self, "vllm_generation", None)
        if own is not None and self.state.global_step != self._last_loaded_step:
            with self.phases("hand_over"):
                own.sync_weights()
            self._last_loaded_step = self.state.global_step
        with self.phases("rollout"):
            return super()._generate_single_turn(*args, **kwargs)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)
        with self.phases("logprobs"):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        with self.phases("rewards"):
            return super()._calculate_rewards(*args, **kwargs)


class StepClock(TrainerCallback):
    """Notes the seconds of each step and of its phases; what is in no other phase is the update."""

    def __init__(self, phases: Phases) -> None:
        self.phases, self.steps = phases, []
        self.began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the step's time."""
        self.began = now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the step."""
        seconds = now() - self.began
        self.steps.append({"seconds": seconds, **self.phases.take(seconds, "update")})


class Deadline(TrainerCallback):
    """Ends the training behind the first step that ends after `until`: a slow machine then tells of fewer steps."""

    def __init__(self, until: float) -> None:
        self.until = until

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop if it is time."""
        control.should_training_stop |= bool(self.until) and time.time() >= self.until


def now() -> float:
    """Return the time when the device has done all it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def peak_of_device() -> Iterator[dict[str, float]]:
    """Measure the most GPU memory in use by anybody during the block, every 20 ms: vLLM's own pools are in it."""
    found: dict[str, float] = {}
    if not torch.cuda.is_available():
        yield found
        return
    ended, most = threading.Event(), [0]

    def watch() -> None:
        while not ended.wait(0.02):
            free, total = torch.cuda.mem_get_info()
            most[0] = max(most[0], total - free)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()
        found["peak_device_gb"] = round(most[0] / 1e9, 3)
        found["peak_allocated_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)


def summary(steps: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return medians over the steps behind the warm-up, and the first step's seconds."""
    steady = list(steps[WARMUP:]) or list(steps)
    names = ("seconds", *PHASES)
    medians = {name: round(statistics.median(step.get(name, 0.0) for step in steady), 4) for name in names}
    return {"median": medians, "first_seconds": round(steps[0]["seconds"], 3), "measured_steps": len(steady)}


def save_model(job: Job, device: str) -> None:
    """Write the model in bf16 and its tokenizer into the job's folder, for arms that load from one."""
    from benchmarks.weights import save

    save(job.cell, device, Path(job.folder))
    tokenizer_of(shape_of(job.shape).vocabulary).save_pretrained(job.folder)
