"""How levels and scales of a few bits lie in bytes. All take and return uint8 with the blocks as last dimension."""

import torch
from torch import Tensor


def pack_nibbles(levels: Tensor) -> Tensor:
    """Pack 4-bit levels [8, 32, blocks] two to a byte, one from a group and one from the next; [128, blocks]."""
    pairs = levels.view(4, 2, 32, -1)
    return (pairs[:, 0] | pairs[:, 1] << 4).view(128, -1)


def unpack_nibbles(data: Tensor) -> Tensor:
    """Undo `pack_nibbles`."""
    data = data.reshape(4, 32, -1)
    return torch.stack((data & 15, data >> 4), 1).view(8, 32, -1)


def pack_halves(levels: Tensor) -> Tensor:
    """Pack 4-bit levels [32, blocks]: element i and i + 16 make byte i; [16, blocks]."""
    return levels[:16] | levels[16:] << 4


def unpack_halves(data: Tensor) -> Tensor:
    """Undo `pack_halves`."""
    return torch.cat((data & 15, data >> 4))


def pack_pairs(levels: Tensor) -> Tensor:
    """Pack 2-bit levels (256 of them by blocks) four to a byte, from four groups of 32 that follow; [64, blocks]."""
    fours = levels.reshape(2, 4, 32, -1)
    return (fours[:, 0] | fours[:, 1] << 2 | fours[:, 2] << 4 | fours[:, 3] << 6).view(64, -1)


def unpack_pairs(data: Tensor) -> Tensor:
    """Undo `pack_pairs`: [256, blocks]."""
    data = data.reshape(2, 32, -1)
    return torch.stack([data >> shift & 3 for shift in (0, 2, 4, 6)], 1).view(256, -1)


def pack_bits(bits: Tensor) -> Tensor:
    """Pack bits [8, n, blocks], bit g of byte i being that of group g; [n, blocks]."""
    packed = bits[0].clone()
    for group in range(1, 8):
        packed |= bits[group] << group
    return packed


def unpack_bits(data: Tensor) -> Tensor:
    """Undo `pack_bits`."""
    return torch.stack([data >> group & 1 for group in range(8)])


def pack_six(scale: Tensor, offset: Tensor) -> Tensor:
    """Pack the 6-bit scales and offsets [8, blocks] of q4_k and q5_k; [12, blocks]."""
    first = scale[:4] | (scale[4:] >> 4) << 6
    second = offset[:4] | (offset[4:] >> 4) << 6
    return torch.cat((first, second, scale[4:] & 15 | (offset[4:] & 15) << 4))


def unpack_six(data: Tensor) -> tuple[Tensor, Tensor]:
    """Undo `pack_six`."""
    first, second, third = data.view(3, 4, -1)
    scale = torch.cat((first & 63, third & 15 | (first >> 6) << 4))
    return scale, torch.cat((second & 63, third >> 4 | (second >> 6) << 4))


def pack_signed_six(scale: Tensor) -> Tensor:
    """Pack the 6-bit scales [16, blocks] of q3_k; [12, blocks]."""
    high = (scale >> 4).view(4, 4, -1)
    return torch.cat((scale[:8] & 15 | (scale[8:] & 15) << 4, high[0] | high[1] << 2 | high[2] << 4 | high[3] << 6))


def unpack_signed_six(data: Tensor) -> Tensor:
    """Undo `pack_signed_six`."""
    low = torch.cat((data[:8] & 15, data[:8] >> 4))
    high = torch.cat([data[8:] >> shift & 3 for shift in (0, 2, 4, 6)])
    return low | high << 4
