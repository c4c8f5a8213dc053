from functools import partial

import pytest
import torch

from fastft.errors import UsageError
from fastft.kernels.layer_norm import layer_norm, ref
from fastft.kernels.layer_norm.launch import backward_launch, forward_launch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# What stands beside x: weight and bias, weight alone, bias alone, neither.
AFFINE = {"both": (True, True), "weight": (True, False), "bias": (False, True), "neither": (False, False)}
SIZES = [(1, 1), (3, 63), (7, 257), (70, 1000), (300, 8), (2, 4096)]


def _inputs(strided, shape, affine_shape, affine, layout, dtype, device):
    x = strided(shape, layout, dtype, device, seed=1)
    # A mean that is not near 0, so that leaving it in shows.
    x = x.add_(1.5).requires_grad_()
    parts = [
        strided(affine_shape, "contiguous", dtype, device, seed=seed).requires_grad_() if given else None
        for seed, given in zip((2, 3), AFFINE[affine])
    ]
    return [x, *parts]


def _compare(compare, args, eps=1e-5):
    op, eager = partial(layer_norm, eps=eps), partial(ref.layer_norm, eps=eps)
    compare(op, eager, partial(ref.layer_norm, eps=eps, compute=torch.float64), args)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_fp64(compare, strided, check_dtype, device, size, affine, dtype):
    check_dtype(dtype)
    _compare(compare, _inputs(strided, size, size[1:], affine, "contiguous", dtype, device))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("affine", ["both", "weight"])
@pytest.mark.parametrize("shape", [(2, 9, 5, 24), (3, 1, 16), (40, 3, 257), (2, 8)], ids=str)
def test_weight_per_head(compare, strided, check_dtype, device, shape, affine, dtype):
    check_dtype(dtype)
    _compare(compare, _inputs(strided, shape, shape[-2:], affine, "contiguous", dtype, device))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("layout", ["transposed", "packed", "columns", "scattered"])
@pytest.mark.parametrize("heads", [False, True])
def test_strides(compare, strided, device, layout, heads):
    shape = (2, 3, 5, 33)
    _compare(
        compare, _inputs(strided, shape, shape[-2:] if heads else shape[-1:], "both", layout, torch.float32, device)
    )


def test_expanded_gradient_and_frozen_parts(strided, device):
    x, weight, bias = _inputs(strided, (4, 6, 40), (40,), "both", "contiguous", torch.float32, device)
    weight = weight.detach()
    layer_norm(x, weight, bias, 1e-5).sum().backward()
    got, x.grad = (x.grad, bias.grad), None
    bias.grad = None
    ref.layer_norm(x, weight, bias, 1e-5).sum().backward()
    torch.testing.assert_close(got, (x.grad, bias.grad), rtol=1e-5, atol=1e-5)
    assert weight.grad is None


def test_zero_rows_stay_finite_and_do_not_spoil_the_weight(strided, device):
    args = _inputs(strided, (5, 12), (12,), "both", "contiguous", torch.float32, device)
    out = layer_norm(args[0][:0], *args[1:], 1e-5)
    grads = torch.autograd.grad(out.sum(), args)
    assert out.shape == (0, 12) and not any(grad.any() for grad in grads)
    # With eps 0 the rows that pad a tile must not reach the weight's gradient.
    assert torch.autograd.grad(layer_norm(*args, 0.0).sum(), args[1])[0].isfinite().all()


