"""Settings for every test: few threads, no network, a light heap, the same random numbers and signals in every run."""

import gc
import os
import random
import signal
import sys
from contextlib import suppress
from functools import partial

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

with suppress(ImportError):  # the environment with vLLM has no hypothesis
    from hypothesis import HealthCheck, settings

    # The same examples everywhere, however slow the machine: what fails here fails on every machine.
    settings.register_profile(
        "same", derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    settings.load_profile("same")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Start every test from the same random numbers, whichever ran before it in this process."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def ctrl_c():
    """Let Ctrl-C raise KeyboardInterrupt also where the tests were started with it ignored, as by `nohup` or `sh &`."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True, scope="module")
def light_heap():
    """Leave no compiled graphs to the next module, and keep what stays (imported code) out of the collector's sight.

    Trainers collect garbage often, and the collector looks at every object of the process each time. Within a module
    it looks for old garbage hardly ever: that took a seventh of the time of capturing graphs.
    """
    gc.set_threshold(20_000, 20, 20)
    gc.freeze()
    guards = sys.modules.get("torch._dynamo.guards")
    if hasattr(guards, "profile_guard_manager"):  # flushes the caches to time each new guard, for a log: 20 ms a graph
        guards.profile_guard_manager = lambda *_: 0.0
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
    gc.collect()


def pytest_unconfigure():
    """Let the interpreter take everything down at its end."""
    gc.unfreeze()


@pytest.fixture
def aot_eager(monkeypatch):
    """Have what compiles by default do so without Inductor, which is slow on a CPU."""
    import fastft.graph.compile as module

    monkeypatch.setattr(module, "compile", partial(module.compile, backend="aot_eager"))


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Fill what `torch.empty` and its kin return with NaN, so that a kernel that leaves a tail unwritten fails."""
    import torch

    def poison(make):
        def made(*args, **kwargs):
            out = make(*args, **kwargs)
            real = not isinstance(out, torch._subclasses.FakeTensor)
            return out.fill_(float("nan")) if real and out.is_floating_point() else out

        return made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
