"""The process's own peak of memory."""

import json
import subprocess
import sys

import pytest
import torch
from tiny import in_nf4, with_lora
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fastft.graph.twin import tiny_model
from fastft.memory.measure import setup_of_model
from fastft.registry.resolve import find
from fastft.state import quant_of, update_state

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
    nf4 = with_lora(in_nf4(model), torch.bfloat16)
    update_state(nf4, quant=None)
    assert setup_of_model(nf4, spec).quant == "nf4"


def test_int8_is_seen_before_and_after_a_forward(tmp_path):
    """bitsandbytes takes the scales off the weights in the first one."""
    tiny_model("llama", dtype=torch.float32).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    spec = find(model.config)
    for _ in range(2):
        assert setup_of_model(model, spec).quant == quant_of(model) == "int8"
        with torch.no_grad():
            model(torch.tensor([[1, 2, 3]]))
