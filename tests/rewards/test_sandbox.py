"""Programs that misbehave in every way that was thought of: each ends in time, and nothing of it is left."""

import gc
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from fastft.errors import UsageError
from fastft.rewards import sandbox
from fastft.rewards.sandbox import Limits, missing

FULL = "namespaces"
BARE = sandbox._Way(False, None, ("everything",))
WAYS = [FULL, "limits alone"]
SHORT = Limits(seconds=1.0)


@pytest.fixture(params=WAYS)
def run(request):
    """Run a program in each way; in the full one only where this host can."""
    return full() if request.param == FULL else lambda text, limits=None: bare(text, limits or Limits())


def full():
    if missing():
        pytest.skip(f"this host cannot keep from a program: {'; '.join(missing())}")
    return lambda text, limits=None: sandbox.run({"program.py": text}, "program.py", limits=limits)


def bare(text, limits):
    return sandbox._run({"program.py": text}, "program.py", limits, BARE)


def processes_with(mark):
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(path)
        except OSError:
            continue
    return found


def test_a_program_has_nothing_but_its_files(run):
    seen = run("import os, sys\nprint(sorted(os.listdir('.')), repr(sys.stdin.read()), sorted(os.environ))")
    assert seen.ok, seen.stderr
    assert seen.stdout == "['program.py'] '' ['LC_CTYPE']\n"  # which Python sets by itself


def test_how_it_ended(run):
    assert (run("raise SystemExit(3)").ended, run("raise SystemExit(3)").code) == ("exited", 3)
    killed = run("import os\nos.kill(os.getpid(), 9)")
    assert (killed.ended, killed.code, killed.ok) == ("signal", 9, False)
    assert "ZeroDivisionError" in run("1/0").stderr


@pytest.mark.parametrize(
    "text",
    [
        "while True: pass",
        "import time\ntime.sleep(600)",
        "import signal, time\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 64))\ntime.sleep(600)",
        "9 ** 9 ** 9",  # one long call that never looks up
    ],
    ids=["loop", "sleep", "signals blocked", "one call"],
)
def test_time(text, run):
    started = time.monotonic()
    assert run(text, SHORT).ended == "time"
    assert time.monotonic() - started < 120


def test_children_that_leave_the_session_die_too(run):
    mark = f"mark_{os.getpid()}_{time.monotonic_ns()}"
    text = (
        "import os, subprocess, sys\n"
        f"subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)  # {mark}'], start_new_session=True)\n"
        "open('started', 'w').close()\n"
    )
    before = time.monotonic()
    ended = run(text)
    assert ended.ok, ended.stderr
    assert time.monotonic() - before < 120
    assert processes_with(mark) == []


def test_deep_recursion_and_a_crash(run):
    assert "RecursionError" in run("def f(): f()\nf()").stderr
    crashed = run("import ctypes\nctypes.string_at(0)")
    assert (crashed.ended, crashed.code) == ("signal", 11)


def test_memory(run):
    assert "MemoryError" in run("x = bytearray(2 << 30)").stderr
    assert "MemoryError" in run("x = []\nwhile True: x.append(bytearray(1 << 24))").stderr


def test_output_is_bounded(run):
    started = time.monotonic()
    for stream in ("stdout", "stderr"):
        ended = run(f"import sys\nwhile True: sys.{stream}.write('x' * 1000)", Limits(output=5000))
        assert ended.ended == "output" and getattr(ended, stream) == "x" * 5000
    assert time.monotonic() - started < 120


def test_a_large_file(run):
    ended = run("open('f', 'wb').write(b'x' * (9 << 20))", Limits(file_size=8 << 20))
    assert ended.code == 1 and ("No space left" in ended.stderr or "File too large" in ended.stderr)


def test_many_files_count_together():
    text = "for n in range(9): open(f'f{n}', 'wb').write(b'x' * (1 << 20))"
    assert "No space left" in full()(text, Limits(file_size=8 << 20)).stderr


