"""fp8 quantisation bit by bit, and the LoRA operations with fp8 factors against the simulated computation."""

import importlib.util
from pathlib import Path

import pytest
import torch

from fastft.environment import triton_interpreted
from fastft.kernels import fp8, lora, lora_glu
from fastft.kernels.dispatch import use_triton
from fastft.kernels.fp8 import launch, op, ref
from fastft.kernels.nf4 import ref as nf4_ref

_spec = importlib.util.spec_from_file_location("matrix_judge", Path(__file__).parent / "matrix_judge.py")
judge = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(judge)
DEVICE = judge.DEVICE
KERNEL = DEVICE == "cuda" or triton_interpreted()
EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}
DTYPES = [torch.bfloat16] if DEVICE == "cuda" else [torch.float32, torch.bfloat16]


def normal(*shape, seed=0, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)


def random_nf4(n, k, nested=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-n * k // 64)
    packed = torch.randint(0, 256, (-(-n * k // 2), 1), dtype=torch.uint8, generator=generator)
    if not nested:
        return packed.to(DEVICE), [(torch.rand(blocks, generator=generator) + 0.01).to(DEVICE)]
    absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator)
    second = torch.rand(-(-blocks // 256), generator=generator) * 0.05
    state = [absmax, torch.linspace(-1, 1, 256), second, torch.tensor(0.15)]
    return packed.to(DEVICE), [t.to(DEVICE) for t in state]


def same_fp8(got, want, unrounded):
    """Require equal bytes; Triton's interpreter drops the carry of a rounding to a power of two."""
    assert got.dtype == want.dtype == ref.FP8 and got.shape == want.shape
    differing = got.contiguous().view(torch.uint8) != want.contiguous().view(torch.uint8)
    if triton_interpreted():
        mantissa, _ = torch.frexp(want.float().abs())
        carried = (mantissa == 0.5) & (unrounded.abs() < want.float().abs())
        assert carried.double().mean() < 0.2
        differing &= ~carried
    assert not differing.any(), f"{int(differing.sum())} bytes differ"


# ---- quantisation


WIDTHS = {"one": (64,), "odd": (37,), "wide": (1100,), "two": (96, 32), "qkv": (48, 16, 16), "four": (8, 8, 24, 1)}


@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("folded", [False, True], ids=["plain", "factors"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows(widths, folded, dtype, poisoned_empty):
    parts = [normal(7, width, seed=i, scale=3.0, dtype=dtype) for i, width in enumerate(widths)]
    parts[0][2] *= 1e-30
    for part in parts:
        part[4] = 0.0
    factors = normal(sum(widths), seed=9).abs() + 0.01 if folded else None
    q, scale = fp8.quantize_rows(parts, factors)
    wide = torch.cat([part.double() for part in parts], 1) * (1.0 if factors is None else factors.double())
    want_q, want_scale = ref.quantize_rows(parts, factors)
    assert scale.shape == (7, 1) and scale.dtype == torch.float32 and torch.equal(scale, want_scale)
    same_fp8(q, want_q, wide / scale.double())
    largest = wide.abs().amax(1, keepdim=True)
    assert torch.allclose(scale.double(), (largest / 448).clamp(min=2.0**-126), rtol=1e-6)
    # Every value is a nearest neighbour: within half a step of e4m3, 2^-4 of itself or 2^-10 of the scale.
    error = (want_q.double() * want_scale.double() - wide).abs()
    assert (error <= torch.maximum(wide.abs() * 2.0**-4, want_scale.double() * 2.0**-10) * (1 + 1e-6)).all()
    assert (q[4].float() == 0).all()


def test_rows_of_a_view():
    both = normal(5, 96, dtype=DTYPES[0])
    left, right = both[:, :64], both[:, 64:]
    q, scale = fp8.quantize_rows([left, right])
    assert torch.equal(scale, fp8.quantize_rows([both])[1])
    same_fp8(q, ref.quantize_rows([both])[0], both.double() / scale.double())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows(value):
    x = normal(4, 64, dtype=DTYPES[0])
    x[1, 5] = value
    weight = ref.weight_rows(normal(32, 64), [], 32, 64)
    y = fp8.product(*fp8.quantize_rows([x]), *weight, DTYPES[0])
    assert not y[1].isfinite().any()
    assert y[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("magnitude", [0.0, 1e-37, 1e-30, 1e-8, 1e8, 1e30])
def test_small_and_large_rows_stay_finite(magnitude):
    x = normal(4, 64, dtype=torch.float32)
    x[1] *= magnitude
    x = x.to(DTYPES[0])
    weight = ref.weight_rows(normal(32, 64, scale=0.1), [], 32, 64)
    q, scale = fp8.quantize_rows([x])
    y = fp8.product(q, scale, *weight, DTYPES[0])
    assert y.isfinite().all()
    truth = x.double() @ ref.dequantize(*weight, torch.float64).t()
    if magnitude > 1e-35:
        assert judge.rms_ratio(y[1] / (magnitude or 1), truth[1] / (magnitude or 1)) < 0.05
    else:
        assert (y[1].double() - truth[1]).abs().max() < 1e-36


# ---- weights


SHAPES = [(16, 64), (80, 192), (33, 128), (64, 320)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["nested", "single", "dense", "held", "turned"])
def test_both_layouts_of_a_weight(shape, kind, poisoned_empty):
    n, k = shape
    if kind in ("nested", "single"):
        weight, state = random_nf4(n, k, kind == "nested")
        parts = state if len(state) == 4 else [state[0], None, None, None]
        wide = nf4_ref.nf4_dequantize(weight, *parts, n, k, torch.float32)
        largest = nf4_ref.block_scales(*parts).abs().view(n, -1).amax(1)
    else:
        weight, state = normal(n, k, scale=0.1), []
        wide, largest = weight, weight.abs().amax(1)
    if kind in ("held", "turned"):
        q, scale = ref.quantize_rows([weight])
        weight, state = q.view(torch.uint8), [scale.view(-1)]
        state += [weight.t().contiguous()] if kind == "turned" else []
    want = ref.weight_rows(weight, state, n, k)
    assert torch.allclose(want[1], largest / 448, rtol=1e-6)
    rows = fp8.weight_rows(weight, state, n, k)
    columns = fp8.weight_columns([weight, weight], [state, state], [n, n], k)
    unrounded = wide.double() / want[1].double()[:, None]
    assert torch.equal(rows[1], want[1]) and torch.equal(columns[1], torch.cat([want[1]] * 2))
    same_fp8(rows[0], want[0], unrounded)
    same_fp8(columns[0], torch.cat([want[0]] * 2).t(), torch.cat([unrounded] * 2).t())
    plain = fp8.dequantize(*want, torch.float32)
    assert torch.equal(plain, want[0].float() * want[1][:, None])
    assert (plain - wide).abs().max() <= 2.0**-4 * wide.abs().max()


def held_in_both_layouts(sizes, k):
    """Return weights [n_i, k] in fp8 whose state has the transposed values too, columns of one matrix, and that."""
    made = [fp8.quantize_rows([normal(n, k, seed=i, scale=k**-0.5)]) for i, n in enumerate(sizes)]
    whole, scales = fp8.weight_columns([q for q, _ in made], [[scale] for _, scale in made], list(sizes), k)
    own = zip(scales.split(sizes), whole.split(sizes, dim=1), strict=True)
    return [q for q, _ in made], [list(state) for state in own], whole


def test_columns_that_lie_side_by_side_are_taken_as_they_are():
    sizes, k = (32, 16, 48), 64
    weights, states, whole = held_in_both_layouts(sizes, k)

    def columns(*places):
        return fp8.weight_columns(*([part[i] for i in places] for part in (weights, states, sizes)), k)

    found, scales = columns(0, 1, 2)
    assert found.data_ptr() == whole.data_ptr() and found.shape == (k, 96) and found.is_contiguous()
    assert scales.data_ptr() == states[0][0].data_ptr() and scales.shape == (96,)
    for places in ((0,), (0, 2), (1, 2), (2, 1, 0), (1, 1)):  # some, and in another order: copied together
        found, scales = columns(*places)
        assert found.data_ptr() != whole.data_ptr() and found.is_contiguous()
        want = torch.cat([weights[i].view(torch.uint8) for i in places]).t()
        assert torch.equal(found.view(torch.uint8), want)
        assert torch.equal(scales, torch.cat([states[i][0] for i in places]))
    states[1][0] = states[1][0].clone()  # scales that lie elsewhere
    found, scales = columns(0, 1, 2)
    assert torch.equal(found.view(torch.uint8), whole.view(torch.uint8)) and scales.shape == (96,)


@pytest.mark.parametrize("used", [(0, 1, 2), (0, 2)])
def test_weights_in_both_layouts_give_the_same_bits(used):
    sizes, k, m, dtype = (32, 16, 48), 64, 21, DTYPES[-1]
    weights, states, _ = held_in_both_layouts(sizes, k)
    x = normal(m, k, dtype=dtype).requires_grad_()
    a = [normal(4, k, seed=7 + i, scale=0.1).requires_grad_() for i in range(3)]
    b = [normal(n, 4, seed=17 + i, scale=0.1).requires_grad_() for i, n in enumerate(sizes)]
    results = []
    for given in (states, [state[:1] for state in states]):
        ys = lora.lora_linears(x, weights, [None] * 3, a, b, [2.0] * 3, given, fp8=True)
        dys = [normal(m, sizes[i], seed=20 + i, dtype=dtype) for i in used]
        leaves = [x, *(a[i] for i in used), *(b[i] for i in used)]
        results.append([*ys, *torch.autograd.grad([ys[i] for i in used], leaves, dys)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.skipif(not KERNEL, reason="no Triton here; the interpreter test runs it")
def test_every_launch_setting_gives_the_same():
    from fastft.kernels.fp8 import triton as kernels

    n, k = 80, 192
    weight, state = random_nf4(n, k)
    want = ref.weight_rows(weight, state, n, k)
    wide = nf4_ref.nf4_dequantize(weight, *state, n, k, torch.float32).double() / want[1].double()[:, None]
    for rows, columns, splits in ((16, 64, 1), (16, 64, 3), (32, 128, 2), (64, 256, 1)):
        for transposed in (False, True):
            out = torch.zeros((k, n) if transposed else (n, k), dtype=ref.FP8, device=DEVICE)
            scale = torch.empty(n, device=DEVICE)
            cfg = launch.WeightLaunch(rows, columns, splits, 4)
            kernels.nf4_to_fp8(weight, state, n, k, out, scale, transposed, cfg)
            assert torch.equal(scale, want[1])
            same_fp8(out.t() if transposed else out, want[0], wide)


def test_launch_settings_for_large_weights():
    for n, k in ((14336, 4096), (4096, 14336), (1024, 4096)):
        for transposed in (False, True):
            cfg = launch.weight_launch(n, k, transposed, 132)
            assert cfg.splits >= 1 and -(-n // cfg.rows) * cfg.splits >= 132
    assert [launch.row_launch(width).warps for width in (1, 4096, 28672)] == [4, 8, 32]


# ---- the low-rank sum and the product


@pytest.mark.parametrize("rank", [1, 5, 16, 40, 100])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_low_rank_sum(rank, bias, dtype):
    y, wide = normal(70, 130, dtype=dtype), normal(70, rank + 3, seed=1, dtype=dtype)
    left, right = wide[:, 2 : rank + 2], normal(rank, 130, seed=2, dtype=dtype).t()
    own = normal(130, seed=3, dtype=dtype) if bias else None
    truth = y.double() + 0.7 * left.double() @ right.double().t() + (own.double() if bias else 0.0)
    got = fp8.low_rank_add_(y, left, right, 0.7, own)
    assert got.data_ptr() == y.data_ptr()
    assert judge.rms_ratio(got, truth) < 2 * EPS[dtype]


@pytest.mark.parametrize("m", [0, 1, 3, 17, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product(m, dtype):
    x, weight = ref.quantize_rows([normal(m, 96)]) if m else (normal(0, 96).to(ref.FP8), normal(0, 1)), None
    weight = ref.weight_rows(normal(48, 96, seed=1), [], 48, 96)
    truth = ref.product(*x, *weight, torch.float64)
    for fast, budget in ((False, 2 * EPS[dtype]), (True, max(2 * EPS[dtype], 8e-3 if DEVICE == "cuda" else 0.0))):
        got = fp8.product(*x, *weight, dtype, fast=fast)
        assert got.shape == (m, 48) and got.dtype == dtype
        assert judge.rms_ratio(got, truth) <= budget


def test_a_cpu_needs_no_fp8_product_of_torchs_own(monkeypatch):
    """Some versions of torch have one there for a single scale alone, some for rows on processors that support it."""

    def refuses(*_, **__):
        raise RuntimeError("Now _scaled_mm only supports per-tensor scaling for CPU backend.")

    monkeypatch.setattr(torch, "_scaled_mm", refuses)
    x, weight = ref.quantize_rows([normal(5, 96).cpu()]), ref.weight_rows(normal(48, 96, seed=1).cpu(), [], 48, 96)
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.full((5, 48), float("nan"), dtype=dtype)
        assert fp8.product(*x, *weight, dtype, out=out) is out
        assert torch.equal(out, fp8.product(*x, *weight, dtype))
        assert judge.rms_ratio(out, ref.product(*x, *weight, torch.float64)) < 2 * EPS[dtype]
    plain = fp8.product(*x, weight[0], None, torch.float32)
    assert torch.allclose(plain * weight[1], fp8.product(*x, *weight, torch.float32), rtol=1e-5)
    one = fp8.product(*x, weight[0], torch.full((1,), 0.5), torch.float32)
    assert torch.equal(one, 0.5 * plain)


# ---- the operations


def simulated_linear(x, dy, weight, state, a, b, scale, bias, n, k):
    """Return what one LoRA linear with fp8 factors gives, and its gradients, in fp64 from the quantised factors."""
    q, scales = ref.weight_rows(weight, state, n, k)
    dense = ref.dequantize(q, scales, torch.float64)
    qx, sx = ref.quantize_rows([x])
    x8, x, dy, a, b = qx.double() * sx.double(), x.double(), dy.double(), a.double(), b.double()
    xa = x @ a.t()
    y = x8 @ dense.t() + scale * xa @ b.t() + (0.0 if bias is None else bias.double())
    qd, sd = ref.quantize_rows([dy.float()], scales)
    g = scale * dy @ b
    dx = (qd.double() * sd.double()) @ q.double() + g @ a
    return y, dx, g.t() @ x, scale * dy.t() @ xa, (None if bias is None else dy.sum(0))


@pytest.mark.parametrize("kind", ["dense", "nested", "held"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_linear_equals_the_simulated_one(kind, bias, dtype, poisoned_empty):
    n, k, m, r = 80, 128, 37, 5
    weight, state = (normal(n, k, seed=1, scale=k**-0.5, dtype=dtype), []) if kind != "nested" else random_nf4(n, k)
    if kind == "held":
        q, scale = ref.quantize_rows([weight])
        weight, state = q.view(torch.uint8), [scale.view(-1)]
    x, dy = normal(m, k, seed=2, dtype=dtype).requires_grad_(), normal(m, n, seed=3, dtype=dtype)
    a, b = normal(r, k, seed=4, scale=k**-0.5).requires_grad_(), normal(n, r, seed=5, scale=0.3).requires_grad_()
    own = normal(n, seed=6).requires_grad_() if bias else None
    (y,) = lora.lora_linears(x, [weight], [own], [a], [b], [1.5], [state], fp8=True)
    got = [y, *torch.autograd.grad(y, [x, a, b, *([own] if bias else [])], dy)]
    narrow = [t.detach().to(dtype) for t in (a, b)]
    want = simulated_linear(x.detach(), dy, weight, state, *narrow, 1.5, own, n, k)
    names = ["y", "dx", "dA", "dB", "dbias"]
    for name, value, truth in zip(names, got, want):
        allowed = 3 * EPS[dtype] if DEVICE == "cpu" else 8e-3
        assert judge.rms_ratio(value, truth) < allowed, (name, judge.rms_ratio(value, truth))


def test_the_error_of_fp8_is_that_of_its_roundings():
    """Against exact products: 3.7 % a product of normal factors (2.6 % each), and nothing for the adapters."""
    n, k, m, r = 256, 512, 64, 8
    dtype = DTYPES[-1]
    weight = normal(n, k, seed=1, scale=k**-0.5, dtype=dtype)
    x, dy = normal(m, k, seed=2, dtype=dtype).requires_grad_(), normal(m, n, seed=3, dtype=dtype)
    a, b = normal(r, k, seed=4, scale=k**-0.5).requires_grad_(), normal(n, r, seed=5, scale=0.01).requires_grad_()
    results = []
    for given in (True, False):
        (y,) = lora.lora_linears(x, [weight], [None], [a], [b], [1.0], fp8=given)
        results.append([y, *torch.autograd.grad(y, [x, a, b], dy)])
    ratios = [judge.rms_ratio(p, q) for p, q in zip(*results)]
    assert 0.03 < ratios[0] < 0.045 and 0.03 < ratios[1] < 0.045
    assert max(ratios[2:]) < 1e-6


def test_several_linears_share_one_gradient_product(poisoned_empty):
    """dx of q, k and v is one product: their gradients under one scale a row, times all weights."""
    k, m, sizes, dtype = 128, 33, (64, 32, 32), DTYPES[-1]
    weights = [random_nf4(n, k, seed=i) for i, n in enumerate(sizes)]
    x = normal(m, k, dtype=dtype).requires_grad_()
    a, b = [normal(4, k, seed=7, scale=0.1) for _ in sizes], [normal(n, 4, seed=8, scale=0.1) for n in sizes]
    dys = [normal(m, n, seed=20 + i, dtype=dtype) for i, n in enumerate(sizes)]
    packed, states = [w for w, _ in weights], [s for _, s in weights]
    ys = lora.lora_linears(x, packed, [None] * 3, a, b, [2.0] * 3, states, fp8=True)
    (dx,) = torch.autograd.grad(ys, [x], dys)
    made = [ref.weight_rows(w, s, n, k) for (w, s), n in zip(weights, sizes)]
    q, scales = torch.cat([w for w, _ in made]), torch.cat([s for _, s in made])
    qd, sd = ref.quantize_rows(dys, scales)
    truth = (qd.double() * sd.double()) @ q.double()
    for dy, own_a, own_b in zip(dys, a, b):
        truth += 2.0 * (dy.double() @ own_b.to(dtype).double()) @ own_a.to(dtype).double()
    assert judge.rms_ratio(dx, truth) < (3 * EPS[dtype] if DEVICE == "cpu" else 8e-3)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("quant", ["dense", "nested"])
def test_feed_forward(packed, quant, poisoned_empty):
    """Near the exact one by what fp8 factors cost; the gradients of the last adapter's A and B see h and dy alone."""
    dtype, m, narrow, wide, r = DTYPES[-1], 48, 128, 192, 8
    shapes = [(2 * wide, narrow), (narrow, wide)] if packed else [(wide, narrow), (wide, narrow), (narrow, wide)]
    made = [
        (normal(n, k, seed=i, scale=k**-0.5, dtype=dtype), []) if quant == "dense" else random_nf4(n, k, seed=i)
        for i, (n, k) in enumerate(shapes)
    ]
    a = [normal(r, k, seed=30 + i, scale=k**-0.5).requires_grad_() for i, (_, k) in enumerate(shapes)]
    b = [normal(n, r, seed=40 + i, scale=0.1).requires_grad_() for i, (n, _) in enumerate(shapes)]
    x, dy = normal(m, narrow, seed=50, dtype=dtype).requires_grad_(), normal(m, narrow, seed=51, dtype=dtype)
    results = []
    for given in (True, False):
        arguments = (x, [w for w, _ in made], a, b, [1.0] * len(a), [s for _, s in made], "silu")
        y = lora_glu.feed_forward(*arguments, fp8=given)
        results.append([y, *torch.autograd.grad(y, [x, *a, *b], dy)])
    ratios = [judge.rms_ratio(p, q) for p, q in zip(*results)]
    assert all(0.01 < ratio < 0.10 for ratio in ratios[:2])
    assert all(ratio < 0.12 for ratio in ratios)


@pytest.mark.parametrize("quant", ["dense", "nested", "turned"])
def test_opcheck(quant):
    n, k, dtype = 32, 64, DTYPES[0]
    weight, state = (normal(n, k, dtype=dtype), []) if quant == "dense" else random_nf4(n, k)
    if quant == "turned":
        (weight,), ((scale, turned),), _ = held_in_both_layouts((n,), k)
        weight, state = weight.view(torch.uint8), [scale, turned.view(torch.uint8)]  # opcheck compares no fp8 on a CPU
    x = normal(3, 5, k, dtype=dtype).requires_grad_()
    a, b = normal(4, k).requires_grad_(), normal(n, 4).requires_grad_()
    counts = [len(state)]
    given = (x, [weight], [], [False], [a], [b], [1.0], state, counts, True)
    torch.library.opcheck(torch.ops.fastft.lora_linears, given)
    torch.library.opcheck(torch.ops.fastft.linears, (x, [weight], [a], state, counts, [n], True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    n, k, dtype = 32, 64, DTYPES[0]
    packed, state = random_nf4(n, k)
    a, b = normal(4, k).requires_grad_(), normal(n, 4).requires_grad_()

    def function(x):
        return lora.lora_linears(x, [packed], [None], [a], [b], [1.0], [state], fp8=True)[0]

    x, dy = normal(9, k, dtype=dtype).requires_grad_(), normal(9, n, dtype=dtype)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for got, want in zip(*([y, *torch.autograd.grad(y, [x, a, b], dy)] for y in (compiled(x), function(x)))):
        assert judge.rms_ratio(got, want) < 1e-6


# ---- what cannot be computed so


def test_obstacles():
    cpu = torch.device("cpu")
    assert fp8.obstacle(cpu, torch.bfloat16, 64, 64, True) == ""
    assert fp8.obstacle(cpu, torch.float32, 48, 80, False) == ""
    assert "multiples of 16" in fp8.obstacle(cpu, torch.bfloat16, 100, 64, False)
    assert "multiples of 16" in fp8.obstacle(cpu, torch.bfloat16, 64, 100, False)
    assert "float16" in fp8.obstacle(cpu, torch.float16, 64, 64, False)
    assert "whole blocks of 64" in fp8.obstacle(cpu, torch.bfloat16, 64, 96, True)
    assert "mps" in fp8.obstacle(torch.device("mps"), torch.bfloat16, 64, 64, False)


def test_an_older_gpu_is_an_obstacle(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A10G")
    why = op.device_obstacle(torch.device("cuda", 0))
    assert "NVIDIA A10G has compute capability 8.6" in why and "8.9" in why
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert op.device_obstacle(torch.device("cuda", 0)) == ""


def test_the_kernels_run_where_they_should():
    assert use_triton(torch.empty(1, device=DEVICE)) == KERNEL
