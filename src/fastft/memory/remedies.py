"""What makes a step smaller, and the memory that each change saves. Needs no torch."""

from collections.abc import Callable, Iterator, Sequence

from attrs import evolve, frozen

from fastft.memory.estimate import OPTIMIZER_BYTES, Mode, Setup, estimate, longer, setup_of
from fastft.memory.levels import keeps_wide
from fastft.memory.plan import EIGHT_BITS, named_modes

# What is halved at the least.
LEAST_LENGTH = 256
# LoRA's rank is halved down to this one.
LEAST_RANK = 4


@frozen
class Remedy:
    """Something that makes a step smaller, and the bytes of the peak that it saves."""

    name: str
    saves: int
    fits: bool


def remedies(setup: Setup, modes: Sequence[Mode], budget: int | None = None) -> tuple[Remedy, ...]:
    """Return what would make the step smaller, in the order of what it costs: the bytes of the peak each saves alone.

    A plan that keeps less costs time, a smaller batch nothing but more accumulation. 8 bits for what is kept, and for
    the optimizer, change the numbers a little; quantisation, the rank and a shorter length change what is trained.
    """
    now = estimate(setup, modes).peak
    layers = setup.shape.layers
    keep = [f"keep{EIGHT_BITS}" if setup.eight_bits else "keep"] if any(mode.dequantised for mode in modes) else []
    tried: list[tuple[str, Setup, Sequence[Mode]]] = [
        (f'plan="{name}"', setup, named_modes(name, layers)) for name in (*keep, "min", "offload")
    ]
    if setup.rows > 1:
        half = setup.rows // 2
        tried.append((batch_name(setup, half), fewer_rows(setup, half), modes))
    for name, change in changes(setup):
        if change is not _in_eight_bits or any(keeps_wide(mode.level) for mode in modes):
            tried.append((name, change(setup), modes))
    for rank in lower_ranks(setup)[:1]:
        tried.append((f"rank {rank}", of_rank(setup, rank), modes))
    if setup.length > LEAST_LENGTH:
        tried.append((f"length {setup.length // 2}", longer(setup, setup.length // 2), modes))
    found = []
    for name, smaller, with_modes in tried:
        peak = estimate(smaller, with_modes).peak
        if peak < now:
            found.append(Remedy(name, now - peak, budget is not None and peak <= budget))
    return tuple(found)


def changes(setup: Setup) -> Iterator[tuple[str, Callable[[Setup], Setup]]]:
    """Yield (name, what makes it of a setup) of the changes of how this step is computed, the cheapest first."""
    for name, change in (
        (f"gate and up in 8 bits (not exact; a plan with {EIGHT_BITS!r} behind it)", _in_eight_bits),
        ("an 8-bit optimizer (adamw_8bit)", _optimizer_in_eight_bits),
        ('LoRA with quant="nf4"' if setup.full else 'quant="nf4"', _in_nf4),
    ):
        if change(setup) is not setup:
            yield name, change


def lower_ranks(setup: Setup) -> list[int]:
    """Return the ranks below LoRA's that a step may have, the highest first; below 16 where LoRA is a change itself."""
    ranks, rank = [], (setup.rank or 16) // 2
    while rank >= LEAST_RANK:
        ranks.append(rank)
        rank //= 2
    return ranks


def fewer_rows(setup: Setup, rows: int) -> Setup:
    """Return the setup of a smaller micro-batch, which has its share of the answers."""
    answers = None if setup.answers is None else -(-setup.answers * rows // setup.rows)
    return evolve(setup, rows=rows, answers=answers)


def batch_name(setup: Setup, rows: int) -> str:
    """Return in words that a micro-batch has fewer rows."""
    times = setup.rows / rows
    return f"batch size {rows} with {'twice' if times == 2 else f'{times:.3g} times'} the accumulation"


def _in_eight_bits(setup: Setup) -> Setup:
    return evolve(setup, eight_bits=True) if setup.rank and setup.eight_bits is False else setup


def _optimizer_in_eight_bits(setup: Setup) -> Setup:
    if not setup.optimizer or _has_narrow_optimizer(setup):
        return setup
    part = OPTIMIZER_BYTES["adamw_8bit"] / OPTIMIZER_BYTES["adamw"]
    part *= 2 if setup.full and setup.element == 2 else 1  # AdamW's own state has 2 bytes a number there
    return evolve(setup, optimizer=int(setup.optimizer * part))


def _has_narrow_optimizer(setup: Setup) -> bool:
    """Say whether the optimizer's state is in 8 bits: AdamW's has at least 4 bytes a parameter."""
    return setup.optimizer < 3 * setup.gradients // (setup.element if setup.full else 4)


def _in_nf4(setup: Setup) -> Setup:
    """Return the setup with NF4 weights under LoRA, which trains what it trained, or with rank 16."""
    if setup.quant == "nf4":
        return setup
    optimizer = "adamw_8bit" if _has_narrow_optimizer(setup) else "adamw"
    made = setup_of(
        setup.shape, setup.rows, setup.length, rank=setup.rank or 16, element=setup.element, optimizer=optimizer,
        compute=setup.compute,
    )  # fmt: skip
    return evolve(made, head=setup.head, answers=setup.answers, norm=setup.norm, eight_bits=setup.eight_bits)


def of_rank(setup: Setup, rank: int) -> Setup:
    """Return the setup with LoRA of a lower rank; as it is without LoRA."""
    if setup.rank <= rank:
        return setup
    part = rank / setup.rank
    sizes = {name: int(getattr(setup, name) * part) for name in ("adapter", "gradients", "optimizer")}
    return evolve(setup, rank=rank, **sizes)
