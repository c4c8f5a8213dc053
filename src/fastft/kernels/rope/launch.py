"""Launch settings of the rotary kernel: data, chosen by a function of the sizes."""

from attrs import frozen

from fastft.kernels.rows import ceil_div, next_power_of_2

# The widest head that one program holds in registers; wider ones run on the reference.
MAX_HEAD = 4096

# A fused multiply-add would skip the rounding of one product, which separate torch calls do; memory is the limit.
FP_FUSION = False


@frozen
class Launch:
    """`q_programs` + `k_programs` programs of `rows` heads (of some token) each, with `warps` warps."""

    rows: int
    pairs_block: int
    pass_block: int
    warps: int
    q_programs: int
    k_programs: int


def launch(q_count: int, k_count: int, pairs: int, passed: int) -> Launch:
    """Settings for `q_count` and `k_count` rows of `pairs` rotated pairs and `passed` features that are only copied.

    A tile has about 1,024 pairs: 8 per thread of 4 warps, one 16-byte load of each half of a 16-bit dtype.
    """
    pairs_block, pass_block = next_power_of_2(max(pairs, 1)), next_power_of_2(max(passed, 1))
    rows = max(1, 1024 // max(pairs_block, pass_block))
    warps = max(1, min(rows * pairs_block // 256, 8))
    return Launch(rows, pairs_block, pass_block, warps, ceil_div(q_count, rows), ceil_div(k_count, rows))
