"""The number formats of GGUF tensors, and how many bytes a block of each takes."""

from attrs import frozen

from fastft.errors import Problem, UsageError, did_you_mean


@frozen
class GgufType:
    """One format: `block_size` weights, neighbours in a row, are stored together in `type_size` bytes."""

    name: str
    ggml_id: int  # the number by which a GGUF file names it (enum ggml_type)
    block_size: int
    type_size: int

    def row_bytes(self, n: int) -> int:
        """Return the bytes of a row of `n` weights; `n` must be a multiple of `block_size`."""
        return n // self.block_size * self.type_size

    @property
    def bits(self) -> float:
        """Bits a weight."""
        return 8 * self.type_size / self.block_size


# Sizes: the sums of each block's fields, scales in fp16.
_TABLE = (
    GgufType("f32", 0, 1, 4),
    GgufType("f16", 1, 1, 2),
    GgufType("q4_0", 2, 32, 2 + 16),
    GgufType("q4_1", 3, 32, 2 + 2 + 16),
    GgufType("q5_0", 6, 32, 2 + 4 + 16),
    GgufType("q5_1", 7, 32, 2 + 2 + 4 + 16),
    GgufType("q8_0", 8, 32, 2 + 32),
    GgufType("q2_k", 10, 256, 16 + 64 + 2 + 2),
    GgufType("q3_k", 11, 256, 32 + 64 + 12 + 2),
    GgufType("q4_k", 12, 256, 2 + 2 + 12 + 128),
    GgufType("q5_k", 13, 256, 2 + 2 + 12 + 32 + 128),
    GgufType("q6_k", 14, 256, 128 + 64 + 16 + 2),
    GgufType("iq4_nl", 20, 32, 2 + 16),
    GgufType("iq4_xs", 23, 256, 2 + 2 + 4 + 128),
    GgufType("bf16", 30, 1, 2),
    GgufType("tq1_0", 34, 256, 48 + 4 + 2),
    GgufType("tq2_0", 35, 256, 64 + 2),
    GgufType("mxfp4", 39, 32, 1 + 16),
)
TYPES: dict[str, GgufType] = {entry.name: entry for entry in _TABLE}
BY_ID: dict[int, GgufType] = {entry.ggml_id: entry for entry in _TABLE}


def gguf_type(name: "str | GgufType") -> GgufType:
    """Return the record of a format's name (in any case); `UsageError` if fastft does not write it."""
    if isinstance(name, GgufType):
        return name
    found = TYPES.get(str(name).lower())
    if found is None:
        raise UsageError(Problem("type", name, f"one of {', '.join(TYPES)}", did_you_mean(str(name).lower(), TYPES)))
    return found
