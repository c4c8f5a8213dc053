"""Runs a Python program that nobody has read: limited in time, memory, files and processes, and cut off from the host.

On Linux the program gets namespaces of its own: no network, no processes but its own, no file that it could write but
those of an empty folder in memory, which goes when it ends. It may still read what the user may read outside of home
and temporary folders. Where a host forbids namespaces (many containers do), the limits of the kernel are all there is;
`missing` says what is then not kept from it.
"""

import json
import math
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Literal

from attrs import evolve, field, frozen, validators

from fastft.errors import Problem, UsageError

Isolation = Literal["full", "limits"]
_NOBODY = 65534
_GRACE = 5.0  # seconds for starting, and for ending what was killed
_positive = validators.gt(0)


@frozen
class Limits:
    """What a program may use.

    * `seconds`: of wall-clock time, for all its processes; each may use as many of the processor and one more.
    * `memory`: bytes of address space of each process.
    * `file_size`: bytes of all its files together (of each file where namespaces are missing).
    * `processes`: processes and threads at a time.
    * `output`: bytes of standard output, and of standard error; a program that writes more is ended.
    """

    seconds: float = field(default=10.0, validator=_positive)
    memory: int = field(default=1 << 30, validator=_positive)
    file_size: int = field(default=16 << 20, validator=_positive)
    processes: int = field(default=16, validator=_positive)
    output: int = field(default=64 << 10, validator=_positive)


