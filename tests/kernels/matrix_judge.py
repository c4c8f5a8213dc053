"""What the tests of the matrix kernels share: a judge of errors, and a second run in Triton's interpreter.

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
    """Return ||value - truth|| / ||truth|| in fp64; NaN counts as infinite."""
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


def rerun_interpreted(file, deselect, timeout=300):
    """Run the tests of `file` once more in a process with TRITON_INTERPRET=1, set before triton is imported.

    There the ops run their Triton kernels on the CPU. deselect: a pytest `-k` expression of what is left out, at
    least bf16, since the interpreter truncates where hardware rounds. Returns what pytest said last.
    """
    env = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", str(file), "-k", f"not ({deselect})"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout.strip().splitlines()[-1]
