"""Ctrl-C while a run trains: the first lets the step come to its end, has it saved and stops; the second stops at once.

What would raise KeyboardInterrupt is taken over: SIGINT where nobody else handles it, and SIGTERM where
`signal.signal(signal.SIGTERM, signal.default_int_handler)` has asked for the same.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attrs import frozen
from tqdm.auto import tqdm
from transformers import TrainerCallback

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@frozen(kw_only=True)
class Stopped:
    """How far an interrupted run came: the argument of the `KeyboardInterrupt` that ends it.

    `steps` of `planned` are done. `checkpoint` is what can be gone on from, None if there is nothing; `whole` says
    whether all of these steps are in it, `why` why they are not. `failed`: what the step that was still to be finished
    failed with. `resume` goes on in Python.
    """

    steps: int
    planned: int
    checkpoint: Path | None
    whole: bool
    why: str
    failed: str
    resume: str

    def told(self, resume: str) -> str:
        """Return it in a line, in which `resume` is what goes on."""
        done = f"stopped after step {self.steps} of {self.planned}" if self.steps else "stopped before the first step"
        parts = [f"{done} was done" if not self.steps else done]
        if self.whole:
            parts.append(f"saved in {self.checkpoint}")
        elif self.steps:
            parts.append(f"not saved: {self.why}")
        if self.failed:
            parts.append(f"the step that was to be finished failed ({self.failed.splitlines()[0]})")
        if self.whole and self.steps == self.planned:
            parts.append(f"fastft.load({str(self.checkpoint)!r}) loads it")
        elif self.checkpoint is not None:
            parts.append(f"{resume} goes on from {'there' if self.whole else self.checkpoint}")
        else:
            parts.append("there is no checkpoint to go on from")
        return "; ".join(parts)

    def __str__(self) -> str:
        return self.told(self.resume)


class Interruption(TrainerCallback):
    """Handles Ctrl-C for one trainer.

    `asked`: a signal has come. `at_once`: a second one has, and no step is to be waited for. `failed`: what a step
    failed with that was to be finished.
    """

    def __init__(self) -> None:
        self.asked = self.at_once = False
        self.failed: Exception | None = None
        self._process = 0

    @property
    def waits(self) -> bool:
        """Say whether the run was to end with a whole step."""
        return self.asked and not self.at_once

    @contextlib.contextmanager
    def watched(self, alone: bool) -> Iterator[None]:
        """Handle the signals while the block runs; raise `KeyboardInterrupt` at its end where one has come.

        Only in the main thread, and only where the process trains `alone`: of several, each would stop at another step.
        """
        self.asked, self.at_once, self.failed, self._process = False, False, None, os.getpid()
        mine = alone and threading.current_thread() is threading.main_thread()
        taken = [number for number in SIGNALS if mine and signal.getsignal(number) is signal.default_int_handler]
        for number in taken:
            signal.signal(number, self._ring)
        try:
            yield
        except Exception as error:
            # Ctrl-C reaches what the run has started, too: a compiler or a server that dies of it fails the step.
            if not self.asked:
                raise
            self.failed = error
        finally:
            for number in taken:
                signal.signal(number, signal.default_int_handler)
        if self.asked:
            raise KeyboardInterrupt

    def _ring(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a worker that reads data goes on until the step is done
            return
        if self.asked:
            self.at_once = True
            raise KeyboardInterrupt
        self.asked = True
        with contextlib.suppress(RuntimeError):  # the signal came while something else was printing
            tqdm.write("fastft: stops when this step is done and saved; Ctrl-C again stops at once")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have the step logged and saved."""
        if self.asked:
            control.should_save = True
            control.should_log |= args.logging_strategy != "no"

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have the step saved behind which an evaluation was interrupted."""
        control.should_save |= self.asked

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop."""
        if self.asked:
            raise KeyboardInterrupt
