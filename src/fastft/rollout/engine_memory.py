"""What an engine that shares a GPU with training may take of it: plain numbers in and out. Needs no torch."""

from math import ceil

from attrs import frozen

from fastft.errors import EngineError
from fastft.memory.shape import Shape

BLOCK = 16  # tokens: the engine hands out its cache in such blocks
RESERVE = 1 << 30  # for what neither side counts: CUDA contexts, allocators' rounding
WORKSPACE = 3 << 30  # activations of a step of prompts, its logits, and CUDA graphs


@frozen
class EngineMemory:
    """Bytes of an engine: weights, LoRA's slots, key-value cache, and the rest; `tokens` fit into the cache."""

    weights: int
    lora: int
    cache: int
    workspace: int
    tokens: int

    @property
    def total(self) -> int:
        """Return the sum."""
        return self.weights + self.lora + self.cache + self.workspace

    def share(self, device: int) -> float:
        """Return the part of a device of so many bytes, which engines call their memory utilization."""
        return self.total / device


def cache_bytes_per_token(shape: Shape, element: int) -> int:
    """Return the bytes of keys and values of one token in all layers; `element` is the size of a number."""
    return 2 * shape.layers * shape.key * element


def engine_memory(
    shape: Shape,
    *,
    element: int,
    rank: int,
    sequences: int,
    length: int,
    device: int,
    training: int,
    workspace: int = WORKSPACE,
    reserve: int = RESERVE,
) -> EngineMemory:
    """Return what an engine takes of a device of `device` bytes, of which training holds `training` meanwhile.

    The cache is as large as `sequences` rows of `length` tokens want, or as what is left allows. LoRA has one slot of
    `rank` on every linear layer (0: none). Weights are in numbers of `element` bytes. Raises `EngineError` with the
    numbers where not even one row fits.
    """
    norms = shape.hidden * (4 * shape.layers + 1)
    weights = (shape.layers * shape.layer_weights + shape.embedding_weights + norms) * element
    lora = shape.lora_parameters(rank) * element
    each = cache_bytes_per_token(shape, element)
    row = ceil(length / BLOCK) * BLOCK
    room = device - training - weights - lora - workspace - reserve
    if room < row * each:
        raise EngineError(
            f"engine 'vllm': no room beside training. The device has {_gb(device)}; training holds {_gb(training)} "
            f"while the engine runs, the engine's weights take {_gb(weights)}, LoRA {_gb(lora)}, its workspace "
            f"{_gb(workspace)}, and one row of {length} tokens {_gb(row * each)} of cache. Shorten max_length, let the "
            "engine sleep while training runs, run vLLM as a server on another GPU (engine='http://...'), or take "
            "engine='transformers'"
        )
    tokens = min(sequences * row, room // each // BLOCK * BLOCK)
    return EngineMemory(weights, lora, tokens * each, workspace, tokens)


def held_by_training(weights: int, adapter: int, gradients: int, optimizer: int, peak: int, sleeps: bool) -> int:
    """Return the bytes that training holds while the engine runs.

    An engine that `sleeps` through the training steps runs beside what always stays; one that does not, beside the
    peak of a step.
    """
    stays = weights + adapter + gradients + optimizer
    return stays if sleeps else max(stays, peak)


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
