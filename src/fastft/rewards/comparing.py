"""Run in the sandbox by `expressions.py`: compares pairs of expressions, each in a process with a deadline."""

import json
import os
import signal
import sys
import time

from math_verify import parse, verify

_VERDICTS = {0: "equal", 1: "different", 2: "unreadable"}


def judge(right: str, answer: str) -> int:
    """Return 0 if the answer equals what is right, 1 if it does not, and 2 if what is right cannot be read."""
    wanted = parse(right, parsing_timeout=None)
    if not wanted:
        return 2
    return 0 if verify(wanted, parse(answer, parsing_timeout=None), timeout_seconds=None) else 1


def in_child(right: str, answer: str, seconds: float) -> str:
    """Return the verdict of a process that is killed after `seconds`; "lost" if it is, or dies otherwise."""
    child = os.fork()
    if not child:
        code = 3
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        try:
            code = judge(right, answer)
        finally:
            os._exit(code)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return _VERDICTS.get(os.waitstatus_to_exitcode(status), "lost")
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "lost"


if __name__ == "__main__":
    with open("pairs.json", encoding="utf-8") as file:
        task = json.load(file)
    for pair in task["pairs"]:
        sys.stdout.write(in_child(*pair, task["seconds"]) + "\n")
        sys.stdout.flush()
