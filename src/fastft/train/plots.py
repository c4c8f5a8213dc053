"""The picture of a run: loss raw and smoothed, gradient norm, learning rate."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Return the exponential moving average of `values`, corrected for its start (Adam's correction)."""
    out, mean = [], 0.0
    for index, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        out.append(mean / (1 - weight**index))
    return out


def plot_run(rows: Sequence[Mapping[str, Any]], path: Path, title: str = "") -> None:
    """Draw the lines of metrics.jsonl into the PNG file `path`. Raises `SaveError` if it cannot be written.

    Uses matplotlib's objects alone: no window, no backend and no state shared with the user's own figures.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from fastft.train.checkpoint import write_file

    figure = Figure(figsize=(8, 9), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(3, 1, sharex=True)
    steps, values = column(rows, "loss")
    panels[0].plot(steps, values, color="0.75", label="loss")
    panels[0].plot(steps, smooth(values), color="C0", label="loss, smoothed")
    eval_steps, eval_values = column(rows, "eval_loss")
    if eval_values:
        panels[0].plot(eval_steps, eval_values, "o-", color="C1", label="evaluation loss")
    panels[0].legend()
    panels[1].plot(*column(rows, "grad_norm"), color="C2")
    panels[2].plot(*column(rows, "learning_rate"), color="C3")
    for panel, label in zip(panels, ("loss", "gradient norm", "learning rate"), strict=True):
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    panels[2].set_xlabel("step")
    panels[0].set_title(title)
    write_file(path, lambda temporary: canvas.print_figure(str(temporary), format="png", dpi=110))


def column(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return steps and values of one metric, where it was logged as a number."""
    pairs = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
    return [step for step, _ in pairs], [value for _, value in pairs]
