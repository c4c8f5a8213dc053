"""The process's own peak of memory."""

import json
import subprocess
import sys

import pytest
import torch
from tiny import in_nf4, with_lora

from fastft.graph.twin import tiny_model
from fastft.memory.measure import setup_of_model
from fastft.registry.resolve import find

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


def test_the_quantisation_of_a_model_that_fastft_did_not_load_is_seen():
    model = tiny_model("llama", dtype=torch.bfloat16)
    spec = find(model.config)
    assert setup_of_model(model, spec).quant is None
    assert setup_of_model(with_lora(in_nf4(model), torch.bfloat16), spec).quant == "nf4"
