"""Memory against length, as slope and intercept."""

from collections.abc import Mapping, Sequence
from typing import Any

LENGTHS = 4


def memory_fits(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the least-squares line of peak memory over tokens for every arm measured at `LENGTHS` lengths or more.

    Cells that differ in nothing but the length belong together.
    """
    series: dict[tuple[Any, ...], dict[int, float]] = {}
    keys = ("arm", "shape", "mode", "batch", "layers", "rank", "padding", "completion", "head_scale", "seed")
    for line in lines:
        if line["status"] == "ok" and line.get("peak_gb") is not None:
            series.setdefault(tuple(line[key] for key in keys), {})[line["length"]] = line["peak_gb"]
    fits = []
    for key, peaks in series.items():
        if len(peaks) < LENGTHS:
            continue
        batch, tokens = key[3], [key[3] * length for length in sorted(peaks)]
        slope, intercept, residual = least_squares(tokens, [peaks[length] for length in sorted(peaks)])
        fits.append(
            {
                "arm": key[0], "of": f"{key[1]} {key[2]}, batch {batch}", "lengths": sorted(peaks),
                "mb_per_token": slope * 1e3, "intercept_gb": intercept, "largest_residual_gb": residual,
            }
        )  # fmt: skip
    return fits


def least_squares(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Return slope, intercept and the largest residual of the line through the points."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)
    intercept = mean_y - slope * mean_x
    return slope, intercept, max(abs(b - slope * a - intercept) for a, b in zip(x, y))
