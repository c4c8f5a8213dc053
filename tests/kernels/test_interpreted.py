"""Runs the kernels' tests once more through Triton's interpreter, which needs no GPU.

TRITON_INTERPRET counts only if it is set before Triton is imported: hence a process of its own, one for many files.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastft.environment import triton_interpreted

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "src"

# Stride, dtype and size cases, and that the kernel ran; registration and compilation are tested in this process.
ELEMENTWISE = (
    "(against_fp64 or per_head or strides or packed or tables or far_from_zero or finite or transformers"
    " or runs_the_kernel) and not bfloat16"
)
# The settings of a head act on single logits in fp32, before any maximum is taken: that dtypes and orders are right is
# seen without any and with all of them, each one by itself in fp32 and in one order.
ONE_SETTING = "(scale or softcap or cool) and (fp16 or rising or falling)"
# Of each file, by pytest's -k. Nothing in bf16: the interpreter truncates where hardware rounds.
CHOSEN = {
    "elementwise": dict.fromkeys(("rms_norm", "layer_norm", "glu", "rope"), ELEMENTWISE),
    "matrices": {
        "linear_ce": "not (bf16 or inductor or autocast or fp32_gradients or summed_in_fp32 or on_a_gpu or compiles)",
        "linear_ce_fp8": "not (bf16 or bfloat16 or kept_out or on_a_gpu or opcheck)",
        "linear_logprob": "not (bf16 or autocast or fp32_gradients or on_a_gpu or compiles or a_tenth or held)"
        f" and not ((all_gradients or frozen_head or several_blocks) and {ONE_SETTING})",
        "nf4": "not (128x1031 or 300x640 or bf16 or gpu or random_bytes or compiles)",
        "lora_glu": "not (bf16 or compiles or fp32 or opcheck or large or told)",
        "lora": "not (bf16 or inductor or autocast or dense or single or fp16 or compiles)",
        # Its conversion makes a number of NaN.
        "fp8": "not (not_finite or bfloat16 or compiles or opcheck or equals or share or error_of or feed_forward)",
    },
}


@pytest.mark.skipif(torch.cuda.is_available() or triton_interpreted(), reason="the kernels run in this process")
@pytest.mark.parametrize("group", CHOSEN)
def test_again_in_the_interpreter(group):
    pytest.importorskip("triton")
    files = {f"test_{name}.py": chosen for name, chosen in CHOSEN[group].items()}
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    env |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env |= {"PYTHONPATH": os.pathsep.join([str(SOURCE), env.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "pytest", *(str(HERE / file) for file in files), "-p", "no:cacheprovider", "-vv"]
    expression = " or ".join(f"({file} and {chosen})" for file, chosen in files.items())
    done = subprocess.run(
        [*command, "-m", "not gpu", "-k", expression], env=env, capture_output=True, text=True, timeout=3600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for file in files:
        assert len(re.findall(rf"{file}::\S.* PASSED", done.stdout)) >= 15, done.stdout
    assert "skipped" not in done.stdout, done.stdout
