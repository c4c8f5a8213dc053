"""Run by `sandbox.py` as a program of its own: gives away what it may do, then becomes the program that is asked for.

Three processes: this one keeps the time; its child is process 1 of a namespace, with which all others in it die; the
child's child is the program. Reads one JSON object from its standard input, and writes one line to the descriptor
that is named there: `wait STATUS`, `killed WHY`, or `failed WHY`.
"""

import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from types import FrameType

_NEW_USER = 0x10000000
_NEW_REST = 0x40000000 | 0x20000000 | 0x00020000 | 0x08000000 | 0x04000000  # network, processes, mounts, ipc, host name
_PRIVATE, _RECURSIVE, _BIND = 0x40000, 0x4000, 0x1000
_NOSUID_NODEV = 0x2 | 0x4
_MOUNT_SETATTR, _AT_RECURSIVE, _READ_ONLY = 442, 0x8000, 0x1
_DEATH_SIGNAL, _SUBREAPER, _NO_NEW_PRIVILEGES = 1, 36, 38
_NOBODY = 65534
_HIDDEN = ("/run", "/tmp", "/var/tmp", "/dev/shm", "/home", "/root", "/mnt", "/media", "/srv", "/proc")

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> None:
    """Call a function of the C library; a result below 0 is an OSError that names it."""
    if getattr(_libc, name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _become(user: int) -> None:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def _leave_the_host(folder: str, size: int, needed: list[str], user: int | None) -> None:
    """Enter namespaces without network, other processes, or writable files; `folder` is new memory of `size` bytes.

    Root does so by its own power and becomes `user` then; any other user by a user namespace, which comes first.
    """
    if user is None:
        own = {"setgroups": "deny", "uid_map": f"{_NOBODY} {os.geteuid()} 1", "gid_map": f"{_NOBODY} {os.getegid()} 1"}
        _call("unshare", _NEW_USER | _NEW_REST)
        # An inner user other than 0 loses every capability once the program starts.
        for name, text in own.items():
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    else:
        _call("unshare", _NEW_REST)
    _call("mount", b"none", b"/", None, _PRIVATE | _RECURSIVE, None)
    _hide(needed)
    os.makedirs(folder, exist_ok=True)
    attributes = (ctypes.c_uint64 * 4)(_READ_ONLY, 0, 0, 0)
    _call("syscall", _MOUNT_SETATTR, -100, b"/", _AT_RECURSIVE, ctypes.byref(attributes), ctypes.sizeof(attributes))
    _mount_memory(folder, size, 700)
    if user is not None:
        _become(user)
        _call("unshare", _NEW_USER)  # processes are counted for each user namespace


def _hide(needed: list[str]) -> None:
    """Put empty folders where people and other programs keep their files, and lay `needed` folders back into them."""
    kept = {path: os.open(path, os.O_PATH) for path in needed if path.startswith(tuple(f"{top}/" for top in _HIDDEN))}
    for hidden in filter(os.path.isdir, _HIDDEN[:-1]):
        _mount_memory(hidden, 65536, 755)
    for path, descriptor in kept.items():
        os.makedirs(path, exist_ok=True)
        _call("mount", f"/proc/self/fd/{descriptor}".encode(), path.encode(), None, _BIND | _RECURSIVE, None)
        os.close(descriptor)
    _mount_memory(_HIDDEN[-1], 65536, 755)  # /proc, which was needed until now


def _mount_memory(folder: str, size: int, mode: int) -> None:
    options = f"size={size},mode={mode},uid={_NOBODY},gid={_NOBODY}"
    _call("mount", b"tmpfs", folder.encode(), b"tmpfs", _NOSUID_NODEV, options.encode())


def _limit(limits: dict[str, int], processes: int) -> None:
    wanted = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: limits["cpu_seconds"],
        resource.RLIMIT_FSIZE: limits["file_size"],
        resource.RLIMIT_AS: limits["memory"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: processes,
    }
    for kind, value in wanted.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def _threads_of(user: int) -> int:
    """Return how many threads of all processes belong to `user`, which is what the limit of processes counts."""
    found = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{name}").st_uid == user:
                found += len(os.listdir(f"/proc/{name}/task"))
        except OSError:
            continue  # it ended meanwhile
    return found


def _parents() -> Iterator[tuple[int, int]]:
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                yield int(name), int(file.read().rpartition(b")")[2].split()[1])
        except OSError:
            continue


def _kill_descendants() -> None:
    """Kill all that come from this process; it inherits orphans, so none is out of reach."""
    for _ in range(200):
        family = {os.getpid()}
        parents = dict(_parents())
        while more := {pid for pid, parent in parents.items() if parent in family} - family:
            family |= more
        if len(family) == 1:
            return
        for pid in family - {os.getpid()}:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                continue
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return


def _start(task: dict, report: int) -> int:
    """Fork the program, and where there are namespaces process 1 above it; return the child of this process."""
    isolated = task["isolated"]
    child = os.fork()
    if child:
        return child
    _call("prctl", _DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if isolated:
        for number in (signal.SIGALRM, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        program = os.fork()
        if program:
            while True:
                pid, status = os.wait()
                if pid == program:
                    _say(report, f"wait {status}")
                    os._exit(0)
    try:
        for number in (signal.SIGALRM, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        _call("prctl", _NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        # Namespaces count their own: this process's two ancestors and what the program may have.
        processes = task["limits"]["processes"] + (2 if isolated else _threads_of(os.geteuid()))
        os.chdir(task["folder"])
        _limit(task["limits"], processes)
        os.execve(task["arguments"][0], task["arguments"], {})
    except BaseException as error:
        _say(report, f"failed {error}")
    os._exit(127)


def _say(report: int, line: str) -> None:
    os.write(report, (line.replace("\n", " ") + "\n").encode())


def main() -> None:
    """Do what standard input says."""
    task = json.load(sys.stdin)
    report = task["report"]
    os.set_inheritable(report, False)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    try:
        if task["isolated"]:
            _leave_the_host(task["folder"], task["limits"]["file_size"], task["needed"], task["user"])
        else:
            if task["user"] is not None:
                _become(task["user"])
            _call("prctl", _SUBREAPER, 1, 0, 0, 0)
        for name, text in task["files"].items():
            with open(os.path.join(task["folder"], name), "x", encoding="utf-8", errors="surrogatepass") as file:
                file.write(text)
    except (OSError, OverflowError) as error:
        _say(report, f"failed {error}")
        return
    child = 0
    why = ""

    def stop(number: int, _: FrameType | None) -> None:
        nonlocal why
        why = why or ("time" if number == signal.SIGALRM else "asked")
        if child:
            os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGALRM, stop)
    signal.signal(signal.SIGTERM, stop)
    signal.setitimer(signal.ITIMER_REAL, task["limits"]["seconds"])
    child = _start(task, report)
    if why:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not task["isolated"]:
        _kill_descendants()
        if not why:
            _say(report, f"wait {status}")
    if why:
        _say(report, f"killed {why}")


if __name__ == "__main__":
    main()
