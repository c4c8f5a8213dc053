"""The memory plan: the fastest modes of a model's layers that fit a budget. Needs no torch."""

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise

from attrs import frozen

from fastft.errors import Problem, did_you_mean
from fastft.memory.devices import LEAST_AMOUNT, Device, parse_bytes
from fastft.memory.estimate import (
    REFERENCE,
    Estimate,
    Mode,
    Setup,
    estimate,
    longer,
    saved_bytes,
    step_seconds,
)
from fastft.memory.levels import LEVELS, keeps_wide

# Plans by name; the first of them keep gate and up, or may.
KEEP_WIDE = ("auto", "fast", "keep")
PLANS = (*KEEP_WIDE, "min", "offload")
# Behind a plan by name or an amount: gate and up of the feed-forwards, where they are kept, in 8 bits a number.
EIGHT_BITS = "+8bit"
# Left alone by "auto" and by `fastft plan --gpu`: CUDA's context, libraries' workspaces, what cannot be joined.
RESERVE = 1 << 30
RESERVE_SHARE = 0.03
HOST_SHARE = 0.5
# Of what "auto" may take: up to this part of it weights are kept dequantised as well, the rest is left for what comes.
COPIES_SHARE = 0.75
# Why weights are not kept dequantised.
NO_NF4 = "no layer has NF4 weights under an adapter"


@frozen
class Plan:
    """The modes of all layers, the first layer's first, what they are predicted to take, and whether that fits."""

    modes: tuple[Mode, ...]
    estimate: Estimate
    budget: int | None
    fits: bool


def plan_problem(plan: object) -> Problem | None:
    """Return what is wrong with a `plan` argument, None if nothing is."""
    if isinstance(plan, int) and not isinstance(plan, bool):
        allowed = "a number of bytes, such as 24_000_000_000; '24GB' says the same"
        return None if plan >= LEAST_AMOUNT else Problem("plan", plan, allowed)
    named, eight_bits = named_part(plan)
    names = KEEP_WIDE if eight_bits else PLANS
    if isinstance(named, str) and (named in names or (parse_bytes(named) or 0) >= LEAST_AMOUNT):
        return None
    allowed = f"one of {PLANS}, or an amount with its unit such as '24GB', or that number of bytes"
    allowed += f"; with {EIGHT_BITS!r} behind it, as in 'keep{EIGHT_BITS}', where it keeps gate and up"
    near = [f"{name}{EIGHT_BITS}" if eight_bits else name for name in names]
    return Problem("plan", plan, allowed, did_you_mean(str(plan), near))


def named_part(plan: object) -> tuple[object, bool]:
    """Return a plan without what says that gate and up are kept in 8 bits, and whether it says so."""
    eight_bits = isinstance(plan, str) and plan.endswith(EIGHT_BITS)
    return (plan.removesuffix(EIGHT_BITS), True) if eight_bits else (plan, False)


def budget_of(plan: str | int) -> int | None:
    """Return the bytes that a plan allows, None for one that names what is done."""
    named, _ = named_part(plan)
    return named if isinstance(named, int) else None if named in PLANS else parse_bytes(named)


def usable(memory: int) -> int:
    """Return what of a device's memory a step may take: all but a stated reserve of 1 GiB and 3 %."""
    return int(max(0, memory - RESERVE - RESERVE_SHARE * memory))


def named_modes(plan: str, layers: int, keepable: bool = False) -> tuple[Mode, ...]:
    """Return the modes of "fast", "keep", "min" and "offload"; "auto" without a budget is "keep".

    "fast" keeps the weights dequantised as well if they are `keepable` so, and is "keep" otherwise. "offload" keeps
    attention's output in CPU memory; the last layer's, which is wanted at once, stays.
    """
    plan, _ = named_part(plan)
    if plan == "offload":
        return (Mode("context", True),) * (layers - 1) + (Mode("context"),) * min(layers, 1)
    return (Mode("min" if plan == "min" else "keep", dequantised=plan == "fast" and keepable),) * layers


