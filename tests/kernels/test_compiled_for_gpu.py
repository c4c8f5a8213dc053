"""Compiles the kernels for an sm_90 GPU, which needs none: they build, and load and store 16 bytes at a time."""

import re

import pytest

from fastft.environment import installed, triton_interpreted
from fastft.kernels.glu import launch as glu_launch
from fastft.kernels.layer_norm import launch as layer_norm_launch
from fastft.kernels.rms_norm import launch as rms_norm_launch
from fastft.kernels.rope import launch as rope_launch

pytestmark = pytest.mark.skipif(
    triton_interpreted() or not installed("triton"), reason="needs Triton's compiler, not its interpreter"
)
FLAT = ("x_d1", "x_d2", "dy_d1", "dy_d2")


def _ptx(module, kernel, warps, constants, kinds=(), ones=(), **options):
    """PTX of fastft.kernels.<module>.triton.<kernel> for 16-bit tensors, 16-byte aligned as torch's are.

    kinds: argument types other than bf16 pointers and 32-bit integers. ones: integers that are 1, which Triton folds.
    """
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fn = getattr(importlib.import_module(f"fastft.kernels.{module}.triton"), kernel)
    constants = {**constants, **{name: 1 for name in ones if name in fn.arg_names}}
    signature, attributes = {}, {}
    for index, name in enumerate(fn.arg_names):
        kind = "constexpr" if name in constants else dict(kinds).get(name, "*bf16" if name.endswith("_ptr") else "i32")
        signature[name] = kind
        if kind == "i32" or kind.startswith("*"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, **options})
    return compiled.asm["ptx"]


def _widths(ptx, operation):
    """Bits per thread of each global load (ld) or store (st)."""
    found = re.findall(rf"{operation}\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)", ptx)
    return [int(vector or 1) * int(bits) for vector, bits in found]


def _assert_16_bytes(ptx):
    assert _widths(ptx, "ld") and set(_widths(ptx, "ld")) == {128}
    assert _widths(ptx, "st") and set(_widths(ptx, "st")) == {128}


@pytest.mark.parametrize("width", [2304, 4096, 8192])
def test_rms_norm(width):
    cfg = rms_norm_launch.forward_launch(8192, width)
    common = {"OFFSET": 0.0, "WIDTH": width, "BLOCK": cfg.block, "ROWS": cfg.rows, "WIDE": False}
    kinds = {"eps": "fp32", "partial_ptr": "*fp32"}
    _assert_16_bytes(_ptx("rms_norm", "rms_norm_fwd_kernel", cfg.warps, {**common, "BEFORE": True}, kinds, FLAT))
    for need in (False, True):
        cfg = rms_norm_launch.backward_launch(8192, width, 132, need)
        constants = {**common, "NEED_WEIGHT": need, "ITERATIONS": cfg.iterations}
        _assert_16_bytes(_ptx("rms_norm", "rms_norm_bwd_kernel", cfg.warps, constants, kinds, FLAT))


def test_layer_norm():
    width = 4096
    cfg = layer_norm_launch.backward_launch(8192, width, 1, 132, True)
    common = {"HAS_WEIGHT": True, "HEADS": 1, "WIDTH": width, "BLOCK": cfg.block, "ROWS": cfg.rows, "WIDE": False}
    kinds = {"eps": "fp32", "dw_ptr": "*fp32", "db_ptr": "*fp32"}
    constants = {**common, "HAS_BIAS": True}
    _assert_16_bytes(_ptx("layer_norm", "layer_norm_fwd_kernel", cfg.warps, constants, kinds, FLAT))
    constants = {**common, "NEED_WEIGHT": True, "NEED_BIAS": True, "ITERATIONS": cfg.iterations}
    _assert_16_bytes(_ptx("layer_norm", "layer_norm_bwd_kernel", cfg.warps, constants, kinds, FLAT))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
def test_glu(activation):
    cfg = glu_launch.launch(8192, 14336)
    constants = {"WIDTH": 14336, "BLOCK": cfg.block, "ROWS": cfg.rows, "SEGMENTS": cfg.segments, "WIDE": False}
    for kernel in ("glu_fwd_kernel", "glu_bwd_kernel"):
        _assert_16_bytes(_ptx("glu", kernel, cfg.warps, {**constants, "ACTIVATION": activation}))


def _rope_ptx(interleaved, round_products):
    cfg = rope_launch.launch(8192 * 32, 8192 * 8, 64, 0)
    blocks = {"PAIRS": 64, "PASS": 0, "PAIRS_BLOCK": cfg.pairs_block, "PASS_BLOCK": cfg.pass_block, "ROWS": cfg.rows}
    flags = {"INTERLEAVED": interleaved, "INVERSE": False, "ROUND": round_products, "WIDE": False}
    constants = {"Q_HEADS": 32, "K_HEADS": 8, **blocks, **flags}
    return _ptx(
        "rope", "rope_kernel", cfg.warps, constants, ones=("cos_sd", "sin_sd"), enable_fp_fusion=rope_launch.FP_FUSION
    )


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(interleaved):
    _assert_16_bytes(_rope_ptx(interleaved, True))


@pytest.mark.parametrize("round_products", [False, True])
def test_the_compiler_rounds_each_product_of_a_rotation(round_products):
    ptx = _rope_ptx(False, round_products)
    assert re.search(r"\bmul\.", ptx) and not re.search(r"\bfma\.", ptx)
