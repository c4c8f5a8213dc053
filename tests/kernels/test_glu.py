from functools import partial

import pytest
import torch

from fastft.errors import UsageError
from fastft.kernels.dispatch import use_triton
from fastft.kernels.glu import glu, ref
from fastft.kernels.glu.launch import launch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [(1, 1), (3, 63), (7, 257), (5, 1000), (300, 8), (2, 3000)]


def _inputs(strided, shape, layout, dtype, device):
    return [strided(shape, layout, dtype, device, seed=seed).requires_grad_() for seed in (1, 2)]


def _compare(compare, args, activation):
    op, eager = partial(glu, activation=activation), partial(ref.glu, activation=activation)
    compare(op, eager, eager, args)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ref.ACTIVATIONS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_fp64(compare, strided, check_dtype, device, size, activation, dtype):
    check_dtype(dtype)
    _compare(compare, _inputs(strided, size, "contiguous", dtype, device), activation)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("layout", ["transposed", "packed", "columns", "scattered"])
def test_strides(compare, strided, device, layout):
    _compare(compare, _inputs(strided, (2, 3, 5, 33), layout, torch.float32, device), "silu")


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ref.ACTIVATIONS)
def test_halves_of_a_packed_projection(compare, strided, check_dtype, device, activation, dtype):
    check_dtype(dtype)
    packed = strided((3, 7, 130), "contiguous", dtype, device).requires_grad_()

    def halves(fn):
        return lambda both: fn(*both.chunk(2, dim=-1), activation)

    compare(halves(glu), halves(ref.glu), halves(ref.glu), [packed])


@pytest.mark.usefixtures("poisoned_empty")
def test_mixed_dtypes_promote(compare, strided, device):
    gate, _ = _inputs(strided, (9, 130), "contiguous", torch.float16, device)
    _, up = _inputs(strided, (9, 130), "contiguous", torch.float32, device)
    assert glu(gate, up, "silu").dtype == torch.float32
    _compare(compare, [gate, up], "silu")


@pytest.mark.parametrize("activation", ref.ACTIVATIONS)
def test_far_from_zero(strided, device, activation):
    gate = torch.tensor([-3e30, -1e10, -200.0, -90.0, -30.0, 0.0, 30.0, 90.0, 200.0, 1e10, 3e30], device=device)
    gate.requires_grad_()
    out = glu(gate, torch.ones_like(gate), activation)
    grad = torch.autograd.grad(out.sum(), gate)[0]
    exact = gate.detach().double().requires_grad_()
    expected = ref.glu(exact, torch.ones_like(exact), activation)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-9)
    limits = torch.where(exact.abs() > 1e9, (exact > 0).double(), torch.autograd.grad(expected.sum(), exact)[0])
    # The formula that torch uses, our reference's, gives infinity times zero where x^3 overflows.
    judged = torch.ones_like(gate, dtype=torch.bool) if use_triton(gate) else exact.abs() < 1e12
    torch.testing.assert_close(grad.double()[judged], limits[judged], rtol=1e-5, atol=1e-9)


def test_expanded_gradient_and_one_input_frozen(strided, device):
    gate, up = _inputs(strided, (4, 6, 40), "contiguous", torch.float32, device)
    up = up.detach()
    glu(gate, up, "gelu").sum().backward()
    got, gate.grad = gate.grad, None
    ref.glu(gate, up, "gelu").sum().backward()
    torch.testing.assert_close(got, gate.grad, rtol=1e-5, atol=1e-6)
    assert up.grad is None


def test_no_rows(device):
    gate = torch.empty(0, 12, device=device, requires_grad=True)
    out = glu(gate, gate, "silu")
    assert out.shape == (0, 12) and torch.autograd.grad(out.sum(), gate)[0].shape == (0, 12)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("activation, name", [("silu", "silu"), ("gelu_tanh", "gelu_pytorch_tanh"), ("gelu", "gelu")])
def test_equals_transformers(same_as_eager, strided, check_dtype, device, activation, name, dtype):
    check_dtype(dtype)
    activate = pytest.importorskip("transformers.activations").ACT2FN[name]
    gate, up = (part.detach() for part in _inputs(strided, (3, 50, 192), "packed", dtype, device))
    same_as_eager(glu(gate, up, activation), activate(gate) * up)


def test_runs_the_kernel(kernel_device, strided, monkeypatch):
    def unwanted(*_):
        raise AssertionError("the reference ran")

    monkeypatch.setattr(ref, "glu", unwanted)
    monkeypatch.setattr(ref, "glu_backward", unwanted)
    args = _inputs(strided, (3, 16), "contiguous", torch.float32, kernel_device)
    assert torch.autograd.grad(glu(*args, "silu").sum(), args)[0].isfinite().all()


@pytest.mark.parametrize("activation", ref.ACTIVATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "packed"])
def test_opcheck(strided, device, layout, activation):
    gate, up = _inputs(strided, (2, 3, 4, 20), layout, torch.float32, device)
    torch.library.opcheck(torch.ops.fastft.glu.default, (gate, up, activation))
    gate, up = gate.detach(), up.detach()
    torch.library.opcheck(torch.ops.fastft.glu_backward.default, (up.cos(), gate, up, activation))


@pytest.mark.parametrize("activation", ref.ACTIVATIONS)
def test_gradcheck(strided, device, activation):
    args = _inputs(strided, (2, 3, 5), "contiguous", torch.float64, device)
    assert torch.autograd.gradcheck(lambda gate, up: glu(gate, up, activation), args)


def test_compiled(strided, device):
    packed = strided((2, 6, 80), "contiguous", torch.float32, device).requires_grad_()

    def step(packed):
        gate, up = (packed * 2).chunk(2, dim=-1)
        return glu(gate, up, "silu") * 3

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for fn in (step, compiled):
        out = fn(packed)
        results.append((out, *torch.autograd.grad(out.square().sum(), packed)))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_mistakes_are_told_together():
    with pytest.raises(UsageError) as caught:
        glu(torch.ones(2, 3), torch.ones(2, 4), "swish")
    assert len(caught.value.problems) == 2 and "'swish'" in str(caught.value) and "(2, 4)" in str(caught.value)


@pytest.mark.parametrize("count, width", [(1, 1), (7, 63), (8192, 14336), (100_000, 8), (3, 100_001), (2**33, 1)])
def test_launch_covers_everything(count, width):
    cfg = launch(count, width)
    assert cfg.block * cfg.segments >= width > cfg.block * (cfg.segments - 1)
    tiles = cfg.programs // cfg.segments
    assert cfg.programs % cfg.segments == 0 and cfg.rows * tiles >= count > cfg.rows * (tiles - 1)
    assert cfg.warps in (1, 2, 4) and cfg.programs < 2**31


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_2_to_the_31_elements(cuda):
    rows, width = 2**17 + 3, 2**14
    packed = torch.randn(rows, 2 * width, dtype=torch.bfloat16, device=cuda)
    gate, up = (half.detach().requires_grad_() for half in packed.chunk(2, dim=-1))
    out = glu(gate, up, "silu")
    grads = torch.autograd.grad(out, (gate, up), out.detach())
    for part in (slice(0, 8), slice(rows // 2, rows // 2 + 8), slice(rows - 8, rows)):
        few = [half[part].detach().requires_grad_() for half in (gate, up)]
        expected = ref.glu(*few, "silu")
        torch.testing.assert_close(out[part], expected, rtol=1e-2, atol=1e-2)
        for ours, theirs in zip(grads, torch.autograd.grad(expected, few, out[part].detach())):
            torch.testing.assert_close(ours[part], theirs, rtol=3e-2, atol=3e-2)
