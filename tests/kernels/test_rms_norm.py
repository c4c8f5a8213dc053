from functools import partial

import pytest
import torch

from fastft.errors import UsageError
from fastft.kernels.rms_norm import ref, rms_norm
from fastft.kernels.rms_norm.launch import backward_launch, forward_launch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KINDS = [(0.0, "before_weight"), (1.0, "before_weight"), (1.0, "after_weight"), (0.0, "after_weight")]
# Rows and width; (70, 1000) makes programs of several tiles with a ragged end, (300, 8) many rows to a program.
SIZES = [(1, 1), (3, 63), (7, 257), (70, 1000), (300, 8), (2, 4096)]


def _inputs(strided, shape, layout, dtype, device, weight_dtype=None):
    x = strided(shape, layout, dtype, device, seed=1).requires_grad_()
    weight = strided(shape[-1:], "contiguous", weight_dtype or dtype, device, seed=2).requires_grad_()
    return [x, weight]


def _compare(compare, args, offset, cast):
    # One column makes x_hat 1 or -1 but for eps, and its gradient a difference of nearly equal numbers.
    rest = {"eps": 1e-6 if args[0].shape[-1] > 1 else 0.5, "offset": offset, "cast": cast}
    op, eager = partial(rms_norm, **rest), partial(ref.rms_norm, **rest)
    compare(op, eager, partial(ref.rms_norm, **rest, compute=torch.float64), args)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_fp64(compare, strided, check_dtype, device, size, kind, dtype):
    check_dtype(dtype)
    _compare(compare, _inputs(strided, size, "contiguous", dtype, device), *kind)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("layout", ["transposed", "packed", "columns", "scattered"])
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[2]], ids=str)
def test_strides(compare, strided, device, layout, kind):
    _compare(compare, _inputs(strided, (2, 3, 5, 33), layout, torch.float32, device), *kind)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_fp32_weight_with_fp16_input(compare, strided, device, kind):
    args = _inputs(strided, (9, 130), "contiguous", torch.float16, device, weight_dtype=torch.float32)
    assert rms_norm(*args, 1e-6, *kind).dtype == (torch.float32 if kind[1] == "before_weight" else torch.float16)
    _compare(compare, args, *kind)


def test_expanded_gradient_and_frozen_weight(strided, device):
    x, weight = _inputs(strided, (4, 6, 40), "contiguous", torch.float32, device)
    weight = weight.detach()
    rms_norm(x, weight, 1e-6, 0.0, "before_weight").sum().backward()
    got, x.grad = x.grad, None
    ref.rms_norm(x, weight, 1e-6, 0.0, "before_weight").sum().backward()
    torch.testing.assert_close(got, x.grad, rtol=1e-5, atol=1e-6)
    assert weight.grad is None


def test_zero_rows_stay_finite_and_do_not_spoil_the_weight(strided, device):
    x, weight = _inputs(strided, (5, 12), "contiguous", torch.float32, device)
    out = rms_norm(x[:0], weight, 1e-6, 0.0, "before_weight")
    dx, dweight = torch.autograd.grad(out.sum(), (x, weight))
    assert out.shape == (0, 12) and not dx.any() and not dweight.any()
    # With eps 0 the rows that pad a tile must not reach the weight's gradient.
    dweight = torch.autograd.grad(rms_norm(x, weight, 0.0, 0.0, "before_weight").sum(), weight)[0]
    assert dweight.isfinite().all()