def fast_is_keep(plan: str | int, modes: Sequence[Mode], why: str) -> str:
    """Return what to say where the plan is "fast" and no weight is kept dequantised, because of `why`; "" elsewhere."""
    if named_part(plan)[0] != "fast" or any(mode.dequantised for mode in modes):
        return ""
    return f"no weight is kept dequantised, plan 'fast' is 'keep': {why}"


def not_in_eight_bits(plan: str | int, why: str) -> str:
    """Return what to say where a plan wants gate and up in 8 bits and they are not, because of `why`; "" elsewhere."""
    return f"gate and up are kept as they are, not in 8 bits: {why}" if named_part(plan)[1] and why else ""


def budget_of_copies(plan: str | int, budget: int) -> int:
    """Return the bytes up to which weights may be kept dequantised, where a plan is solved for `budget` bytes."""
    return int(COPIES_SHARE * budget) if named_part(plan)[0] == "auto" else budget


def solve(setup: Setup, budget: int, device: Device | None = None, host: int | None = None, copies: int = 0) -> Plan:
    """Return the fastest plan whose predicted peak is at most `budget` bytes; the smallest one if none fits.

    Two neighbouring modes on the hull of time over memory share the layers, and one layer may take a third that fills
    the room left. The last layers get the larger mode: what they keep is used up before the first layers' backward
    needs room. `host` is the CPU memory that may be used, None any. With `dequantise`, bytes that are left when every
    layer keeps its results are spent on dequantised weights: they save less time a byte.
    """
    best: Plan | None = None
    least: Plan | None = None
    for modes in (*_candidates(setup, budget, device, True), *_candidates(setup, budget, device, False)):
        made = estimate(setup, modes, device)
        if host is not None and made.host > host:
            continue
        found = Plan(modes, made, budget, made.peak <= budget)
        if least is None or made.peak < least.estimate.peak:
            least = found
        if found.fits and (best is None or _cost(found) < _cost(best)):
            best = found
    if best is None:
        return least
    best = _topped_up(best, setup, device, host)
    return _dequantised(best, setup, device, min(copies, budget))


def _dequantised(plan: Plan, setup: Setup, device: Device | None, room: int) -> Plan:
    """Return the plan with the weights of as many of the last layers dequantised as `room` bytes allow."""
    if not setup.keepable or set(plan.modes) != {Mode()}:
        return plan
    modes = _most(setup, room, device, Mode(dequantised=True), Mode())
    return Plan(modes, estimate(setup, modes, device), plan.budget, True)


def _cost(plan: Plan) -> tuple[float, int, int]:
    """Return what plans that fit are compared by: time, then bytes moved to the CPU, then the peak."""
    return round(plan.estimate.relative, 4), plan.estimate.host, plan.estimate.peak


def _topped_up(plan: Plan, setup: Setup, device: Device | None, host: int | None) -> Plan:
    """Return the plan with one more layer in the fastest other mode for which there is room left."""
    first = plan.modes[-1]
    rest = [index for index, mode in enumerate(plan.modes) if mode != first]
    best = plan
    for index in rest[-1:]:
        for level in LEVELS:
            for offload in (False, True):
                modes = (*plan.modes[:index], Mode(level, offload), *plan.modes[index + 1 :])
                made = estimate(setup, modes, device)
                found = Plan(modes, made, plan.budget, made.peak <= plan.budget)
                if found.fits and (host is None or made.host <= host) and _cost(found) < _cost(best):
                    best = found
    return best


def planned(setup: Setup, plan: str | int, budget: int, device: Device | None = None) -> Plan:
    """Return the modes of a plan by name, or those solved for `budget` bytes where it is "auto" or an amount."""
    named, _ = named_part(plan)
    if named == "auto" or budget_of(plan) is not None:
        return solve(setup, budget, device, copies=budget_of_copies(plan, budget))
    modes = named_modes(plan, setup.shape.layers, setup.keepable)
    made = estimate(setup, modes, device)
    return Plan(modes, made, budget, made.peak <= budget)


