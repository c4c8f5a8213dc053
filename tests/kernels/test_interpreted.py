"""Runs the elementwise kernels' tests once more through Triton's interpreter, which needs no GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "src"


# TRITON_INTERPRET counts only if it is set before Triton is imported: hence a process of its own.
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "glu", "rope"])
def test_kernels_in_the_interpreter(name):
    pytest.importorskip("triton")
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    env |= {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(SOURCE), env.get("PYTHONPATH", "")])}
    # Stride, dtype and size cases, and that the kernel ran; registration and compilation are tested in this process.
    chosen = "against_fp64 or per_head or strides or packed or tables or far_from_zero or finite or transformers"
    command = [sys.executable, "-m", "pytest", str(HERE / f"test_{name}.py"), "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-m", "not gpu", "-k", f"({chosen} or runs_the_kernel) and not bfloat16"],
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 15, done.stdout
    assert "skipped" not in done.stdout, done.stdout
