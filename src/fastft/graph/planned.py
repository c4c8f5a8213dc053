"""What each layer of one compiled model keeps: named by the plan, or solved for the largest batch seen."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from attrs import define, evolve, field
from torch import nn

from fastft.errors import UsageError
from fastft.graph.capture import quant_state_tensors
from fastft.graph.keepable import keepable_linears
from fastft.graph.kept import KeptWeights
from fastft.graph.outer_norms import outer_norms
from fastft.graph.report import GraphReport
from fastft.memory.devices import Device, find_device
from fastft.memory.estimate import Estimate, Mode, Setup, estimate
from fastft.memory.measure import host_memory, setup_of_model
from fastft.memory.offload import Offloader
from fastft.memory.plan import (
    HOST_SHARE,
    Plan,
    budget_of,
    budget_of_copies,
    describe_modes,
    named_modes,
    named_part,
    solve,
    usable,
)
from fastft.registry.spec import ModelSpec
from fastft.state import base_model

GB = 10**9


def _warn(text: str) -> None:
    """Tell a loop of the user's own what it is to know."""
    warnings.warn(text, stacklevel=3)


@define(eq=False)
class PlannedLayers:
    """The modes chosen for a model's layers, first to last, and the largest batch they were chosen for.

    `fp8`: the step has fp8 factors, and copies of weights are such.

    `sizes` is None where the config does not tell them; a budget is then refused. `fits` is False where even the
    smallest plan is predicted to need more than the budget. `weights` are the copies of layers whose mode says
    `dequantised`; `keepable` are the linears of each layer whose weights can be kept so, `why_not` what is in the way
    if there are none. `wants_eight_bits`: layers that keep gate and up are to keep them in 8 bits, which the `graphs`
    captured up to now may not do; None: they cannot. `sizes` do not say it, `setup` does. `unmet` says that the plan
    does not fit, "" where it does; `tell` is told that as often as it changes. `given` is the batch that the plan was
    asked for, (0, 0) if none was.
    """

    plan: str | int
    chosen: tuple[Mode, ...]
    sizes: Setup | None
    budget: int | None = None
    device: Device | None = None
    offloader: Offloader | None = None
    largest: tuple[int, int] = (0, 0)
    fits: bool = True
    weights: KeptWeights = field(factory=KeptWeights)
    keepable: tuple[tuple[nn.Module, ...], ...] = ()
    why_not: str = ""
    wants_eight_bits: bool | None = False
    graphs: list[GraphReport] = field(factory=list)
    fp8: bool = False
    unmet: str = ""
    tell: Callable[[str], None] = _warn
    given: tuple[int, int] = (0, 0)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        spec: ModelSpec,
        plan: str | int,
        layers: Sequence[nn.Module],
        batch: tuple[int, int] | None,
        compute: str = "exact",
        disable: Sequence[str] = (),
        eight_bits: bool | None = False,
        norm_alone: str = "op",
    ) -> "PlannedLayers":
        """Return the plan of a model whose decoder layers are `layers`, solved at once if `batch` is known.

        `disable`: names of rewrites that are left out. `eight_bits`: whether gate and up are to be kept in 8 bits, None
        where they cannot be. `norm_alone`: the form of a norm outside the layers. Raises UsageError for a budget on a
        model whose config does not tell its sizes.
        """
        budget = budget_of(plan)
        where = next(layers[0].parameters()).device
        norm = computed_norm(where, norm_alone) if outer_norms(base_model(model), spec, layers, disable) else "eager"
        try:
            setup = setup_of_model(model, spec)
            shape = evolve(setup.shape, layers=len(layers))
            sizes = evolve(setup, compute=compute, norm=norm, shape=shape)
        except UsageError:
            if budget is not None:
                raise
            sizes = None
        name = torch.cuda.get_device_name(where) if where.type == "cuda" else ""
        keepable, why_not = keepable_linears(layers, spec, disable)
        modes = named_modes(plan if budget is None else "keep", len(layers), any(keepable))
        made = cls(
            plan, modes, sizes, budget, find_device(name), keepable=keepable, why_not=why_not,
            wants_eight_bits=eight_bits, fp8=compute != "exact", given=batch or (0, 0),
        )  # fmt: skip
        if batch is not None:
            made.see(*batch, where)
        return made

    def mode(self, index: int) -> Mode:
        """Return what layer `index` keeps: nothing dequantised where no graph reads a copy of its weights."""
        mode = self.chosen[index]
        if mode.dequantised and not any(self.weights.may_read(linear.weight) for linear in self.keepable[index]):
            return evolve(mode, dequantised=False)
        return mode

    @property
    def modes(self) -> tuple[Mode, ...]:
        """Return what each layer keeps."""
        return tuple(self.mode(index) for index in range(len(self.chosen)))

    def described(self) -> str:
        """Return in words what the layers keep."""
        return describe_modes(self.modes, self.eight_bits, self.fp8)

    @property
    def eight_bits(self) -> bool:
        """Say whether the layers that keep gate and up keep them in 8 bits, as far as graphs were captured."""
        return bool(self.wants_eight_bits) and all(graph.eight_bits is not False for graph in self.graphs)

    @property
    def setup(self) -> Setup | None:
        """Return the step of the largest batch, with the weights that graphs read copies of or may read."""
        return None if self.sizes is None else self._as_captured(self.sizes)

    def _as_captured(self, sizes: Setup) -> Setup:
        """Return a step with the weights that graphs read copies of or may read, and 8 bits where graphs have them."""
        read = ([linear for linear in found if self.weights.may_read(linear.weight)] for found in self.keepable)
        counts = (sum(linear.out_features * linear.in_features for linear in linears) for linears in read)
        eight_bits = None if self.wants_eight_bits is None else self.eight_bits
        return evolve(sizes, nf4_weights=tuple(counts), eight_bits=eight_bits)

    @property
    def keeps_head(self) -> bool:
        """Say whether the loss head's fp8 factors are kept."""
        return self.sizes is not None and self.sizes.keeps_head(self.modes)

    @property
    def fewer(self) -> int:
        """Return how many layers have linears whose weights could be kept dequantised and that no rewrite took."""
        return sum(not all(self.weights.may_read(linear.weight) for linear in found) for found in self.keepable)

    def begin(self, head: str, answers: int | None, batch: tuple[int, int] | None, where: torch.device) -> None:
        """Plan for a run, with what `expect` takes; larger batches of an earlier run on the same model are forgotten.

        A batch that the plan was asked for stands in the place of the run's own.
        """
        batch = batch if self.given == (0, 0) else self.given
        if batch is None or _tokens(self.largest) > _tokens(batch):
            self.largest, self.fits, self.unmet = (0, 0), True, ""
        self.expect(head, answers, batch, where)

    def expect(self, head: str, answers: int | None, batch: tuple[int, int] | None, where: torch.device) -> None:
        """Take note of what a run asks of the model's head (`Setup`), and of its largest batch if that is known.

        What was solved for another head is solved anew.
        """
        if self.sizes is None:
            return
        known = self.largest
        if (head, answers) != (self.sizes.head, self.sizes.answers):
            self.sizes, self.largest = evolve(self.sizes, head=head, answers=answers), (0, 0)
        for rows, length in (known, batch or (0, 0)):
            self.see(rows, length, where)

    def see(self, rows: int, length: int, where: torch.device) -> None:
        """Take note of a batch; one with more tokens than any before solves the budget anew."""
        if rows * length <= _tokens(self.largest):
            return
        self.largest = (rows, length)
        if self.sizes is None:
            return
        self.sizes = evolve(self.sizes, rows=rows, length=length, element=_element(self.sizes, where))
        budget = self.budget if self.budget is not None else self._free(where)
        if budget is not None:
            made = self._solved(self.setup, budget)
            before = [mode.dequantised for mode in self.modes]
            self.chosen, self.fits = made.modes, made.fits
            if [mode.dequantised for mode in self.modes] != before:
                self.weights.clear()
            self.unmet = "" if made.fits else self._unmet(made, budget)
            if self.unmet:
                self.tell(self.unmet)

    def _unmet(self, made: Plan, budget: int) -> str:
        rows, length = self.largest
        needed = f"{made.estimate.peak / GB:.2f} GB where the plan allows {budget / GB:.2f} GB"
        return (
            f"memory plan {self.plan!r}: a step of {rows} x {length} tokens is predicted to take at least {needed}; "
            "`fastft plan` lists what is enough"
        )

    @contextmanager
    def told_to(self, tell: Callable[[str], None]) -> Iterator[None]:
        """Tell `tell` what is to be known while the block runs."""
        before, self.tell = self.tell, tell
        try:
            yield
        finally:
            self.tell = before

    def _solved(self, setup: Setup, budget: int) -> Plan:
        host = int(host_memory() * HOST_SHARE)
        return solve(setup, budget, self.device, host, budget_of_copies(self.plan, budget))

    def foreseen(self, head: str, answers: int | None, batch: tuple[int, int], where: torch.device) -> Plan | None:
        """Return what a batch (rows, length) would be given, with what `expect` takes; None where sizes are unknown.

        A plan by name fits where its step does into what is free.
        """
        if self.sizes is None:
            return None
        sizes = evolve(self.sizes, head=head, answers=answers, element=_element(self.sizes, where))
        setup = self._as_captured(evolve(sizes, rows=batch[0], length=batch[1]))
        budget = self.budget if self.budget is not None else self._free(where)
        if budget is not None:
            return self._solved(setup, budget)
        made = estimate(setup, self.modes, self.device)
        room = free_memory(where) if where.type == "cuda" else host_memory()
        return Plan(self.modes, made, room, made.peak <= room)

    def _free(self, where: torch.device) -> int | None:
        """Return what "auto" may take."""
        return free_memory(where) if named_part(self.plan)[0] == "auto" and where.type == "cuda" else None

    def predicted(self) -> Estimate | None:
        """Return what the largest batch seen is predicted to take, None before the first or where sizes are unknown."""
        if self.sizes is None or self.largest == (0, 0):
            return None
        return estimate(self.setup, self.modes, self.device)

    def norm_is_eager(self) -> None:
        """Take note that a norm outside the layers runs as transformers wrote it: it could not be replaced."""
        if self.sizes is not None:
            self.sizes = evolve(self.sizes, norm="eager")

    @contextmanager
    def call(self, index: int, layer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Mode]:
        """Give the mode of layer `index` for one call of it, within which what it saves is moved where it is to be."""
        hidden = args[0] if args else kwargs.get("hidden_states")
        if index == 0 and isinstance(hidden, torch.Tensor) and hidden.dim() == 3:
            self.see(hidden.shape[0], hidden.shape[1], hidden.device)
        mode = self.mode(index)
        with self._moved(layer, hidden, args, kwargs) if mode.offload else self._followed():
            yield mode

    def _followed(self) -> AbstractContextManager[None]:
        """Return the context of a layer that moves nothing: of one before it, results may be on their way."""
        return nullcontext() if self.offloader is None else self.offloader.follow()

    def _moved(
        self, layer: nn.Module, hidden: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> AbstractContextManager[None]:
        """Return the context in which what a layer saves is moved."""
        if not isinstance(hidden, torch.Tensor):
            return nullcontext()
        if self.offloader is None or self.offloader.device != hidden.device:
            self.offloader = Offloader(hidden.device)
        shared = (*args[1:], *(value for name, value in kwargs.items() if name != "hidden_states"))

        def stays() -> list[torch.Tensor]:
            given = [leaf for leaf in torch.utils._pytree.tree_leaves(shared) if isinstance(leaf, torch.Tensor)]
            own = list(layer.parameters())
            states = [part for module in layer.modules() for part in quant_state_tensors(module).values()]
            return [*given, *own, *layer.buffers(), *states, *self.weights.of(own)]

        return self.offloader.layer(stays)


def free_memory(where: torch.device) -> int:
    """Return what a GPU has free and what this process holds of it, but for the reserve, in bytes."""
    free, memory = torch.cuda.mem_get_info(where)
    others = memory - free - torch.cuda.memory_reserved(where)
    return max(0, usable(memory) - max(0, others - _own_context(memory)))


def _tokens(batch: tuple[int, int]) -> int:
    rows, length = batch
    return rows * length


def _element(sizes: Setup, where: torch.device) -> int:
    """Return the bytes of an activation, under autocast as it is set now."""
    narrow = torch.is_autocast_enabled(where.type)
    return min(sizes.element, torch.get_autocast_dtype(where.type).itemsize) if narrow else sizes.element


def computed_norm(where: torch.device, form: str) -> str:
    """Return the name that the estimate has for a norm replaced in this form, "op" or "torch", on such a device."""
    return "fused" if where.type == "cuda" and form == "op" else "reference"


def _own_context(memory: int) -> int:
    """Return what the driver's context of this very process takes, which counts as used: within the reserve."""
    return min(1 << 30, memory // 20)
