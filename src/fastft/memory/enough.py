"""Which changes are enough for a step to fit a GPU, alone or together, and which GPU is. Needs no torch."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from attrs import evolve, frozen

from fastft.memory.devices import Device
from fastft.memory.estimate import Setup, longer
from fastft.memory.plan import EIGHT_BITS, Plan, budget_of, named_part, planned, usable
from fastft.memory.remedies import batch_name, changes, fewer_rows, lower_ranks, of_rank

# Lengths and budgets are tried in steps of so many tokens and bytes; below the first step in these lengths.
TOKENS, BYTES = 256, 10**7
SHORTEST = (128, 64, 32)


@frozen
class Asked:
    """A step and its plan, on a GPU of `memory` bytes."""

    setup: Setup
    plan: str | int
    memory: int
    device: Device | None = None

    @property
    def limit(self) -> int:
        """Return the bytes that the step may take: what the GPU has for it, or the plan's budget if that is less."""
        asked = budget_of(self.plan)
        return usable(self.memory) if asked is None else min(usable(self.memory), asked)

    def planned(self) -> Plan:
        """Return its plan with what it is predicted to take."""
        return planned(self.setup, self.plan, self.limit, self.device)


@frozen
class Enough:
    """Changes after which a step fits, by name, the cheapest first, and the peak of the step then.

    drastic: they leave less than half of the batch or the length that was asked for.
    """

    names: tuple[str, ...]
    peak: int
    drastic: bool = False


@frozen
class _Lever:
    """One thing to change: the values it can have, the mildest first, what a value makes of a step, and its name.

    least: below this, a value is drastic; None: none is.
    """

    values: Sequence[Any]
    change: Callable[[Asked, Any], Asked]
    name: Callable[[Any], str]
    least: float | None = None

    def drastic(self, value: Any) -> bool:
        """Say whether a value leaves less than half of what was asked for."""
        return self.least is not None and value < self.least


def enough_alone(asked: Asked) -> tuple[Enough, ...]:
    """Return the changes after each of which the step fits, in the order of `remedies`, each as mild as is enough."""
    found = []
    for lever in _levers(asked):
        value = _mildest(lever.values, lambda value, lever=lever: lever.change(asked, value))
        if value is not None:
            peak = lever.change(asked, value).planned().estimate.peak
            found.append(Enough((lever.name(value),), peak, lever.drastic(value)))
    return tuple(found)


def enough_together(asked: Asked, drastic: bool = True) -> Enough | None:
    """Return changes after which the step fits, None if all are not enough.

    The cheapest are taken until it fits. Then each, the costliest first, is made as mild as is enough beside the
    others, or left out. Without `drastic` at least half of the batch and of the length is left.
    """
    levers = list(_levers(asked))
    if not drastic:
        mild = ([value for value in lever.values if not lever.drastic(value)] for lever in levers)
        levers = [evolve(lever, values=values) for lever, values in zip(levers, mild) if values]
    taken: list[Any] = []
    while len(taken) < len(levers) and not _with(asked, levers, taken).planned().fits:
        taken.append(levers[len(taken)].values[-1])
    if not _with(asked, levers, taken).planned().fits:
        return None
    for index in range(len(taken) - 1, -1, -1):

        def made(value: Any, index: int = index) -> Asked:
            return _with(asked, levers, [*taken[:index], value, *taken[index + 1 :]])

        taken[index] = _mildest([None, *levers[index].values], made)
    used = [(lever, value) for lever, value in zip(levers, taken) if value is not None]
    names = tuple(lever.name(value) for lever, value in used)
    peak = _with(asked, levers, taken).planned().estimate.peak
    return Enough(names, peak, any(lever.drastic(value) for lever, value in used))


def _with(asked: Asked, levers: Sequence[_Lever], values: Sequence[Any]) -> Asked:
    """Return the step with the first levers at these values; None leaves it as it is."""
    for lever, value in zip(levers, values):
        asked = asked if value is None else lever.change(asked, value)
    return asked


def _mildest(values: Sequence[Any], made: Callable[[Any], Asked]) -> Any:
    """Return the first value with which the step that is `made` of it fits, None if it does with none."""
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        if made(values[middle]).planned().fits:
            high = middle
        else:
            low = middle + 1
    return values[low] if low < len(values) else None


def smallest(asked: Asked, devices: Sequence[Device]) -> Device | None:
    """Return which of the devices has the least memory of those on which the step fits, without a budget if it has one.

    None: on none.
    """
    plan = "auto" if budget_of(asked.plan) is not None else asked.plan
    for device in sorted(devices, key=lambda device: device.memory):
        if evolve(asked, plan=plan, memory=device.memory, device=device).planned().fits:
            return device
    return None


def _levers(asked: Asked) -> Iterator[_Lever]:
    """Yield what can be changed of a step, the cheapest first, as `remedies` orders it."""
    setup, budget = asked.setup, budget_of(asked.plan)
    plans = ["auto"]
    if budget is not None:
        larger = range(budget // BYTES * BYTES + BYTES, usable(asked.memory) + 1, BYTES)
        plans = [f"{amount / 10**9:.2f}GB" for amount in larger]
    plans = [plan + EIGHT_BITS * named_part(asked.plan)[1] for plan in plans]
    if plans and plans != [asked.plan]:
        yield _Lever(plans, lambda now, plan: evolve(now, plan=plan), 'plan="{}"'.format)
    if setup.rows > 1:
        fewer = [rows for rows in range(setup.rows - 1, 0, -1) if setup.rows % rows == 0]
        yield _Lever(fewer, _on_setup(fewer_rows), lambda rows: batch_name(setup, rows), setup.rows / 2)
    for name, change in changes(setup):
        yield _Lever([change], _on_setup(lambda now, change: change(now)), lambda _, name=name: name)
    if ranks := lower_ranks(setup):
        yield _Lever(ranks, _on_setup(of_rank), "rank {}".format)
    shorter = [*range((setup.length - 1) // TOKENS * TOKENS, 0, -TOKENS), *SHORTEST]
    if shorter := [length for length in shorter if length < setup.length]:
        yield _Lever(shorter, _on_setup(longer), "length {}".format, setup.length / 2)


def _on_setup(change: Callable[[Setup, Any], Setup]) -> Callable[[Asked, Any], Asked]:
    return lambda asked, value: evolve(asked, setup=change(asked.setup, value))
