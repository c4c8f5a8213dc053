"""Names that reinforcement-learning scripts written for Unsloth import beside the trainer."""

from typing import Any


def PatchFastRL(algorithm: Any = None, FastLanguageModel: Any = None) -> None:  # noqa: N802  the name that scripts import
    """Say that there is nothing to do: `fastft.GRPOTrainer` is a trainer of its own, and nothing is patched."""
    name = f"{algorithm}Trainer" if isinstance(algorithm, str) else "GRPOTrainer"
    print(f"fastft: PatchFastRL does nothing and is not needed; import the trainer: from fastft import {name}.")


def vLLMSamplingParams(**kwargs: Any) -> dict[str, Any]:  # noqa: N802  the name that scripts import
    """Return the keyword arguments, which `GRPOConfig(vllm_sampling_params=...)` moves to its own fields."""
    return kwargs