@frozen
class Outcome:
    """How a program ended.

    `ended`: "exited" (`code` is its exit status), "signal" (`code` is the number of the signal), "time" or "output"
    (it went over that limit and was ended). `stdout` and `stderr` are cut at the limit; `seconds` is wall-clock time.
    """

    ended: Literal["exited", "signal", "time", "output"]
    code: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether it ended by itself with status 0."""
        return self.ended == "exited" and self.code == 0


@frozen
class _Way:
    """A way to run programs here: in namespaces or not, as which user (None: as this one), and what it lacks."""

    isolated: bool
    user: int | None
    missing: tuple[str, ...]


def run(files: Mapping[str, str], main: str, *, limits: Limits | None = None, isolation: Isolation = "full") -> Outcome:
    """Run the Python file `main` of `files` (name -> text) with this interpreter and its packages.

    Environment and standard input are empty, the working folder is new and holds `files` alone. With
    `isolation="limits"` it runs also where `missing()` names something.

    Raises `UsageError` where it cannot be isolated as asked, and OSError if it could not be started.
    """
    way = _way()
    if way is None:
        raise UsageError(
            Problem("isolation", sys.platform, "Linux", "Programs are run on Linux alone; run the training there.")
        )
    if isolation == "full" and way.missing:
        raise UsageError(
            Problem(
                "isolation",
                isolation,
                f"a host that can keep these from a program: {'; '.join(way.missing)}",
                "Allow unprivileged user namespaces on this host (or --cap-add SYS_ADMIN for a container), or say "
                "isolation='limits' if you accept that.",
            )
        )
    return _run(files, main, limits or Limits(), way)


def missing() -> tuple[str, ...]:
    """Return what cannot be kept from a program on this host; empty if all can."""
    way = _way()
    return ("everything: programs are run on Linux alone",) if way is None else way.missing


@cache
def _way() -> _Way | None:
    """Return the best way that works here, found by running an empty program; None where there is none."""
    if sys.platform != "linux":
        return None
    root = os.geteuid() == 0
    crowd = ("more processes than allowed (the number has no effect on root)",)
    open_host = ("the network", "files that this user may write", "other processes of this user")
    ways = [_Way(True, _NOBODY, ())] if root else [_Way(True, None, ())]
    ways += [_Way(False, _NOBODY, open_host)] if root else []
    ways += [_Way(False, None, (*open_host, *crowd) if root else open_host)]
    reasons = []
    for way in ways:
        try:
            if _run({"empty.py": "import json"}, "empty.py", Limits(), way).ok:
                reason = f"namespaces: {reasons[0]}" if reasons and not way.isolated else ""
                return evolve(way, missing=(*way.missing, reason)) if reason else way
            reasons.append("a Python program does not start in them")
        except OSError as error:
            reasons.append(str(error))
    return None


def _run(files: Mapping[str, str], main: str, limits: Limits, way: _Way) -> Outcome:
    folder = tempfile.mkdtemp(prefix="fastft-sandbox-")
    read, write = os.pipe()
    try:
        if way.user is not None:
            os.chown(folder, way.user, way.user)
        task = {
            "files": dict(files),
            "folder": folder,
            "isolated": way.isolated,
            "user": way.user,
            "report": write,
            "needed": _needed(),
            "arguments": [sys.executable, "-I", "-B", main],
            "limits": {
                "seconds": limits.seconds,
                "cpu_seconds": math.ceil(limits.seconds) + 1,
                "memory": limits.memory,
                "file_size": limits.file_size,
                "processes": limits.processes,
            },
        }
        started = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(Path(__file__).with_name("inside.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(write,),
            start_new_session=True,
            cwd="/",
            env={},
        )
        os.close(write)
        write = -1
        try:
            output, too_much = _attend(process, json.dumps(task).encode(), limits)
            report = _line(read)
        finally:
            _end(process)
        return _outcome(report, output, too_much, time.monotonic() - started, limits)
    finally:
        os.close(read)
        if write != -1:
            os.close(write)
        shutil.rmtree(folder, ignore_errors=True)


def _needed() -> list[str]:
    """Return the folders without which this interpreter does not start."""
    program = Path(sys.executable)
    folders = [Path(sys.base_prefix), Path(sys.prefix), program.parent, program.resolve().parent]
    return list(dict.fromkeys(str(path) for folder in folders for path in (folder, folder.resolve())))


def _attend(process: subprocess.Popen, task: bytes, limits: Limits) -> tuple[list[bytes], bool]:
    """Send the task, read both outputs until they end; return them, and whether one went over its limit."""
    assert process.stdin and process.stdout and process.stderr
    try:
        process.stdin.write(task)
        process.stdin.close()
    except BrokenPipeError:
        pass  # it ended already: its standard error says why
    streams = (process.stdout, process.stderr)
    parts: list[bytearray] = [bytearray(), bytearray()]
    too_much = False
    deadline = time.monotonic() + limits.seconds + _GRACE
    with selectors.DefaultSelector() as selector:
        for number, stream in enumerate(streams):
            selector.register(stream, selectors.EVENT_READ, number)
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                chunk = os.read(key.fd, 65536)
                if not chunk:
                    selector.unregister(key.fileobj)
                elif not too_much:
                    parts[key.data] += chunk
                    if len(parts[key.data]) > limits.output:
                        too_much = True
                        process.send_signal(signal.SIGTERM)
                        deadline = time.monotonic() + _GRACE
    return [bytes(part[: limits.output]) for part in parts], too_much


def _end(process: subprocess.Popen) -> None:
    """Wait for the keeper of the time, which ends all others first; end it by force if it does not end."""
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            try:
                stream.close()
            except BrokenPipeError:
                continue


def _line(read: int) -> str:
    """Return the first line that the keeper of the time reported, or an empty one after some seconds."""
    with selectors.DefaultSelector() as selector:
        selector.register(read, selectors.EVENT_READ)
        if not selector.select(_GRACE):
            return ""
    lines = os.read(read, 65536).decode(errors="replace").splitlines()
    return lines[0] if lines else ""


def _outcome(report: str, output: list[bytes], too_much: bool, seconds: float, limits: Limits) -> Outcome:
    kind, _, rest = report.partition(" ")
    stdout, stderr = (part.decode(errors="replace") for part in output)
    if kind == "failed":
        raise OSError(rest)
    if too_much:
        return Outcome("output", 0, stdout, stderr, seconds)
    if kind == "wait":
        code = os.waitstatus_to_exitcode(int(rest))
        return Outcome("exited" if code >= 0 else "signal", abs(code), stdout, stderr, seconds)
    if kind == "killed" or seconds >= limits.seconds:
        return Outcome("time", 0, stdout, stderr, seconds)
    raise OSError(f"the program's keeper ended without a word: {stderr.strip()[-500:]}")
