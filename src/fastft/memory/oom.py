"""What used the memory, and what would save some: the text of the error that takes an out-of-memory's place."""

from collections.abc import Sequence

from fastft.memory.estimate import Mode, Setup, estimate
from fastft.memory.plan import describe_modes
from fastft.memory.remedies import remedies

GB = 10**9


def table(setup: Setup, modes: Sequence[Mode]) -> list[tuple[str, str]]:
    """Return (what, GB) of the predicted peak of a step, its sum last."""
    made = estimate(setup, modes)
    rows = [(part.name, f"{part.bytes / GB:.2f}") for part in made.parts if part.bytes]
    return [*rows, ("peak", f"{made.peak / GB:.2f}")]


def remedy_lines(setup: Setup, modes: Sequence[Mode], budget: int | None = None) -> list[str]:
    """Return the remedies in the order of what they cost, a line each."""
    lines = []
    for remedy in remedies(setup, modes, budget):
        enough = ", which is enough" if remedy.fits else ""
        lines.append(f"{remedy.name}: saves {remedy.saves / GB:.2f} GB{enough}")
    return lines


def message(
    original: str, setup: Setup | None, modes: Sequence[Mode], budget: int | None, in_use: int, kept: str = ""
) -> str:
    """Return the text of an out-of-memory error.

    `original` is the allocator's own text, of which the first line is told; `setup` None: the sizes are not known.
    `budget` are the bytes that the device has for this process, `in_use` those that tensors held at the most; `kept`
    says what of the work is saved.
    """
    lines = [f"out of memory: {original.strip().splitlines()[0]}"] if original.strip() else ["out of memory"]
    if budget:
        lines.append(f"The device has {budget / GB:.2f} GB for this process; tensors held {in_use / GB:.2f} GB.")
    if setup is not None and setup.tokens:
        lines.append(f"What a step of {setup.rows} x {setup.length} tokens is predicted to take, in GB:")
        rows = table(setup, modes)
        width = max(len(name) for name, _ in rows)
        lines += [f"  {name.ljust(width)}  {amount.rjust(7)}" for name, amount in rows]
        lines.append(f"  ({describe_modes(modes, bool(setup.eight_bits), setup.fp8)})")
        found = remedy_lines(setup, modes, budget)
        lines += ["What would make it smaller, the cheapest first:", *(f"  {line}" for line in found)] if found else []
    else:
        lines.append('What makes a step smaller: plan="min", a smaller batch, quant="nf4", a shorter length.')
    return "\n".join([*lines, kept] if kept else lines)
