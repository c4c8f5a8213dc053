"""The two pictures of a file of results: speed against peak memory, and memory against length."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def draw(data: Mapping[str, Any], path: Path) -> list[Path]:
    """Draw what the results hold into PNG files named after `path`; returns them. Nothing is drawn without matplotlib.

    Arms that failed parity have no speed and are not in the first picture. On a CPU memory is the process's.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return []
    done = [line for line in data["cells"] if line["status"] == "ok" and _peak(line) is not None]
    drawn = []
    for name, fill in (("speed", _speed), ("memory", _memory)):
        groups = fill(done)
        if not groups:
            continue
        figure = Figure(figsize=(7, 4.2 * len(groups)), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        for axes, (heading, x, y, series) in zip(figure.subplots(len(groups), 1, squeeze=False)[:, 0], groups):
            for number, (arm, points) in enumerate(series.items()):
                axes.plot(*zip(*sorted(points)), marker="osD^v<>"[number // 10 % 7], color=f"C{number % 10}", label=arm)
            axes.set(title=heading, xlabel=x, ylabel=y)
            every = [point for points in series.values() for point in points]
            axes.set_xlim(0, 1.08 * max(a for a, _ in every))
            axes.set_ylim(0, 1.08 * max(b for _, b in every))
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
        target = path.with_name(f"{path.stem}-{name}.png")
        canvas.print_figure(str(target), format="png", dpi=110)
        drawn.append(target)
    return drawn


def _peak(line: Mapping[str, Any]) -> float | None:
    return line["host_peak_gb"] if line["peak_gb"] is None else line["peak_gb"]


def _speed(lines: list[Mapping[str, Any]]) -> list[tuple[str, str, str, dict[str, list[tuple[float, float]]]]]:
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for line in lines:
        if line["tokens_per_second"] is not None:
            panels.setdefault(line["cell"], {})[line["arm"]] = [(_peak(line), line["tokens_per_second"])]
    return [(cell, "peak memory, GB", "tokens/s", series) for cell, series in panels.items()]


def _memory(lines: list[Mapping[str, Any]]) -> list[tuple[str, str, str, dict[str, list[tuple[float, float]]]]]:
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for line in lines:
        heading = f"{line['shape']} {line['mode']}, batch {line['batch']}"
        panels.setdefault(heading, {}).setdefault(line["arm"], []).append((line["length"], _peak(line)))
    wide = {key: s for key, s in panels.items() if any(len({x for x, _ in points}) > 1 for points in s.values())}
    return [(heading, "tokens of a row", "peak memory, GB", series) for heading, series in wide.items()]
