"""The searches for the scale of a group of weights, batched over groups.

A group is a column of x [..., elements, blocks]. Each search starts from the scale that spreads the group over the
levels, tries some others, solves each time for the scale (and offset) of least weighted squared error given the rounded
levels, and keeps the best. Levels are not carried along: the rounding that led to the best one is, and gives them back.
"""

import struct
from collections.abc import Callable
from itertools import pairwise

import torch
from attrs import field, frozen
from torch import Tensor

from fastft.export.gguf.quants.arithmetic import TINY, divide, largest, nearest_int, ordered_sum

Step = Callable[..., tuple[Tensor, ...]]


def fp32(value: float) -> float:
    """Round a Python number to fp32."""
    return struct.unpack("f", struct.pack("f", value))[0]


@frozen
class Steps:
    """The inner steps of the searches: plain functions, or their compiled forms; `chunk` weights are taken at once."""

    affine: Step
    symmetric: Step
    descend: Step
    table: Step
    chunk: int
    fixed: bool = field(default=False, kw_only=True)  # the steps want every chunk to have the same shape


@frozen
class Grid:
    """Which scales are tried: those that spread a group over levels + low + delta * i, for i = 0 .. steps."""

    levels: int  # the largest level
    low: float
    delta: float
    steps: int
    absolute: bool = False  # the error is weighted by |difference|, not by its square

    def numerators(self) -> list[float]:
        """Return levels + low + delta * i in fp32 arithmetic, `levels` itself first."""
        tried = (fp32(fp32(fp32(self.low) + fp32(fp32(self.delta) * i)) + self.levels) for i in range(self.steps + 1))
        return [float(self.levels), *tried]


@frozen
class Affine:
    """x is about scale * level - minus; the levels are those of `inverse` * (x - base), where the group is not flat."""

    scale: Tensor  # [..., blocks]
    minus: Tensor
    inverse: Tensor
    base: Tensor
    flat: Tensor

    def levels(self, x: Tensor, most: int) -> Tensor:
        """Return the levels of x [..., elements, blocks], 0 .. most, as int32."""
        levels = nearest_int((x - self.base.unsqueeze(-2)).mul_(self.inverse.unsqueeze(-2))).clamp_(0, most)
        return levels.masked_fill_(self.flat.unsqueeze(-2), 0)


