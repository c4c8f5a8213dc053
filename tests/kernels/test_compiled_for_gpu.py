"""Compiles the kernels for an sm_90 GPU, which needs none: they build, and load and store 16 bytes at a time."""

import re

import pytest

from fastft.environment import installed, triton_interpreted
from fastft.kernels.glu import launch as glu_launch
from fastft.kernels.layer_norm import launch as layer_norm_launch
from fastft.kernels.linear_ce import launch as linear_ce_launch
from fastft.kernels.linear_logprob import launch as linear_logprob_launch
from fastft.kernels.lora_glu import launch as lora_glu_launch
from fastft.kernels.rms_norm import launch as rms_norm_launch
from fastft.kernels.rope import launch as rope_launch

pytestmark = pytest.mark.skipif(
    triton_interpreted() or not installed("triton"), reason="needs Triton's compiler, not its interpreter"
)
FLAT = ("x_d1", "x_d2", "dy_d1", "dy_d2")


def _ptx(*arguments, **options):
    return _compiled(*arguments, **options).asm["ptx"]


def _compiled(module, kernel, warps, constants, kinds=(), ones=(), **options):
    """Compile fastft.kernels.<module>.triton.<kernel> for 16-bit tensors, 16-byte aligned as torch's are.

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
        if (kind == "i32" and not fn.params[index].do_not_specialize) or kind.startswith("*"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, **options})


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


@pytest.mark.parametrize("rank", [16, 32])
@pytest.mark.parametrize(("activation", "eight"), [("silu", False), ("gelu_tanh", False), ("silu", True)])
def test_lora_glu(rank, activation, eight):
    """Two programs or three find room on a multiprocessor, and an activation takes no division and no slow exp."""
    kinds = dict.fromkeys(("ha_ptr", "dxa_ptr", "db_gate_ptr", "db_up_ptr", "da_down_ptr"), "*fp32")
    kinds |= {"scale_gate": "fp32", "scale_up": "fp32"}
    of_eight = {False: ("q_ptr", "scale_ptr"), True: ("gate_ptr", "up_ptr")}
    for kernel, backward in (("lora_glu_fwd_kernel", False), ("lora_glu_bwd_kernel", True)):
        cfg = lora_glu_launch.launch(16384, 14336, 132, rank, backward)
        names = ("R_GATE", "R_UP", "R_DOWN", "P_GATE", "P_UP", "P_DOWN")
        constants = {"ACTIVATION": activation, "WIDTH": 14336, **dict.fromkeys(names, rank), "ROWS": cfg.rows}
        constants |= {"COLUMNS": cfg.columns, "STAGES": cfg.stages, "EVEN": True, "EIGHT": eight}
        own = dict(zip(of_eight[backward], ("*u8", "*fp32"))) if eight else {}
        limit = {"maxnreg": cfg.registers} if cfg.registers else {}
        made = _compiled("lora_glu", kernel, cfg.warps, constants, kinds | own, **limit)
        ptx = made.asm["ptx"]
        assert bool(limit) == (rank == 16 and not backward)
        programs = 3 if limit else 2
        assert programs * made.metadata.shared <= 226 * 1024
        assert not limit or f".maxnreg {65536 // (programs * 32 * cfg.warps) // 8 * 8}" in ptx
        assert ptx.count("ex2.approx.ftz") >= cfg.rows * cfg.columns // (32 * cfg.warps)
        assert "ex2.approx.f32" not in ptx and ptx.count("div.full") <= (8 if eight and not backward else 0)
        assert "cvt.rn.f32.s" not in ptx and "cvt.rn.f32.u" not in ptx  # numbers in 8 bits are made of their bits


@pytest.mark.parametrize("backward", [False, True])
def test_one_lora_glu_serves_all_lengths(backward):
    """What a proof of 4,096 tokens ran is what a step of 16,384 runs: nothing that is compiled in knows the rows."""
    from fastft.kernels.lora_glu.triton import _constants, lora_glu_bwd_kernel, lora_glu_fwd_kernel

    launches = [lora_glu_launch.launch(rows, 14336, 132, 16, backward) for rows in (1024, 4096, 16384)]
    assert [launch.splits for launch in launches] == [56, 32, 8]
    first, *others = (_constants(14336, (16, 16, 16), "silu", launch, False) for launch in launches)
    assert all(other == first for other in others)
    (splits,) = (p for p in (lora_glu_fwd_kernel, lora_glu_bwd_kernel)[backward].params if p.name == "splits")
    assert splits.do_not_specialize and not splits.is_constexpr


@pytest.mark.parametrize("fp8", [False, True], ids=["", "fp8"])
def test_cross_entropy(fp8):
    """Neither loop over the logits divides, and their exponentials have no care for denormal numbers."""
    cfg = linear_ce_launch.heuristic(128256)
    floats = ("losses", "factor", "quantized_scale", "slopes")
    kinds = {**dict.fromkeys(floats, "*fp32"), **dict.fromkeys(("scale", "softcap", "smoothing"), "fp32")}
    kinds |= {"logits": "*bf16", "labels": "*i64", "quantized": "*fp8e4nv"}
    constants = {"VOCAB": 128256, "SOFTCAP": False, "SMOOTHING": False, "GRADIENT": True, "FP8": fp8}
    ptx = _ptx("linear_ce", "cross_entropy_kernel", cfg.num_warps, {**constants, "BLOCK": cfg.block}, kinds)
    assert ptx.count("div.full") <= 1 and "ex2.approx.f32" not in ptx and ".local" not in ptx
    assert ptx.count("ex2.approx.ftz") >= 2 * cfg.block // (32 * cfg.num_warps)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(interleaved):
    _assert_16_bytes(_rope_ptx(interleaved, True))


@pytest.mark.parametrize("round_products", [False, True])
def test_the_compiler_rounds_each_product_of_a_rotation(round_products):
    ptx = _rope_ptx(False, round_products)
    assert re.search(r"\bmul\.", ptx) and not re.search(r"\bfma\.", ptx)


@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize("vocab", [128256, 262144])
def test_linear_logprob(vocab, entropy):
    """Logits are read and written 16 bytes at a time, and nothing spills."""
    cfg = linear_logprob_launch.heuristic(vocab)
    floats = ("logprobs", "entropies", "largest_ptr", "log_total_ptr", "d_logprobs", "d_entropies")
    kinds = {name: "*fp32" for name in floats} | {name: "fp32" for name in ("scale", "softcap", "cooling")}
    kinds |= {"logits": "*bf16", "targets": "*i64"}
    constants = {"VOCAB": vocab, "SOFTCAP": True, "ENTROPY": entropy, "BLOCK": cfg.block}
    for kernel in ("logprob_fwd_kernel", "logprob_bwd_kernel"):
        ptx = _ptx("linear_logprob", kernel, cfg.num_warps, constants, kinds)
        assert 128 in _widths(ptx, "ld")
        assert kernel == "logprob_fwd_kernel" or 128 in _widths(ptx, "st")
        assert ".local" not in ptx


def test_fp8_quantisation():
    kinds = {"q_ptr": "*fp8e4nv", "out_ptr": "*fp8e4nv", "scale_ptr": "*fp32", "factor_ptr": "*fp32"}
    sizes = {"N0": 4096, "N1": 1024, "N2": 1024, "B0": 4096, "B1": 1024, "B2": 1024, "FACTORS": True}
    ptx = _ptx("fp8", "fp8_quantize_rows_kernel", 8, {**sizes, "CACHE": ".cg"}, kinds)
    assert ptx.count("ld.global.cg.v4.b32") == 2 and "e4m3x2" in ptx
    assert "e4m3x2" in _ptx("fp8", "fp8_scale_kernel", 8, {"BLOCK": 4096}, kinds)


@pytest.mark.parametrize("options", [(False, False), (True, True)], ids=["plain", "softcap and smoothing"])
def test_cross_entropy_in_fp8(options):
    kinds = {
        "logits": "*bf16", "labels": "*i64", "losses": "*fp32", "factor": "*fp32", "quantized": "*fp8e4nv",
        "quantized_scale": "*fp32", "slopes": "*fp32", "scale": "fp32", "softcap": "fp32", "smoothing": "fp32",
    }  # fmt: skip
    constants = {"VOCAB": 128256, "SOFTCAP": options[0], "SMOOTHING": options[1], "GRADIENT": True, "BLOCK": 8192}
    ptx = _ptx("linear_ce", "cross_entropy_kernel", 8, {**constants, "FP8": True}, kinds)
    assert "e4m3x2" in ptx and set(_widths(ptx, "st")) <= {128, 64, 32, 8}  # 8: the label's own entry
