"""What every rollout engine is asked and answers. Needs no torch."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from attrs import frozen


@frozen
class Sampling:
    """How completions are sampled.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1.0 leave the distribution whole, as `min_p` 0.0 and
    `repetition_penalty` 1.0 do. Sampling ends at the first of `stop_ids`, which stands at the end of the completion,
    or after `max_new_tokens`. `seed` None draws from the engine's own generator.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_ids: tuple[int, ...] = ()
    seed: int | None = None


@frozen
class Completion:
    """One sampled completion: its token ids, stop token included, and the log-probability of each under the engine.

    The log-probabilities are those of the distribution that was sampled from, after temperature and truncation of
    the distribution; None where the engine does not say them.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None = None


class Engine(ABC):
    """Samples completions of prompts under the weights that were last handed over."""

    name: str

    @property
    def closed(self) -> bool:
        """Whether the engine can no longer be used; one that can always be used again is never closed."""
        return False

    @property
    def shares_memory(self) -> bool:
        """Whether it computes on the device that trains, and wants room in its memory while it is awake."""
        return True

    @abstractmethod
    def hand_over(self, model: Any) -> None:
        """Take the weights that `model` has now; until the next call they are what `generate` samples from."""

    @abstractmethod
    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, count: int = 1) -> list[list[Completion]]:
        """Return `count` completions of each prompt (token ids), in the order of the prompts.

        Raises `fastft.errors.EngineError` if the engine failed: what failed, the engine's own words, and the remedy.
        """

    @abstractmethod
    def sleep(self) -> None:
        """Give back the memory that is not wanted until `wake`; engines that hold none do nothing."""

    @abstractmethod
    def wake(self) -> None:
        """Undo `sleep`; `generate` may then be called again."""

    @abstractmethod
    def close(self) -> None:
        """Let go of everything that the engine holds."""
