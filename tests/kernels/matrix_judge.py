"""What the tests of the matrix kernels share: a judge of errors, and a runner for Triton's interpreter.

Loaded by path (`importlib`), since test folders are no packages.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).parents[2]


def rms_ratio(value, truth):
    """Return ||value - truth|| / ||truth|| in fp64; NaN and infinity count as infinite, absence of truth as absolute."""
    value, truth = value.detach().double(), truth.detach().double()
    assert value.shape == truth.shape, (value.shape, truth.shape)
    error, size = (value - truth).norm().item(), truth.norm().item()
    ratio = error / size if size else error
    return ratio if ratio == ratio else float("inf")


def assert_within(name, value, eager, truth, slack=1.0, floor=0.0):
    """Fail unless the error of `value` against `truth` is at most that of `eager`, the same dtype by plain torch.

    slack: a factor on that budget, for sums that a fused op makes in another order. floor: the least budget, for
    cases in which eager happens to be exact.
    """
    got, budget = rms_ratio(value, truth), max(slack * rms_ratio(eager, truth), floor)
    assert got <= budget, f"{name}: error {got:.3e} exceeds {budget:.3e}"


def run_interpreted(body, *arguments, timeout=300):
    """Run Python source in a process of its own with TRITON_INTERPRET=1, which must be set before triton is imported."""
    env = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests" / "kernels"), env.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", body, *map(str, arguments)], env=env, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout
