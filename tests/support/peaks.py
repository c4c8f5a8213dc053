"""The peak memory of a piece of work, in a process of its own, where nothing that ran before can disturb it.

glibc adapts to what was freed before: it comes to serve blocks of up to 32 MB from its heap, and to keep up to 64 MB of
that heap or give them back. A peak then tells of the process's past: 4 MB to 64 MB for the same work. Here the limits
are fixed, so that every large block is the kernel's again once it is freed, and pages are small (a huge one counts 2 MB
for the first byte that is touched).
"""

import ctypes
import gc
import json
import os
import subprocess
import sys

import pytest

_ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
}
_PR_SET_THP_DISABLE = 41
needs_linux = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory cannot be reset here"
)


def run(script, *arguments):
    """Run a Python script with `arguments` and return what it printed last, read as JSON."""
    environment = {**os.environ, **_ALLOCATOR, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", f"import peaks\npeaks.use_small_pages()\n{script}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def use_small_pages():
    assert ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0, ctypes.get_errno()


def rise(work):
    """Return by how many bytes the process was larger, at most, while `work` ran than before. Only within `run`."""
    assert all(os.environ.get(name) == value for name, value in _ALLOCATOR.items())
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is what there is now
    before = _highest()
    work()
    return _highest() - before


def _highest():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
