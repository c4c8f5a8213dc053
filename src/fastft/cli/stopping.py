"""How a command that trains is stopped: by Ctrl-C or SIGTERM, with one line on how to go on, and exit code 130."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import typer

INTERRUPTED = 130


@contextmanager
def stoppable(resume: str) -> Iterator[None]:
    """Let SIGTERM stop the block as Ctrl-C does; after either say how far it came, and that `resume` goes on."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if main else None
    try:
        yield
    except KeyboardInterrupt as error:
        print(f"fastft: {_told(error, resume)}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _told(error: KeyboardInterrupt, resume: str) -> str:
    if not error.args:  # it came before or after the training
        return "stopped"
    from fastft.train.interrupt import Stopped

    stopped = error.args[0]
    return stopped.told(resume) if isinstance(stopped, Stopped) else "stopped"