def test_a_fork_bomb():
    started = time.monotonic()
    counted = full()(
        "import os, time\nn = 0\ntry:\n  while True:\n    if not os.fork(): time.sleep(600)\n    n += 1\n"
        "except OSError as error: print(n, error.errno)",
        Limits(processes=8),
    )
    assert counted.stdout == "7 11\n"  # EAGAIN; itself is the eighth
    bomb = full()("import os\nwhile True:\n  try: os.fork()\n  except OSError: pass", Limits(seconds=1, processes=8))
    assert bomb.ended == "time"
    assert time.monotonic() - started < 120


def test_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        text = f"import socket\nsocket.create_connection({address!r}, 2)"
        assert "OSError" in full()(text).stderr or "ConnectionRefused" in full()(text).stderr
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()


def test_nothing_of_the_host_is_writable_and_its_processes_are_out_of_sight(tmp_path):
    (tmp_path / "mine").write_text("kept")
    tried = (
        "import os\n"
        f"for path in ({str(tmp_path / 'mine')!r}, {str(Path(sandbox.__file__))!r}, '/etc/passwd', '/dev/shm/x'):\n"
        "  try: open(path, 'a').write('x'); print('wrote', path)\n"
        "  except OSError: pass\n"
        f"print(os.listdir('/proc'), os.path.exists({str(tmp_path)!r}))\n"
        f"try: os.kill({os.getpid()}, 0); print('saw it')\nexcept ProcessLookupError: pass"
    )
    assert full()(tried).stdout == "[] False\n"
    assert (tmp_path / "mine").read_text() == "kept"


def test_no_power_is_left_to_undo_it():
    ended = full()(
        "import ctypes, os\nlibc = ctypes.CDLL(None)\n"
        "print(libc.umount2(b'/proc', 2), libc.mount(b'x', b'/proc', b'proc', 0, None), os.getuid())\n"
        "print(libc.unshare(0x10000000 | 0x20000) and 0, libc.umount2(b'/proc', 2))\n"  # more namespaces of its own
        "print(libc.mount(None, b'/', None, 0x1000 | 0x20, None))"  # make everything writable again
    )
    assert ended.stdout == "-1 -1 65534\n0 -1\n-1\n"


@pytest.fixture
def temporary(monkeypatch):
    """A folder for temporary files that no other process puts any into, and that every user may enter."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def test_nothing_is_left_behind(run, temporary, monkeypatch):
    made = []
    monkeypatch.setattr(
        sandbox.tempfile, "mkdtemp", lambda make=tempfile.mkdtemp, **how: made.append(make(**how)) or made[-1]
    )
    gc.collect()  # closes what earlier tests left open, which would change the count
    before = len(os.listdir("/proc/self/fd"))
    run("open('x', 'w').write('y')")
    run("while True: pass", Limits(seconds=0.5))
    assert len(made) == 2 and {Path(folder).parent for folder in made} == {temporary}
    assert list(temporary.iterdir()) == [] and len(os.listdir("/proc/self/fd")) == before


def test_texts_that_are_no_programs(run):
    for text in ("\ud800", "\0", "(" * 10_000):
        assert (run(text).ended, run(text).code) == ("exited", 1)


def test_where_programs_cannot_be_isolated(monkeypatch):
    monkeypatch.setattr(sandbox, "_way", lambda: sandbox._Way(False, None, ("the network",)))
    with pytest.raises(UsageError, match=r"the network.*isolation='limits'"):
        sandbox.run({"a.py": "print(1)"}, "a.py")
    assert sandbox.run({"a.py": "print(1)"}, "a.py", isolation="limits").stdout == "1\n"
    monkeypatch.setattr(sandbox, "_way", lambda: None)
    with pytest.raises(UsageError, match="Linux"):
        sandbox.run({"a.py": ""}, "a.py", isolation="limits")


def test_what_is_missing_is_found_by_trying(monkeypatch):
    def denied(files, main, limits, way):
        if way.isolated:
            raise OSError("unshare: Operation not permitted")
        return sandbox.Outcome("exited", 0, "", "", 0.0)

    monkeypatch.setattr(sandbox, "_run", denied)
    found = sandbox._way.__wrapped__()
    assert not found.isolated
    assert {"the network", "namespaces: unshare: Operation not permitted"} <= set(found.missing)


def test_it_needs_no_torch():
    code = "import sys, fastft\nfastft.rewards.number\nassert not {'torch', 'trl', 'sympy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