def affine_step(
    x: Tensor,
    weight: Tensor,
    sum_w: Tensor,
    sum_x: Tensor,
    ends: tuple[Tensor, Tensor],
    state: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    numerator: Tensor,
    most: Tensor,
    first: Tensor,
    absolute: bool,
    fused: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Try one scale; `state` is the best so far, and the new one is returned.

    `ends` are each group's smallest and largest value. The state is (error, scale, offset, and the inverse scale and
    offset that led to the levels); the best offset so far is what the next levels are counted from. `first` (a bool
    scalar) takes the scale as it is, and the offset that the state holds.
    """
    best, best_scale, low, best_inverse, best_base = state
    inverse = numerator / (ends[1] - low)
    level = _affine_levels(x, inverse, low, ends, most, fused)
    weighted = weight * level
    sum_l = ordered_sum(weighted, fused)
    sum_l2 = ordered_sum(weighted * level, fused)
    sum_xl = ordered_sum(weighted * x, fused)
    determinant = sum_w * sum_l2 - sum_l * sum_l
    scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
    offset = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
    above_zero = offset > 0
    scale = torch.where(above_zero, sum_xl / sum_l2, scale)
    offset = torch.where(above_zero, 0.0, offset)
    scale = torch.where(first, 1.0 / inverse, scale)
    offset = torch.where(first, low, offset)
    difference = scale.unsqueeze(-2) * level + offset.unsqueeze(-2) - x
    difference = difference.abs() if absolute else difference * difference
    error = ordered_sum(weight * difference, fused)
    better = first | ((determinant > 0) & (error < best))
    new, old = (error, scale, offset, inverse, low), (best, best_scale, low, best_inverse, best_base)
    return tuple(torch.where(better, one, other) for one, other in zip(new, old, strict=True))


def _affine_levels(
    x: Tensor, inverse: Tensor, low: Tensor, ends: tuple[Tensor, Tensor], most: Tensor, fused: bool
) -> Tensor:
    """Return the rounded inverse * (x - low) [..., elements, blocks], 0 .. most, as fp32."""
    value = (x - low.unsqueeze(-2)) * inverse.unsqueeze(-2)
    if not fused:
        reach = torch.maximum((ends[0] - low).abs(), (ends[1] - low).abs()).mul_(inverse.abs())
        if bool((reach < 4e6).all()):  # plain rounding is what `nearest_int` does then
            return value.round_().clamp_(0.0, float(most))
    return nearest_int(value).float().clamp(min=0.0).minimum(most)


def affine_search(x: Tensor, weight: Tensor, grid: Grid, steps: Steps, least: Tensor | None = None) -> Affine:
    """Find scale and offset (never above zero) for every group of x [..., elements, blocks] with error weights.

    least: the groups' smallest values, where the sign of a zero among them matters.
    """
    ends = x.amin(-2) if least is None else least, x.amax(-2)
    low = torch.where(ends[0] > 0, 0.0, ends[0])
    sum_w, sum_x = ordered_sum(weight), ordered_sum(weight * x)
    zero = torch.zeros_like(low)
    state = (zero, zero, low, zero, zero)
    scalar = x.new_tensor
    most = scalar(float(grid.levels))
    for index, numerator in enumerate(grid.numerators()):
        first = torch.tensor(index == 0, device=x.device)
        state = steps.affine(x, weight, sum_w, sum_x, ends, state, scalar(numerator), most, first, grid.absolute)
    _, scale, offset, inverse, base = state
    flat = ends[1] == low
    return Affine(scale.masked_fill(flat, 0.0), -torch.where(flat, low, offset), inverse, base, flat)


@frozen
class Symmetric:
    """x is about scale * level; the levels are those of `inverse` * x, where the group is not all but zero."""

    scale: Tensor  # [..., blocks]
    inverse: Tensor
    empty: Tensor

    def levels(self, x: Tensor, most: int) -> Tensor:
        """Return the levels plus `most` (0 .. 2 * most - 1) as int32; 0 where the group is all but zero."""
        levels = nearest_int(self.inverse.unsqueeze(-2) * x).clamp_(-most, most - 1).add_(most)
        return levels.masked_fill_(self.empty.unsqueeze(-2), 0)


def symmetric_step(
    x: Tensor,
    weight: Tensor,
    peak: Tensor,
    state: tuple[Tensor, Tensor, Tensor],
    numerator: Tensor,
    least: Tensor,
    most: Tensor,
    first: Tensor,
    fused: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Try one scale; `state` is the best (gain, scale, inverse scale) so far, and the new one is returned."""
    best, best_scale, best_inverse = state
    inverse = numerator / peak
    value = inverse.unsqueeze(-2) * x
    if not fused:  # scales that overflowed are searched here too, weights are finite
        value = value.nan_to_num_(nan=0.0)
    level = value.round().maximum(least).minimum(most)
    sum_xl = ordered_sum(weight * x * level, fused)
    sum_l2 = ordered_sum(weight * level * level, fused)
    scale = torch.where(sum_l2 != 0, sum_xl / sum_l2, 0.0)
    better = first | ((sum_l2 > 0) & (sum_xl * sum_xl > best * sum_l2))
    return (
        torch.where(better, scale * sum_xl, best),
        torch.where(better, scale, best_scale),
        torch.where(better, inverse, best_inverse),
    )


