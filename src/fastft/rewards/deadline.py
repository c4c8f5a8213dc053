"""A call that must end in time."""

import contextvars
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any


class Overdue(BaseException):
    """Raised within a call that takes too long; no Exception, so that handlers within the call do not swallow it."""


def within(seconds: float, function: Callable[[], Any]) -> Any:
    """Return `function()`; raise `Overdue` if it takes longer than `seconds`.

    In the main thread of a Unix process an alarm interrupts the function where it is: in Python code, in a regular
    expression, in a wait for a file, a socket, a lock or a process. A call into compiled code that neither returns nor
    asks for signals is interrupted when it returns, and a function that sets SIGALRM itself is not interrupted.
    Elsewhere the function runs in a thread; when it is late it is left behind, and goes on until the process ends.
    """
    if sys.platform != "win32" and threading.current_thread() is threading.main_thread():
        return _by_alarm(seconds, function)
    return _in_a_thread(seconds, function)


def _by_alarm(seconds: float, function: Callable[[], Any]) -> Any:
    def ring(number: int, frame: FrameType | None) -> None:
        raise Overdue

    started = time.monotonic()
    handler = signal.signal(signal.SIGALRM, ring)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    if 0 < left < seconds:  # somebody else's alarm, such as that of a call around this one, is due earlier
        signal.setitimer(signal.ITIMER_REAL, left)
    try:
        return function()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - started), 1e-3), interval)


def _in_a_thread(seconds: float, function: Callable[[], Any]) -> Any:
    results: list[Any] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(context.run(function))
        except BaseException as error:
            errors.append(error)

    context = contextvars.copy_context()
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise Overdue
    return results[0]
