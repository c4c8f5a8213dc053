"""What `fastft.compile` begins for Inductor: workers where Triton kernels will be compiled, and Triton's hash."""

import os
import subprocess
import sys

import torch
from tiny import make

import fastft
from fastft.graph import compile as compiling

SCRIPT = """
import sys, threading, torch
from fastft.graph.ahead import prepare_inductor
from torch._inductor.runtime.triton_compat import triton_key
prepare_inductor("aot_eager", torch.device("cuda"))
prepare_inductor("eager", torch.device("cuda"))
print(threading.active_count(), triton_key.cache_info().currsize)
prepare_inductor("inductor", torch.device("cpu"))
for thread in threading.enumerate():
    if thread is not threading.main_thread():
        thread.join()
print(triton_key.cache_info().currsize)
print("torch._inductor.async_compile" in sys.modules)
import torch._inductor.config as config
config.compile_threads = {threads}
for _ in range(2):
    prepare_inductor("inductor", torch.device("cuda"))
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


def test_triton_is_hashed_for_inductor_and_one_pool_started_on_a_gpu():
    assert told(threads=2) == ["1", "0", "1", "False", "1", "True"]


def test_a_user_who_wants_no_workers_gets_none():
    assert told(threads=1) == ["1", "0", "1", "False", "0"]


def test_compile_begins_it_for_its_backend_and_device(monkeypatch):
    asked = []
    monkeypatch.setattr(compiling, "prepare_inductor", lambda *given: asked.append(given))
    for backend in ("inductor", "aot_eager"):
        fastft.compile(make("llama", torch.float32, True), backend=backend)
    assert asked == [("inductor", torch.device("cpu")), ("aot_eager", torch.device("cpu"))]