def _candidates(setup: Setup, budget: int, device: Device | None, offload: bool) -> Iterator[tuple[Mode, ...]]:
    """Yield mixtures of two modes: of each pair that with most layers of the larger mode that fits, and the ends.

    Every mode by itself, too: of those that wait in CPU memory, the one whose temporaries are the fewest is smallest.
    """
    for level in LEVELS:
        yield _mixed(Mode(level, offload), Mode(level, offload), 0, setup.shape.layers)
    for larger, smaller in _pairs(setup, device, offload):
        yield _mixed(larger, smaller, 0, setup.shape.layers)
        yield _most(setup, budget, device, larger, smaller)


def _most(setup: Setup, budget: int, device: Device | None, larger: Mode, smaller: Mode) -> tuple[Mode, ...]:
    """Return the mixture of two modes with most layers of the larger one that fits; with none of it if none does."""
    low, high = 0, setup.shape.layers
    while low < high:
        middle = (low + high + 1) // 2
        if estimate(setup, _mixed(larger, smaller, middle, setup.shape.layers), device).peak <= budget:
            low = middle
        else:
            high = middle - 1
    return _mixed(larger, smaller, low, setup.shape.layers)


def _mixed(larger: Mode, smaller: Mode, count: int, layers: int) -> tuple[Mode, ...]:
    modes = [smaller] * (layers - count) + [larger] * count
    if layers and modes[-1].offload:
        modes[-1] = Mode(modes[-1].level)  # used at once: not worth the way
    return tuple(modes)


def _pairs(setup: Setup, device: Device | None, offload: bool) -> list[tuple[Mode, Mode]]:
    """Return neighbours on the lower hull of (device bytes, seconds) of a layer, the fastest first."""
    speeds = device if device is not None and device.flops else REFERENCE
    points = []
    for level in LEVELS:
        for moved in (False, True) if offload else (False,):
            mode = Mode(level, moved)
            size = 0 if moved else saved_bytes(setup, level)
            points.append((step_seconds(setup, [mode], speeds), size, mode))
    points.sort(key=lambda point: point[:2])
    hull: list[tuple[float, int, Mode]] = []
    for point in points:
        if hull and point[1] >= hull[-1][1]:
            continue  # slower and no smaller
        while len(hull) > 1 and _above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    ends = [(one[2], other[2]) for one, other in pairwise(hull)] or [(hull[0][2], hull[0][2])]
    fastest = hull[0][2]
    if fastest.offload:  # copies that hide wholly: what fits stays nevertheless
        ends.insert(0, (Mode(fastest.level), fastest))
    smallest = Mode("min", offload)
    return ends if ends[-1][1] == smallest else [*ends, (ends[-1][1], smallest)]


def _above(first: tuple, middle: tuple, last: tuple) -> bool:
    """Say whether the middle point lies on or above the line between its neighbours."""
    return (middle[0] - first[0]) * (first[1] - last[1]) >= (last[0] - first[0]) * (first[1] - middle[1])


def longest(setup: Setup, plan: str | int, budget: int, device: Device | None = None, multiple: int = 256) -> int:
    """Return the longest length, a multiple of `multiple`, of which a step with this plan fits `budget`; 0 if none.

    Where it is shorter than `multiple`, it is told to the token. A plan that is solved is solved for each length, and
    ends with the smallest.
    """
    low, high = 0, 1
    while high < 1 << 16 and planned(longer(setup, high * multiple), plan, budget, device).fits:
        low, high = high, high * 2
    while low + 1 < high:
        middle = (low + high) // 2
        if planned(longer(setup, middle * multiple), plan, budget, device).fits:
            low = middle
        else:
            high = middle
    if not low and multiple > 1:
        return min(longest(setup, plan, budget, device, 1), multiple - 1)
    return low * multiple


def describe_modes(modes: Sequence[Mode], eight_bits: bool = False, fp8: bool = False) -> str:
    """Return the modes in words, first layers first: "12 layers min, moved to the CPU; 20 layers keep".

    eight_bits: the layers that keep gate and up keep them in 8 bits, which is said of these.
    fp8: copies of weights are fp8 factors.
    """
    runs = [(mode, len(list(same))) for mode, same in groupby(modes)]
    narrow = " (gate and up in 8 bits, not exact)" if eight_bits else ""
    return "; ".join(
        f"{count} layer{'s' if count > 1 else ''} {mode.told(fp8)}{narrow if keeps_wide(mode.level) else ''}"
        for mode, count in runs
    )
