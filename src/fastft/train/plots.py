"""The picture of a run: loss raw and smoothed, gradient norm, learning rate."""

import re
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
    """Draw the lines of metrics.jsonl into the PNG file `path`. Raises `SaveError` if it cannot be written."""
    figure, panels = _panels()
    steps, values = column(rows, "loss")
    panels[0].plot(steps, values, color="0.75", label="loss")
    panels[0].plot(steps, smooth(values), color="C0", label="loss, smoothed")
    for number, (name, told) in enumerate(evaluation_losses(rows).items(), start=1):
        panels[0].plot(*column(rows, name), "o-", color=f"C{number}", label=f"evaluation loss{told}")
    panels[0].legend()
    panels[1].plot(*column(rows, "grad_norm"), color="C2")
    panels[2].plot(*column(rows, "learning_rate"), color="C3")
    _write(figure, ("loss", "gradient norm", "learning rate"), title, path)


def column(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return steps and values of one metric, where it was logged as a number."""
    pairs = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
    return [step for step, _ in pairs], [value for _, value in pairs]


def evaluation_losses(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the names under which losses of evaluations were logged, each with what tells its set from the others."""
    matches = {key: re.fullmatch("eval_(?:(.+)_)?loss", key) for row in rows for key in row}
    return {key: f", {match[1]}" if match[1] else "" for key, match in matches.items() if match}


def plot_rewards(rows: Sequence[Mapping[str, Any]], path: Path, title: str = "") -> None:
    """Draw reward, KL and completion length of a run with rewards into the PNG file `path`. Raises `SaveError`.

    The KL is that to the reference where the run has one, else the estimate of KL(engine || trainer).
    """
    figure, panels = _panels()
    steps, values = column(rows, "reward")
    panels[0].plot(steps, values, color="0.75", label="reward, mean")
    panels[0].plot(steps, smooth(values, 0.7), color="C0", label="reward, smoothed")
    means = dict.fromkeys(key for row in rows for key in row if re.fullmatch("rewards/.*/mean", key))
    for name in means if len(means) > 1 else ():
        panels[0].plot(*column(rows, name), lw=0.8, ls="--", label=name.split("/")[1])
    panels[0].legend()
    reference = any("kl" in row for row in rows)
    panels[1].plot(*column(rows, "kl" if reference else "logprob_difference/kl"), color="C2")
    panels[2].plot(*column(rows, "completions/mean_length"), color="C3", label="mean")
    panels[2].plot(*column(rows, "completions/max_length"), color="C3", lw=0.6, ls=":", label="longest")
    panels[2].legend()
    kinds = ("reward", "KL to the reference" if reference else "KL, engine to trainer", "completion length, tokens")
    _write(figure, kinds, title, path)


def _panels() -> tuple[Any, Any]:
    """Return a figure and three panels of it, one above the other, over the same steps.

    Uses matplotlib's objects alone: no window, no backend and no state shared with the user's own figures.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 9), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    panels[2].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure, panels


def _write(figure: Any, labels: Sequence[str], title: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from fastft.train.checkpoint import write_file

    for panel, label in zip(figure.axes, labels, strict=True):
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    figure.axes[-1].set_xlabel("step")
    figure.axes[0].set_title(title)
    canvas = FigureCanvasAgg(figure)
    write_file(path, lambda temporary: canvas.print_figure(str(temporary), format="png", dpi=110))
