"""How many bytes of logits are held at once, and launch settings of the kernels."""

from attrs import frozen

# Half of what the loss head takes: beside the logits stand the slopes [n, D] in fp32 that the backward pass scales.
GPU_LOGITS_BYTES = 256 << 20


@frozen
class LogprobLaunch:
    """How the kernels are launched: logits a step of their loop, and warps of the program that has a row."""

    block: int
    num_warps: int


def heuristic(vocab: int) -> LogprobLaunch:
    """Return settings for rows of `vocab` logits: 16 values a thread, so that nothing spills."""
    block = min(4096, 1 << max(vocab - 1, 1).bit_length())
    return LogprobLaunch(block=block, num_warps=max(1, min(8, block // 512)))
