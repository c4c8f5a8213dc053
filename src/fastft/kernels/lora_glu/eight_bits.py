"""Gate and up kept in 8 bits: whole numbers of -127 to 127, and one scale for each 64 of a row.

The two lie in turn, a number of gate and then one of up, so that a tile of both is read in runs of 128 bytes, 16 a
thread. The scales of one block of all rows lie together: a tile's are written in whole sectors of memory.
"""

import torch
from torch import Tensor

BLOCK = 64
MOST = 127.0
ZERO = 128
"""What stands for 0: numbers are kept as q + ZERO in uint8."""
LEAST = 1e-30
"""A block whose largest magnitude is no larger is kept as zeros."""


def shapes(rows: int, wide: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of q and scale for `rows` rows of `wide` numbers each of gate and of up."""
    blocks = -(-wide // BLOCK)
    return (rows, blocks, BLOCK, 2), (blocks, 2, rows)


def compress(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return (q [M, ceil(N / 64), 64, 2] uint8, scale [ceil(N / 64), 2, M] fp32) of gate and up, [M, N] each, finite.

    A number is about (q - 128) times its block's scale, a 127th of the block's largest magnitude: none is off by more
    than a 254th of that. The last block is filled up with zeros.
    """
    padded = [torch.nn.functional.pad(x.float(), (0, -x.shape[1] % BLOCK)) for x in (gate, up)]
    blocks = torch.stack([x.view(x.shape[0], x.shape[1] // BLOCK, BLOCK) for x in padded], -1)
    largest = blocks.abs().amax(2)
    inverse = torch.where(largest > LEAST, MOST / largest, 0.0)
    q = torch.round(blocks * inverse.unsqueeze(2)) + ZERO
    return q.to(torch.uint8), (largest * (1 / MOST)).permute(1, 2, 0).contiguous()


def expand(q: Tensor, scale: Tensor, wide: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (gate, up), [M, wide] in `dtype`, of q and scale as `compress` gives them."""
    blocks = (q.float() - ZERO) * scale.permute(2, 0, 1).unsqueeze(2)
    gate, up = (part.flatten(1)[:, :wide].to(dtype) for part in blocks.unbind(-1))
    return gate.contiguous(), up.contiguous()
