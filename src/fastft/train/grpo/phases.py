"""Where the time of a step goes: seconds by phase, with the device's work waited for at each phase's borders."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from attrs import define, field


@define
class Phases:
    """Seconds spent in each named phase since the last `take`. Phases do not lie within one another."""

    seconds: dict[str, float] = field(factory=dict)
    totals: dict[str, float] = field(factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time of the block to the phase `name`."""
        _settle()
        began = time.perf_counter()
        try:
            yield
        finally:
            _settle()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def take(self, whole: float, rest: str) -> dict[str, float]:
        """Return the seconds of each phase and start anew; what is left of `whole` seconds is the phase `rest`."""
        taken = dict(self.seconds)
        taken[rest] = max(0.0, whole - sum(taken.values()))
        self.seconds.clear()
        for name, seconds in taken.items():
            self.totals[name] = self.totals.get(name, 0.0) + seconds
        return taken


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