def symmetric_search(x: Tensor, weight: Tensor, most: int, steps: Steps) -> Symmetric:
    """Find the scale for levels -most .. most - 1 of every group of x [..., elements, blocks] with error weights."""
    magnitude, peak = largest(x)
    empty = magnitude < TINY
    peak = torch.where(empty, 1.0, peak)
    zero = torch.zeros_like(peak)
    state = (zero, zero, zero)
    scalar = x.new_tensor
    for index in (0, *range(-9, 0), *range(1, 10)):
        numerator = -fp32(most + fp32(fp32(0.1) * index))
        first = torch.tensor(index == 0, device=x.device)
        state = steps.symmetric(
            x, weight, peak, state, scalar(numerator), scalar(float(-most)), scalar(most - 1.0), first
        )
    _, scale, inverse = state
    return Symmetric(scale.masked_fill(empty, 0.0), inverse, empty)


def descend_step(
    x: Tensor, weight: Tensor, level: Tensor, sum_xl: Tensor, sum_l2: Tensor, least: Tensor, most: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Move one element of every group to its best level given the others', where that lowers the error.

    x, weight, level [..., blocks] are the element's; returns its level and the two sums over the group.
    """
    weighted = weight * x
    rest_xl = sum_xl - weighted * level
    rest_l2 = sum_l2 - weight * level * level
    moved = nearest_int(x * rest_l2 / rest_xl).float().maximum(least).minimum(most)
    new_xl = rest_xl + weighted * moved
    new_l2 = rest_l2 + weight * moved * moved
    gain = new_xl * new_xl * sum_l2 > sum_xl * sum_xl * new_l2
    better = (rest_xl > 0) & (moved != level) & (new_l2 > 0) & gain
    return torch.where(better, moved, level), torch.where(better, new_xl, sum_xl), torch.where(better, new_l2, sum_l2)


def descent(x: Tensor, most: int, steps: Steps) -> tuple[Tensor, Tensor]:
    """Find levels -most .. most - 1 for groups of x [..., elements, blocks], weighted by x squared, by turns.

    Every element in turn moves to its best level, five times over. Returns the scale [..., blocks] and the levels plus
    `most` [..., elements, blocks] as fp32, both 0 where a group is all but zero.
    """
    magnitude, peak = largest(x)
    empty = magnitude < TINY
    inverse = divide(-most, torch.where(empty, 1.0, peak))
    weight = x * x
    level = (inverse.unsqueeze(-2) * x).round_().clamp_(-most, most - 1)
    sum_xl = ordered_sum(weight * x * level)
    sum_l2 = ordered_sum(weight * level * level)
    least, most_ = x.new_tensor(float(-most)), x.new_tensor(most - 1.0)
    columns = [tensor.movedim(-2, 0).contiguous() for tensor in (x, weight, level)]
    for _ in range(5):
        for element in range(x.shape[-2]):
            here = [column[element] for column in columns]
            columns[2][element], sum_xl, sum_l2 = steps.descend(*here, sum_xl, sum_l2, least, most_)
    level = columns[2].movedim(0, -2) + most
    scale = torch.where(sum_l2 > 0, sum_xl / sum_l2, 0.0)
    return scale.masked_fill(empty, 0.0), level.masked_fill(empty.unsqueeze(-2), 0.0)


def positive_search(x: Tensor, weight: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Find the scale for levels 0 .. most of groups of scales x [elements, blocks] with error weights.

    Returns the scale [blocks] and the levels as int32 [elements, blocks]: bytes, to which a negative one wraps around.
    """
    peak = x.amax(0).clamp_(min=0.0)
    empty = peak < TINY
    peak = torch.where(empty, 1.0, peak)
    inverse = divide(most, peak)
    level = nearest_int(inverse * x).bitwise_and_(0xFF).float()
    best = _squared_error(x, weight, 1.0 / inverse, level)
    for index in (-4, -3, -2, -1, 1, 2, 3, 4):
        tried = divide(fp32(fp32(fp32(0.1) * index) + most), peak)
        level = nearest_int(tried * x).float().clamp_(max=most)
        error = _squared_error(x, weight, 1.0 / tried, level)
        better = error < best
        best, inverse = torch.where(better, error, best), torch.where(better, tried, inverse)
    level = nearest_int(inverse * x).float().clamp_(max=most)
    sum_xl = ordered_sum(weight * x * level)
    sum_l2 = ordered_sum(weight * level * level)
    level = level.int().bitwise_and_(0xFF).float()
    for _ in range(5):
        for element in range(x.shape[0]):
            level[element], sum_xl, sum_l2 = _ascend(x[element], weight[element], level[element], sum_xl, sum_l2, most)
    scale = torch.where(sum_l2 > 0, sum_xl / sum_l2, 0.0)
    return scale.masked_fill(empty, 0.0), level.masked_fill(empty, 0.0).int()


def _squared_error(x: Tensor, weight: Tensor, scale: Tensor, level: Tensor) -> Tensor:
    difference = x - scale * level
    return ordered_sum(weight * difference * difference)


def _ascend(
    x: Tensor, weight: Tensor, level: Tensor, sum_xl: Tensor, sum_l2: Tensor, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Do for one element of `positive_search` what `descend_step` does: the level has no lower bound here."""
    weighted = weight * x
    rest_xl = sum_xl - weighted * level
    rest_l2 = sum_l2 - weight * level * level
    moved = nearest_int(x * rest_l2 / rest_xl).float().clamp_(max=most)
    new_xl = rest_xl + weighted * moved
    new_l2 = rest_l2 + weight * moved * moved
    better = (rest_xl > 0) & (rest_l2 > 0) & (moved != level)
    better &= new_xl * new_xl * sum_l2 > sum_xl * sum_xl * new_l2
    byte = moved.int().bitwise_and_(0xFF).float()
    return torch.where(better, byte, level), torch.where(better, new_xl, sum_xl), torch.where(better, new_l2, sum_l2)


def table_index(value: Tensor, table: tuple[int, ...]) -> Tensor:
    """Return the index (uint8) of the nearest entry of an ascending table; the upper one in the middle of two.

    The middles are multiples of one half, and comparing with them gives what comparing the two distances would. NaN has
    the last index.
    """
    above = torch.zeros(value.shape, dtype=torch.uint8, device=value.device)
    for lower, upper in pairwise(table):
        above += value < (lower + upper) / 2
    return len(table) - 1 - above


def table_step(
    x: Tensor,
    weight: Tensor,
    inverse: Tensor,
    state: tuple[Tensor, Tensor],
    first: Tensor,
    table: tuple[int, ...],
    fused: bool = False,
) -> tuple[Tensor, Tensor]:
    """Try one scale for levels that are a table's values; `state` is the best (gain, scale) so far."""
    best, best_scale = state
    value = inverse.unsqueeze(-2) * x
    level = torch.full_like(value, float(table[0]))
    for place in range(1, len(table)):
        middle, rise = (table[place - 1] + table[place]) / 2, float(table[place] - table[place - 1])
        level = level + torch.where(value < middle, 0.0, rise)
    weighted = weight * level
    sum_xl = ordered_sum(weighted * x, fused)
    sum_l2 = ordered_sum(weighted * level, fused)
    scale = torch.where(sum_l2 > 0, sum_xl / sum_l2, 0.0)
    better = first | ((sum_l2 > 0) & (sum_xl * sum_xl > best * sum_l2))
    return torch.where(better, scale * sum_xl, best), torch.where(better, scale, best_scale)


def table_search(x: Tensor, weight: Tensor, table: tuple[int, ...], tries: int, steps: Steps) -> Tensor:
    """Return the scale [..., blocks] for levels that are a table's values; 0 where a group is all but zero."""
    magnitude, peak = largest(x)
    empty = magnitude < TINY
    peak = torch.where(empty, 1.0, peak)
    zero = torch.zeros_like(peak)
    inverses = [1.0 / divide(-peak, table[0]), *(divide(i + table[0], peak) for i in range(-tries, tries + 1))]
    state = (zero, zero)
    for index, inverse in enumerate(inverses):
        first = torch.tensor(index == 0, device=x.device)
        state = steps.table(x, weight, inverse, state, first, table)
    return state[1].masked_fill(empty, 0.0)


PLAIN = Steps(affine_step, symmetric_step, descend_step, table_step, chunk=1 << 18)
