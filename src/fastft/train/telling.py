"""What a run says on the terminal beside its bar: a line of each log, with numbers as numbers; and room for others."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer

from fastft.errors import short

Line = Callable[[int, Mapping[str, Any]], str]  # what is said of a step and the metrics that are logged with it


def log_line(step: int, logs: Mapping[str, Any]) -> str:
    """Return one line of the step and all its metrics, each number with four digits; what is of the run has no step."""
    metrics = str({name: _rounded(value) for name, value in logs.items() if name != "total_flos"})
    return metrics if "train_runtime" in logs else f"step {step:4d}  {metrics}"


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else short(value, 100)


class Progress(ProgressCallback):
    """transformers' bar, with our lines beside it where transformers' own would quote the numbers."""

    def __init__(self, line: Line) -> None:
        super().__init__()
        self.line = line

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write a line."""
        if state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.write(self.line(state.global_step, logs or {}))

    def close(self) -> None:
        """Close the bars of a run that was broken off, which would be drawn once more below its error."""
        for bar in (self.training_bar, self.prediction_bar):
            if bar is not None:
                bar.close()
        self.training_bar = self.prediction_bar = None


class Printer(PrinterCallback):
    """transformers' printing, of our lines."""

    def __init__(self, line: Line) -> None:
        self.line = line

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print a line."""
        if state.is_local_process_zero:
            print(self.line(state.global_step, logs or {}), flush=True)


def take_over(trainer: Trainer, line: Line) -> None:
    """Let a trainer say `line` instead of transformers'; a callback of the user's own is left as it is."""
    for plain, ours in ((ProgressCallback, Progress), (PrinterCallback, Printer)):
        for callback in list(trainer.callback_handler.callbacks):
            if type(callback) is plain:
                trainer.remove_callback(callback)
                trainer.add_callback(ours(line))


@contextmanager
def bars_aside(trainer: Trainer) -> Iterator[None]:
    """Take a trainer's bars from the screen while the block runs: what others print there begins a line of its own.

    tqdm's own way to do that would hold its lock meanwhile, for which a thread of the block might wait for ever.
    """
    shown = [one for one in trainer.callback_handler.callbacks if isinstance(one, ProgressCallback)]
    bars = [bar for one in shown for bar in (one.training_bar, one.prediction_bar) if bar is not None]
    for bar in bars:
        bar.clear()
    try:
        yield
    finally:
        for bar in bars:
            bar.refresh()


def close(trainer: Trainer) -> None:
    """Close the bars of a trainer that has ended, however it did."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, Progress):
            callback.close()
