"""How many rows of logits are held at once, and launch settings of the kernels."""

from attrs import frozen

GPU_LOGITS_BYTES = 512 << 20
CPU_LOGITS_BYTES = 16 << 20


@frozen
class CrossEntropyLaunch:
    """How `cross_entropy_kernel` is launched: logits a step of its loop, and warps of the program that has a row."""

    block: int
    num_warps: int


def chunk_rows(rows: int, vocab: int, itemsize: int, *, cuda: bool) -> int:
    """Return how many of `rows` rows of `vocab` logits of `itemsize` bytes to hold at once.

    On a GPU the logits of a chunk, which their gradient overwrites, stay within 512 MiB and the chunks are of about
    equal height, a multiple of 128 so that no GEMM tile is cut; on a CPU within 16 MiB, near its caches.
    """
    budget = GPU_LOGITS_BYTES if cuda else CPU_LOGITS_BYTES
    multiple = 128 if cuda else 16
    most = max(multiple, budget // (vocab * itemsize) // multiple * multiple)
    if rows <= most:
        return max(rows, 1)
    chunks = -(-rows // most)
    return min(most, -(-rows // chunks // multiple) * multiple)


def heuristic(vocab: int) -> CrossEntropyLaunch:
    """Return settings for rows of `vocab` logits: 32 values a thread at most, so that nothing spills."""
    block = min(8192, 1 << max(vocab - 1, 1).bit_length())
    return CrossEntropyLaunch(block=block, num_warps=max(1, min(8, block // 512)))


def scale_launch() -> tuple[int, int]:
    """Return (elements a program, warps) of `scale_kernel`."""
    return 4096, 8
