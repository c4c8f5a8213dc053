"""What each layer of one compiled model keeps: named by the plan, or solved for the largest batch seen."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from attrs import define, evolve
from torch import nn

from fastft.errors import UsageError
from fastft.memory.devices import Device, find_device
from fastft.memory.estimate import Estimate, Mode, Setup, estimate
from fastft.memory.measure import host_memory, setup_of_model
from fastft.memory.offload import Offloader
from fastft.memory.plan import HOST_SHARE, budget_of, named_modes, solve, usable
from fastft.registry.spec import ModelSpec

GB = 10**9


@define(eq=False)
class PlannedLayers:
    """The modes of a model's layers, first to last, and the largest batch they were chosen for.

    `setup` is None where the config does not tell the sizes; a budget is then refused. `fits` is False where even the
    smallest plan is predicted to need more than the budget.
    """

    plan: str | int
    modes: tuple[Mode, ...]
    setup: Setup | None
    budget: int | None = None
    device: Device | None = None
    offloader: Offloader | None = None
    largest: tuple[int, int] = (0, 0)
    fits: bool = True

    @classmethod
    def of(
        cls,
        model: nn.Module,
        spec: ModelSpec,
        plan: str | int,
        layers: Sequence[nn.Module],
        batch: tuple[int, int] | None,
    ) -> "PlannedLayers":
        """Return the plan of a model whose decoder layers are `layers`, solved at once if `batch` is known.

        Raises UsageError for a budget on a model whose config does not tell its sizes.
        """
        budget = budget_of(plan)
        try:
            setup = setup_of_model(model, spec)
        except UsageError:
            if budget is not None:
                raise
            setup = None
        where = next(layers[0].parameters()).device
        name = torch.cuda.get_device_name(where) if where.type == "cuda" else ""
        made = cls(plan, named_modes(plan if budget is None else "keep", len(layers)), setup, budget, find_device(name))
        if setup is not None and len(layers) != setup.shape.layers:
            made.setup = evolve(setup, shape=evolve(setup.shape, layers=len(layers)))
        if batch is not None:
            made.see(*batch, where)
        return made

    def see(self, rows: int, length: int, where: torch.device) -> None:
        """Take note of a batch; one with more tokens than any before solves the budget anew."""
        if rows * length <= self.largest[0] * self.largest[1]:
            return
        self.largest = (rows, length)
        if self.setup is None:
            return
        element = self.setup.element
        if torch.is_autocast_enabled(where.type):
            element = min(element, torch.get_autocast_dtype(where.type).itemsize)
        self.setup = evolve(self.setup, rows=rows, length=length, element=element)
        budget = self.budget if self.budget is not None else self._free(where)
        if budget is not None:
            made = solve(self.setup, budget, self.device, int(host_memory() * HOST_SHARE))
            self.modes, self.fits = made.modes, made.fits
            if not made.fits:
                needed = f"{made.estimate.peak / GB:.2f} GB where the plan allows {budget / GB:.2f} GB"
                warnings.warn(
                    f"memory plan {self.plan!r}: a step of {rows} x {length} tokens is predicted to take at least "
                    f"{needed}; `fastft plan` lists what would help",
                    stacklevel=2,
                )

    def _free(self, where: torch.device) -> int | None:
        """Return what "auto" may take: what the GPU has free and what this process holds, but for the reserve."""
        if self.plan != "auto" or where.type != "cuda":
            return None
        free, memory = torch.cuda.mem_get_info(where)
        others = memory - free - torch.cuda.memory_reserved(where)
        return max(0, usable(memory) - max(0, others - _own_context(memory)))

    def predicted(self) -> Estimate | None:
        """Return what the largest batch seen is predicted to take, None before the first or where sizes are unknown."""
        if self.setup is None or self.largest == (0, 0):
            return None
        return estimate(self.setup, self.modes, self.device)

    @contextmanager
    def call(self, index: int, layer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Mode]:
        """Give the mode of layer `index` for one call of it, within which what it saves is moved where it is to be."""
        hidden = args[0] if args else kwargs.get("hidden_states")
        if index == 0 and isinstance(hidden, torch.Tensor) and hidden.dim() == 3:
            self.see(hidden.shape[0], hidden.shape[1], hidden.device)
        mode = self.modes[index]
        if not mode.offload or not isinstance(hidden, torch.Tensor):
            yield mode
            return
        if self.offloader is None or self.offloader.device != hidden.device:
            self.offloader = Offloader(hidden.device)
        shared = (*args[1:], *(value for name, value in kwargs.items() if name != "hidden_states"))

        def stays() -> list[torch.Tensor]:
            given = [leaf for leaf in torch.utils._pytree.tree_leaves(shared) if isinstance(leaf, torch.Tensor)]
            return [*given, *layer.parameters(), *layer.buffers()]

        with self.offloader.layer(stays):
            yield mode


def _own_context(memory: int) -> int:
    """Return what the driver's context of this very process takes, which counts as used: within the reserve."""
    return min(1 << 30, memory // 20)