def test_weight_gradient_is_deterministic(strided, device):
    args = _inputs(strided, (70, 1000), "contiguous", torch.float32, device)
    first, second = (
        torch.autograd.grad(rms_norm(*args, 1e-6, 0.0, "before_weight").sin().sum(), args) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma", "gemma3", "olmo2", "qwen3"])
def test_equals_transformers(same_as_eager, strided, check_dtype, device, family, dtype):
    check_dtype(dtype)
    modeling = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    module = getattr(modeling, f"{family.capitalize()}RMSNorm")(192, eps=1e-5).to(device, dtype)
    x = strided((3, 50, 192), "contiguous", dtype, device)
    module.weight.data.copy_(strided((192,), "contiguous", dtype, device, seed=3))
    kind = {"gemma": KINDS[2], "gemma3": KINDS[2], "olmo2": KINDS[3]}.get(family, KINDS[0])
    with torch.no_grad():
        same_as_eager(rms_norm(x, module.weight, 1e-5, *kind), module(x))


def test_runs_the_kernel(kernel_device, strided, monkeypatch):
    def unwanted(*_):
        raise AssertionError("the reference ran")

    monkeypatch.setattr(ref, "rms_norm", unwanted)
    monkeypatch.setattr(ref, "rms_norm_backward", unwanted)
    args = _inputs(strided, (3, 16), "contiguous", torch.float32, kernel_device)
    assert torch.autograd.grad(rms_norm(*args, 1e-6, 0.0, "before_weight").sum(), args)[0].isfinite().all()


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("weight_grad", [True, False])
def test_opcheck(strided, device, layout, weight_grad):
    x, weight = _inputs(strided, (2, 3, 4, 20), layout, torch.float32, device)
    weight.requires_grad_(weight_grad)
    for offset, cast in (KINDS[0], KINDS[2]):
        torch.library.opcheck(torch.ops.fastft.rms_norm.default, (x, weight, 1e-6, offset, cast))
    x, weight = x.detach(), weight.detach()
    torch.library.opcheck(torch.ops.fastft.rms_norm_backward.default, (x.cos(), x, weight, 1e-6, 1.0, weight_grad))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradcheck(strided, device, kind):
    args = _inputs(strided, (2, 3, 5), "contiguous", torch.float64, device)
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 1e-6, *kind), args)


def test_compiled(strided, device):
    x, weight = _inputs(strided, (2, 6, 40), "transposed", torch.float32, device)

    def step(x, weight):
        return rms_norm(x * 2, weight, 1e-6, 1.0, "after_weight") * 3

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for fn in (step, compiled):
        x.grad = weight.grad = None
        out = fn(x, weight)
        out.square().sum().backward()
        results = out, x.grad, weight.grad
        if fn is step:
            expected = results
    assert all(torch.equal(a, b) for a, b in zip(results, expected))


def test_mistakes_are_told_together():
    with pytest.raises(UsageError) as caught:
        rms_norm(torch.ones(2, 3), torch.ones(4), 1e-6, 0.0, "after")
    assert "'after'" in str(caught.value) and "(4,)" in str(caught.value)


@pytest.mark.parametrize("count, width", [(1, 1), (7, 63), (100_000, 128), (8192, 4096), (3, 65536), (2**33, 1)])
def test_launch_covers_all_rows(count, width):
    for cfg in (forward_launch(count, width), *(backward_launch(count, width, 132, need) for need in (False, True))):
        assert cfg.block >= width and cfg.rows * cfg.iterations * cfg.programs >= count
        assert cfg.rows * cfg.iterations * (cfg.programs - 1) < count and cfg.programs < 2**31
        assert cfg.warps in (1, 2, 4, 8, 16, 32) and cfg.iterations & (cfg.iterations - 1) == 0


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_2_to_the_31_elements(cuda):
    rows, width = 2**19 + 3, 4096
    x = torch.randn(rows, width, dtype=torch.bfloat16, device=cuda).requires_grad_()
    weight = torch.randn(width, dtype=torch.bfloat16, device=cuda)
    out = rms_norm(x, weight, 1e-6, 0.0, "before_weight")
    dx = torch.autograd.grad(out, x, out.detach())[0]
    for part in (slice(0, 8), slice(rows // 2, rows // 2 + 8), slice(rows - 8, rows)):
        tail = x[part].detach().requires_grad_()
        expected = ref.rms_norm(tail, weight, 1e-6, 0.0, "before_weight")
        torch.testing.assert_close(out[part], expected, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(
            dx[part], torch.autograd.grad(expected, tail, out[part].detach())[0], rtol=3e-2, atol=3e-2
        )
