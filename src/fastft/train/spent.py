"""What training has spent: tokens, seconds and operations of whole steps, up to a line, a checkpoint or the end.

Of two spans: since the run was last begun, and with what the runs had spent that led to it.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from attrs import define, field

from fastft.train import flops, step
from fastft.train.late_log import on_its_way

TOKENS = ("all", "non_padding", "loss_bearing")


@define
class Tally:
    """Running counts of tokens, kept on the device and read only when they are asked for.

    `running` are those of a step that is not done yet, `pending` those of whole steps, `sent` those of earlier ones, on
    their way: names, and what gives the counts.
    """

    windows: set = field(factory=set)
    running: dict[str, torch.Tensor] = field(factory=dict)
    pending: dict[str, torch.Tensor] = field(factory=dict)
    sent: list[tuple[list[str], Callable[[], torch.Tensor]]] = field(factory=list)

    def add(self, batch: Mapping[str, Any]) -> None:
        """Count one micro-batch."""
        _add(self.running, flops.count_batch(batch, step.shifted_labels(batch), self.windows))

    def step_ended(self) -> None:
        """Note that what was counted is of a whole step."""
        _add(self.pending, self.running)
        self.running.clear()

    def clear(self) -> None:
        """Forget what has not been taken: it is of a run that was broken off."""
        self.running.clear()
        self.pending.clear()
        self.sent.clear()

    def send(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Begin to read the counts of whole steps, summed over processes by `reduce`, for the next `take`."""
        names = sorted(self.pending)
        if names:
            self.sent.append((names, on_its_way(reduce(torch.stack([self.pending[name] for name in names])))))
            self.pending.clear()

    def take(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, int]:
        """Return the counts of whole steps since the last call, summed over processes by `reduce`."""
        counts: dict[str, int] = {}
        self.send(reduce)
        for names, arriving in self.sent:
            _add(counts, dict(zip(names, map(int, arriving().tolist()), strict=True)))
        self.sent.clear()
        return counts


@define
class Clock:
    """Seconds spent on training since a log line, without what evaluating and saving took.

    `running`: a step has begun and is not done. `lap`: when the interval ended whose line is still to come, if one is.
    """

    mark: float = 0.0
    ended: float = 0.0
    paused: float = 0.0
    running: bool = False
    lap: float | None = None

    def start(self) -> None:
        """Begin an interval now."""
        self._begin(time.perf_counter())

    def _begin(self, now: float) -> None:
        self.mark = self.ended = now
        self.paused, self.lap = 0.0, None

    def send(self) -> None:
        """End the interval now, though its line comes later."""
        self.lap = time.perf_counter()

    def step_began(self) -> None:
        """Note the beginning of an optimizer step."""
        self.running = True

    def step_ended(self) -> None:
        """Note the end of an optimizer step."""
        self.running, self.ended = False, time.perf_counter()

    def leave_out(self) -> None:
        """Leave out the time since the last step or log: it was no training."""
        now = time.perf_counter()
        self.paused += now - self.ended
        self.ended = now

    def so_far(self) -> float:
        """Return the interval's seconds up to the last step."""
        return self.ended - self.mark - self.paused

    def take(self) -> float:
        """Return the interval's seconds and begin the next."""
        now = time.perf_counter() if self.lap is None else self.lap
        seconds = now - self.mark - self.paused
        self._begin(now)
        return seconds


@define
class Spent:
    """Adds up the intervals between log lines.

    `work` is the model's, `reduce` sums counts over processes. `before` is what `so_far` was of the checkpoint that the
    run goes on from, empty for a run that begins. `behind` are counts behind the last line.
    """

    tally: Tally
    reduce: Callable[[torch.Tensor], torch.Tensor]
    work: flops.Work | None = None
    before: Mapping[str, Any] = field(factory=dict)
    clock: Clock = field(factory=Clock)
    intervals: list[tuple[float, dict[str, int]]] = field(factory=list)
    behind: dict[str, int] = field(factory=dict)

    def begin(self, work: flops.Work, before: Mapping[str, Any]) -> None:
        """Begin a run."""
        self.work, self.intervals, self.behind = work, [], {}
        self.before = before if tells(before) else {}
        self.tally.clear()

    def count(self) -> None:
        """Read the counts of whole steps; to be called in all processes alike, which are summed.

        To be called before what is no training, which would else wait for the steps that the device has not done.
        """
        counts = self.tally.take(self.reduce)
        _add(self.behind, counts)
        if counts and not self.clock.running:
            self.clock.step_ended()

    def send(self) -> None:
        """End an interval whose `line` comes later: its time is up, and its counts are on their way."""
        self.clock.send()
        self.tally.send(self.reduce)

    def line(self) -> dict[str, Any]:
        """End an interval; return its seconds and tokens a second, and the tokens so far. In all processes alike."""
        self.count()
        counts, seconds = self.behind, self.clock.take()
        self.intervals.append((seconds, counts))
        self.behind = {}
        return {
            "tokens_per_second": rates(seconds, counts),
            "tokens": self.so_far()["tokens"],
            "train_seconds": seconds,
        }

    def so_far(self) -> dict[str, Any]:
        """Return tokens, seconds and operations up to the last step, with those of the runs that led here."""
        seconds, counts = total(self._all())
        tokens = self.before.get("tokens", {})
        return {
            "tokens": {name: tokens.get(name, 0) + counts.get(name, 0) for name in TOKENS},
            "train_seconds": self.before.get("train_seconds", 0.0) + seconds,
            "flops": self.before.get("flops", 0.0) + (flops.flops(self.work, counts) if counts else 0.0),
        }

    def speeds(self, device: Mapping[str, Any]) -> dict[str, Any]:
        """Return tokens a second: in all, and since the run was last begun but for its first line; the share of the
        peak of the `device` (of a record) in the latter.
        """
        whole = self.so_far()
        seconds, counts = total(self._all()[1:] if len(self.intervals) > 1 else self._all())
        return {
            "tokens_per_second": rates(whole["train_seconds"], whole["tokens"]),
            "tokens_per_second_after_first_log": rates(seconds, counts),
            "mfu": self._mfu(seconds, counts, device),
        }

    def _all(self) -> list[tuple[float, dict[str, int]]]:
        """Return the intervals, and what lies behind the last line."""
        return [*self.intervals, (self.clock.so_far(), self.behind)]

    def _mfu(self, seconds: float, counts: Mapping[str, int], device: Mapping[str, Any]) -> float | None:
        peak = device.get("peak_flops")
        if peak is None or self.work.experts or not counts or seconds <= 0:
            return None
        return flops.flops(self.work, counts) / seconds / (peak * device["count"])


def tells(record: Mapping[str, Any]) -> bool:
    """Say whether a record tells what was spent; that of a checkpoint of an earlier version does not."""
    return all(name in record for name in ("tokens", "train_seconds", "flops"))


def total(intervals: Sequence[tuple[float, Mapping[str, int]]]) -> tuple[float, dict[str, int]]:
    """Sum seconds and counts of several intervals."""
    counts: dict[str, int] = {}
    for _, part in intervals:
        _add(counts, part)
    return sum(seconds for seconds, _ in intervals), counts


def rates(seconds: float, counts: Mapping[str, int]) -> dict[str, float]:
    """Return tokens a second of every kind."""
    return {name: counts.get(name, 0) / seconds if seconds > 0 else 0.0 for name in TOKENS}


def _add(sums: dict[str, Any], counts: Mapping[str, Any]) -> None:
    for name, count in counts.items():
        sums[name] = sums[name] + count if name in sums else count
