"""How many bytes of logits are held at once, and launch settings of the kernels."""

from attrs import frozen

GPU_LOGITS_BYTES = 512 << 20


@frozen
class CrossEntropyLaunch:
    """How `cross_entropy_kernel` is launched: logits a step of its loop, and warps of the program that has a row."""

    block: int
    num_warps: int


def heuristic(vocab: int) -> CrossEntropyLaunch:
    """Return settings for rows of `vocab` logits: 32 values a thread at most, so that nothing spills."""
    block = min(8192, 1 << max(vocab - 1, 1).bit_length())
    return CrossEntropyLaunch(block=block, num_warps=max(1, min(8, block // 512)))


def scale_launch() -> tuple[int, int]:
    """Return (elements a program, warps) of `scale_kernel`."""
    return 4096, 8