def test_affine_gradients_are_deterministic(strided, device):
    args = _inputs(strided, (70, 1000), (1000,), "both", "contiguous", torch.float32, device)
    first, second = (torch.autograd.grad(layer_norm(*args, 1e-5).sin().sum(), args) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape, size", [((3, 50, 192), 192), ((2, 50, 4, 48), (4, 48))], ids=str)
def test_equals_transformers(same_as_eager, strided, check_dtype, device, shape, size, dtype):
    check_dtype(dtype)
    modeling = pytest.importorskip("transformers.models.cohere.modeling_cohere")
    module = modeling.CohereLayerNorm(size, eps=1e-5).to(device, dtype)
    x = strided(shape, "contiguous", dtype, device)
    module.weight.data.copy_(strided(module.weight.shape, "contiguous", dtype, device, seed=3))
    with torch.no_grad():
        same_as_eager(layer_norm(x, module.weight, None, 1e-5), module(x))


def test_agrees_with_torch(strided, device):
    x, weight, bias = _inputs(strided, (6, 100), (100,), "both", "contiguous", torch.float32, device)
    expected = torch.nn.functional.layer_norm(x, (100,), weight, bias, 1e-5)
    torch.testing.assert_close(layer_norm(x, weight, bias, 1e-5), expected, rtol=1e-5, atol=1e-5)


def test_runs_the_kernel(kernel_device, strided, monkeypatch):
    def unwanted(*_):
        raise AssertionError("the reference ran")

    monkeypatch.setattr(ref, "layer_norm", unwanted)
    monkeypatch.setattr(ref, "layer_norm_backward", unwanted)
    args = _inputs(strided, (3, 16), (16,), "both", "contiguous", torch.float32, kernel_device)
    assert torch.autograd.grad(layer_norm(*args, 1e-5).sum(), args)[0].isfinite().all()


@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_opcheck(strided, device, layout, affine):
    x, weight, bias = _inputs(strided, (2, 3, 4, 20), (4, 20), affine, layout, torch.float32, device)
    torch.library.opcheck(torch.ops.fastft.layer_norm.default, (x, weight, bias, 1e-5))
    x, weight, bias = (part if part is None else part.detach() for part in (x, weight, bias))
    needed = (weight is not None, bias is not None)
    torch.library.opcheck(torch.ops.fastft.layer_norm_backward.default, (x.cos(), x, weight, bias, 1e-5, *needed))


@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("affine_shape", [(5,), (3, 5)], ids=str)
def test_gradcheck(strided, device, affine, affine_shape):
    args = _inputs(strided, (2, 3, 5), affine_shape, affine, "contiguous", torch.float64, device)
    assert torch.autograd.gradcheck(lambda *parts: layer_norm(*parts, 1e-5), args)


def test_compiled(strided, device):
    args = _inputs(strided, (2, 6, 3, 40), (3, 40), "both", "transposed", torch.float32, device)

    def step(x, weight, bias):
        return layer_norm(x * 2, weight, bias, 1e-5) * 3

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for fn in (step, compiled):
        out = fn(*args)
        results.append((out, *torch.autograd.grad(out.square().sum(), args)))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_mistakes_are_told_together():
    with pytest.raises(UsageError) as caught:
        layer_norm(torch.ones(2, 3), torch.ones(4), torch.ones(5), 1e-5)
    assert len(caught.value.problems) == 3 and "(4,)" in str(caught.value) and "(5,)" in str(caught.value)


@pytest.mark.parametrize(
    "count, width, heads", [(1, 1, 1), (7, 63, 5), (8192, 128, 64), (8192, 4096, 1), (3, 65536, 1)]
)
def test_launch_covers_all_rows(count, width, heads):
    launches = [backward_launch(count, width, heads, 132, need) for need in (False, True)]
    for cfg in (forward_launch(count, width), *launches):
        assert cfg.block >= width and cfg.rows * cfg.iterations * cfg.programs >= count
        assert cfg.rows * cfg.iterations * (cfg.programs - 1) < count
        assert cfg.warps in (1, 2, 4, 8, 16, 32) and cfg.iterations & (cfg.iterations - 1) == 0


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_2_to_the_31_elements(cuda):
    tokens, heads, width = 2**18 + 3, 64, 128
    x = torch.randn(tokens, heads, width, dtype=torch.bfloat16, device=cuda).requires_grad_()
    weight = torch.randn(heads, width, dtype=torch.bfloat16, device=cuda)
    out = layer_norm(x, weight, None, 1e-5)
    dx = torch.autograd.grad(out, x, out.detach())[0]
    for part in (slice(0, 8), slice(tokens // 2, tokens // 2 + 8), slice(tokens - 8, tokens)):
        tail = x[part].detach().requires_grad_()
        expected = ref.layer_norm(tail, weight, None, 1e-5)
        torch.testing.assert_close(out[part], expected, rtol=1e-2, atol=1e-2)
        grad = torch.autograd.grad(expected, tail, out[part].detach())[0]
        torch.testing.assert_close(dx[part], grad, rtol=3e-2, atol=3e-2)
