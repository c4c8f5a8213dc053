"""The process's own peak of memory."""

import json
import subprocess
import sys

import pytest

CHILD = """
import json, resource
from fastft.memory.measure import host_peak
before = host_peak()
held = bytearray(b"x") * (64 << 20)
told = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps([before, host_peak(), told]))
"""
PARENT = f"""
import subprocess, sys
held = bytearray(b"x") * (1 << 30)
sys.exit(subprocess.run([sys.executable, "-c", {CHILD!r}]).returncode)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's own count begins with the parent's")
def test_a_peak_is_this_processs_and_not_that_of_the_one_that_started_it():
    done = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after, told = json.loads(done.stdout)
    assert before < 1 << 30 and after - before == pytest.approx(64 << 20, rel=0.1)
    assert told > 1 << 30
