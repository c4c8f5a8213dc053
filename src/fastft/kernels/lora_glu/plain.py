"""What the kernels do between the large matrix products, in plain torch: for CPUs, fp32, and ranks beyond the kernels'.

It goes through the rows a part at a time: what is made on the way (gate, up, the activation, 8 bits in fp32) would take
several times what comes in and goes out, which is all that the memory plan counts.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastft.kernels.glu import ref as glu_ref
from fastft.kernels.lora.gemm import accumulating_mms
from fastft.kernels.lora_glu.eight_bits import compress, expand, shapes

ROWS = 1024
"""Rows of a part."""


def forward(
    gate0: Tensor, up0: Tensor, xa: Tensor, b_gate: Tensor, b_up: Tensor, a_down: Tensor,
    scales: tuple[float, float], activation: str, eight_bits: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return (h, h A_down^T) in gate0's dtype, with eight_bits also q and scale; arguments as of `triton.forward`."""
    count, wide = gate0.shape
    h, kept = torch.empty(count, wide, dtype=gate0.dtype, device=gate0.device), ()
    if eight_bits:
        of_q, of_scale = shapes(count, wide)
        kept = h.new_empty(of_q, dtype=torch.uint8), h.new_empty(of_scale, dtype=torch.float32)
    for rows in _parts(count):
        gate, up = _gate_up(gate0[rows], up0[rows], xa[rows], b_gate, b_up, scales)
        h[rows] = glu_ref.glu(gate, up, activation)
        if eight_bits:
            kept[0][rows], kept[1][:, :, rows] = compress(gate, up)
    return h, F.linear(h, a_down.to(h.dtype)), *kept


def backward(
    dh: Tensor, gate0: Tensor, up0: Tensor, xa: Tensor, g: Tensor, b_gate: Tensor, b_up: Tensor, a_down: Tensor,
    scales: tuple[float, float], activation: str, own_dtypes: Sequence[torch.dtype],
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return what `triton.backward` does, from its arguments; dgate0 takes dh's memory."""
    (count, wide), rank, dtype = dh.shape, b_gate.shape[1], dh.dtype
    dup, dxa, a_down = torch.empty_like(dh), torch.empty_like(xa), a_down.to(dtype)
    wanted = own_dtypes if count <= ROWS else [torch.promote_types(own, torch.float32) for own in own_dtypes]
    sums: list[Tensor] = []
    for rows in _parts(count):
        if gate0.dtype == torch.uint8:
            gate, up = expand(gate0[rows], up0[:, :, rows], wide, dtype)
        else:
            gate, up = _gate_up(gate0[rows], up0[rows], xa[rows], b_gate, b_up, scales)
        dgate, dup[rows] = glu_ref.glu_backward(dh[rows].addmm_(g[rows], a_down), gate, up, activation)
        dh[rows] = dgate
        dxa[rows] = torch.cat([scales[0] * (dgate @ b_gate), scales[1] * (dup[rows] @ b_up)], 1)
        made = accumulating_mms(
            [dgate.t(), dup[rows].t(), g[rows].t()],
            [xa[rows, :rank], xa[rows, rank:], glu_ref.glu(gate, up, activation)],
            wanted,
            [*scales, 1.0],
        )
        sums = [one.add_(other) for one, other in zip(sums, made)] if sums else made
    return dh, dup, dxa, *(one.to(own) for one, own in zip(sums, own_dtypes))


def _gate_up(
    gate0: Tensor, up0: Tensor, xa: Tensor, b_gate: Tensor, b_up: Tensor, scales: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    rank = b_gate.shape[1]
    gate = torch.addmm(gate0, xa[:, :rank], b_gate.t(), alpha=scales[0])
    return gate, torch.addmm(up0, xa[:, rank:], b_up.t(), alpha=scales[1])


def _parts(count: int) -> Iterator[slice]:
    """Yield the rows of each part; one of no rows where there are none."""
    for start in range(0, max(1, count), ROWS):
        yield slice(start, min(count, start + ROWS))
