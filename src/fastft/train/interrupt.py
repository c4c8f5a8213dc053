"""Ctrl-C while a run trains: the first lets the step come to its end, has it saved and stops; the second stops at once.

What would raise KeyboardInterrupt is taken over: SIGINT where nobody else handles it, and SIGTERM where
`signal.signal(signal.SIGTERM, signal.default_int_handler)` has asked for the same.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from attrs import frozen
from tqdm.auto import tqdm
from transformers import TrainerCallback

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@frozen(kw_only=True)
class Stopped:
    """How far an interrupted run came: the argument of the `KeyboardInterrupt` that ends it.

    `steps` of `planned` are done. `checkpoint` is the last there is, None if there is none; `whole` says whether all of
    these steps are in it, `why` why they are not, `lacks` what keeps it from being gone on from. `failed`: what the
    step that was still to be finished failed with. `resume` goes on in Python.
    """

    steps: int
    planned: int
    checkpoint: Path | None
    whole: bool
    why: str
    failed: str
    resume: str
    lacks: str = ""

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
        if self.checkpoint is not None and (self.lacks or (self.whole and self.steps == self.planned)):
            parts.append(f"fastft.load({str(self.checkpoint)!r}) loads {'it' if self.whole else 'the last checkpoint'}")
            parts += [f"it cannot be gone on from: {self.lacks}"] if self.lacks else []
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
    failed with that was to be finished. `begun` and `over`: the training has, and what follows it is not interrupted by
    the first signal.
    """

    def __init__(self) -> None:
        self.asked = self.at_once = self.begun = self.over = self._left = False
        self.failed = ""
        self._process = 0

    @property
    def waits(self) -> bool:
        """Say whether the run was to end with a whole step."""
        return self.asked and not self.at_once

    @contextlib.contextmanager
    def watched(self, alone: bool, let_go: Callable[[Exception], None]) -> Iterator[None]:
        """Handle the signals while the block runs; raise `KeyboardInterrupt` at its end where one has come.

        Only in the main thread, and only where the process trains `alone`: of several, each would stop at another step.
        `let_go` frees what a step held that failed.
        """
        self.asked = self.at_once = self.begun = self.over = self._left = False
        self.failed, self._process = "", os.getpid()
        mine = alone and threading.current_thread() is threading.main_thread()
        taken = [number for number in SIGNALS if mine and signal.getsignal(number) is signal.default_int_handler]
        for number in taken:
            signal.signal(number, self._ring)
        try:
            yield
        except Exception as error:
            # Ctrl-C reaches what the run has started, too: a compiler or a server that dies of it fails the step.
            if not self.asked or self.over:
                raise
            self.failed = f"{type(error).__name__}: {error}"  # the error itself would keep what the step held
            let_go(error)
        finally:
            self._left = True
            for number in taken:
                signal.signal(number, signal.default_int_handler)
        if self.asked and not self.over:
            raise KeyboardInterrupt

    def _ring(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:
            _ring_in_child(number)
        elif self._left:  # while the handlers are put back, which may not have reached this one
            signal.signal(number, signal.default_int_handler)
            raise KeyboardInterrupt
        elif self.asked:
            self.at_once = True
            raise KeyboardInterrupt
        else:
            self.asked = True
            if self.over:
                return
            with contextlib.suppress(RuntimeError):  # the signal came while something else was printing
                tqdm.write("fastft: stops when this step is done and saved; Ctrl-C again stops at once")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that the callbacks have begun what they are to end."""
        self.begun = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have the step saved."""
        control.should_save |= self.asked

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have the step saved behind which an evaluation was interrupted."""
        control.should_save |= self.asked

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop."""
        if self.asked:
            raise KeyboardInterrupt

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Note that all steps are done: the log of the whole training comes before the best weights are loaded."""
        self.over |= "train_runtime" in (logs or {})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that the run is done."""
        self.over = True


def _ring_in_child(number: int) -> None:
    """Take a signal in a process that was forked while a run was watched.

    A worker that reads data goes on at Ctrl-C until the step is done; who ends it by SIGTERM waits for its end.
    """
    if number == signal.SIGTERM:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
