"""How far rounding alone moves a step: what a model computes again, every module's output rounded another way.

A loss near zero hangs on the differences of large logits: its relative error is their absolute error, which no fixed
share of the loss bounds. The same computation with other roundings says how large it is, in any dtype and for
quantised weights, without a second model.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

SAMPLES = 8  # how often it is computed
DEVIATIONS = 3.0  # how many root mean squares of the differences are allowed
# The share of numbers moved by one unit in the last place. A rounding's error has a variance of 1/12 of a unit,
# the difference of two ways to round twice that.
MOVED = 1 / 6


def budget(
    model: nn.Module, dtype: torch.dtype, exact: Sequence[float], compute: Callable[[], Sequence[float]]
) -> tuple[float, ...]:
    """Return how far from `exact` each of the numbers that `compute` returns may be by rounding in `dtype`.

    `compute` runs `model`; of every module's output some numbers, at random, are moved by a unit in the last place of
    `dtype`, as far on the whole as two ways to compute it differ.
    """
    squares = torch.zeros(len(exact), dtype=torch.float64)
    for seed in range(SAMPLES):
        with _rounded_otherwise(model, torch.finfo(dtype).eps, seed):
            found = compute()
        squares += (torch.tensor(found, dtype=torch.float64) - torch.tensor(exact, dtype=torch.float64)) ** 2
    return tuple((DEVIATIONS * (squares / SAMPLES).sqrt()).tolist())


@contextmanager
def _rounded_otherwise(model: nn.Module, eps: float, seed: int) -> Iterator[None]:
    generators: dict[torch.device, torch.Generator] = {}

    def moved(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, torch.Tensor) or not output.is_floating_point():
            return output
        if output.device not in generators:
            generators[output.device] = torch.Generator(output.device).manual_seed(seed)
        drawn = torch.rand(output.shape, generator=generators[output.device], device=output.device)
        units = (drawn < MOVED / 2).float() - (drawn > 1 - MOVED / 2).float()
        # of the mantissas 1 to 2, 0.75 eps is nearest to one unit in the last place
        return (output.float() * (1 + 0.75 * eps * units)).to(output.dtype)

    leaves = [module for module in model.modules() if next(module.children(), None) is None]
    handles = [leaf.register_forward_hook(moved) for leaf in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
