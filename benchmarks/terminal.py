"""What a run measured as a short table for who reads the terminal; the lines and the page have all of it."""

from collections.abc import Mapping, Sequence
from typing import Any

HEADS = ("arm", "cell", "tokens/s", "step ms", "peak GB", "parity")
NUMBERS = (("tokens_per_second", ",.1f"), ("step_ms", ",.2f"), ("peak_gb", ".3f"))
PARITY = {True: "yes", False: "no", None: "-"}


def short_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return a line for each arm of each cell, aligned; of an arm without a number, its status.

    "no" stands beside an arm whose loss or gradients are not the reference's: it has no speed.
    """
    rows = [HEADS]
    for line in lines:
        numbers = ("-" if line.get(key) is None else format(line[key], form) for key, form in NUMBERS)
        ok = line["status"] == "ok"
        same = PARITY[line.get("parity", {}).get("ok")] if ok else line["status"]
        rows.append((line["arm"], line["cell"], *numbers, same))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(_padded(row, widths)).rstrip() for row in rows)


def _padded(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Return the cells of a row in their widths: the first two, texts, on the left, numbers on the right."""
    texts, numbers = zip(row[:2], widths[:2]), zip(row[2:], widths[2:])
    return [*(cell.ljust(width) for cell, width in texts), *(cell.rjust(width) for cell, width in numbers)]
