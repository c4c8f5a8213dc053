"""Inductor's workers are started by `fastft.compile`, where Triton kernels will be compiled and nowhere else."""

import os
import subprocess
import sys

import torch
from tiny import make

import fastft
from fastft.graph import compile as compiling

SCRIPT = """
import sys, torch
from fastft.graph.workers import start_workers
start_workers("inductor", torch.device("cpu"))
start_workers("aot_eager", torch.device("cuda"))
start_workers("eager", torch.device("cuda"))
print("torch._inductor.async_compile" in sys.modules)
import torch._inductor.config as config
config.compile_threads = {threads}
for _ in range(2):
    start_workers("inductor", torch.device("cuda"))
from torch._inductor.async_compile import AsyncCompile, _pool_set
print(len(_pool_set))
if _pool_set:
    AsyncCompile.wait_pool_ready()
    print(AsyncCompile.use_process_pool())
"""


def told(threads):
    given = {name: value for name, value in os.environ.items() if name != "TORCH_WARM_POOL"}
    command = [sys.executable, "-c", SCRIPT.format(threads=threads)]
    run = subprocess.run(command, capture_output=True, text=True, env=given)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def test_one_pool_is_started_for_inductor_on_a_gpu_alone():
    assert told(threads=2) == ["False", "1", "True"]


def test_a_user_who_wants_no_workers_gets_none():
    assert told(threads=1) == ["False", "0"]


def test_compile_starts_them_for_its_backend_and_device(monkeypatch):
    asked = []
    monkeypatch.setattr(compiling, "start_workers", lambda *given: asked.append(given))
    for backend in ("inductor", "aot_eager"):
        fastft.compile(make("llama", torch.float32, True), backend=backend)
    assert asked == [("inductor", torch.device("cpu")), ("aot_eager", torch.device("cpu"))]
