"""Launch settings of the NF4 kernel."""

from attrs import field, frozen, validators


@frozen
class Nf4Launch:
    """How `nf4_dequantize_kernel` is launched.

    blocks: blocks of 64 weights a program, a power of two up to 256. gather: levels come from a table in shared
    memory (one load a weight) rather than from 15 selects a weight, which by their count (not measured) would take
    longer than the memory traffic on an H200.
    """

    blocks: int = field(default=64, validator=validators.in_((1, 2, 4, 8, 16, 32, 64, 128, 256)))
    num_warps: int = field(default=4, validator=validators.in_((2, 4, 8, 16)))  # one warp would shuffle, not gather
    gather: bool = True


def heuristic(numel: int) -> Nf4Launch:
    """Return the settings for a weight of `numel` elements: smaller programs where few would fill the GPU."""
    return Nf4Launch(blocks=64 if numel >= 1 << 22 else 16, num_warps=4)
