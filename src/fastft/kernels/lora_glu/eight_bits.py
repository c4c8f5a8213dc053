"""Gate and up kept in 8 bits: whole numbers of -127 to 127, and one scale for each 64 of a row.

The two lie in turn, 64 of gate and then 64 of up, so that a tile of both is read in runs of 128 bytes. The scales of
one block of all rows lie together: a tile's are written in whole sectors of memory.
"""

import torch
from torch import Tensor

BLOCK = 64
MOST = 127.0
ZERO = 128
"""What stands for 0: numbers are kept as q + ZERO in uint8."""
LEAST = 1e-30
"""A block whose largest magnitude is no larger is kept as zeros."""
ROWS = 1024
"""Rows that are brought to 8 bits, or back, together: in fp32 they take many times what they take before or after."""


def shapes(rows: int, wide: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of q and scale for `rows` rows of `wide` numbers each of gate and of up."""
    blocks = -(-wide // BLOCK)
    return (rows, blocks, 2, BLOCK), (blocks, 2, rows)


def compress(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return (q [M, ceil(N / 64), 2, 64] uint8, scale [ceil(N / 64), 2, M] fp32) of gate and up, [M, N] each, finite.

    A number is about (q - 128) times its block's scale, a 127th of the block's largest magnitude: none is off by more
    than a 254th of that. The last block is filled up with zeros.
    """
    of_q, of_scale = shapes(*gate.shape)
    q, scale = gate.new_empty(of_q, dtype=torch.uint8), gate.new_empty(of_scale, dtype=torch.float32)
    for start in range(0, gate.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        padded = [torch.nn.functional.pad(x[rows].float(), (0, -x.shape[1] % BLOCK)) for x in (gate, up)]
        blocks = torch.stack([x.view(x.shape[0], x.shape[1] // BLOCK, BLOCK) for x in padded], 2)
        largest = blocks.abs().amax(-1)
        inverse = torch.where(largest > LEAST, MOST / largest, 0.0)
        q[rows] = (torch.round(blocks * inverse.unsqueeze(-1)) + ZERO).to(torch.uint8)
        scale[:, :, rows] = (largest * (1 / MOST)).permute(1, 2, 0)
    return q, scale


def expand(q: Tensor, scale: Tensor, wide: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (gate, up), [M, wide] in `dtype`, of q and scale as `compress` gives them."""
    gate, up = (scale.new_empty(q.shape[0], wide, dtype=dtype) for _ in range(2))
    for start in range(0, q.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        blocks = (q[rows].float() - ZERO) * scale[:, :, rows].permute(2, 0, 1).unsqueeze(-1)
        gate[rows], up[rows] = (part.flatten(1)[:, :wide] for part in blocks.unbind(2))
    return gate, up
