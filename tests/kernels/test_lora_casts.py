"""Adapters cast in one call for all, and gradients scaled so: the bits of one by one, and how many calls are left."""

import importlib
from collections import Counter

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastft.kernels import lora, lora_glu
from fastft.kernels.lora import casts, gemm

OPS = [importlib.import_module(f"fastft.kernels.{name}") for name in ("lora.op", "lora.linears", "lora_glu.op")]


COPYING = {f"aten::{name}" for name in ("to", "_to_copy", "copy_", "cat", "clone", "contiguous", "_foreach_copy_")}


def random(*size, dtype=torch.float32, grad=True, seed=0):
    value = torch.randn(*size, generator=torch.Generator().manual_seed(seed + sum(size))) * 0.3
    return value.to(dtype).requires_grad_(grad)


def projections(dtype, adapter_dtypes, x):
    """Return leaves and a function of one input's projections: ranks 3, 0 and 8, of scales 1.7, 1 and 2."""
    k, widths, ranks = x.shape[-1], (24, 8, 40), (3, 0, 8)
    weights = [random(n, k, dtype=dtype, grad=False) for n in widths]
    a = [random(r, k, dtype=given, seed=1) for r, given in zip(ranks, adapter_dtypes)]
    b = [random(n, r, dtype=given, seed=2) for n, r, given in zip(widths, ranks, adapter_dtypes)]
    # Of a transposed matrix the copy keeps the layout.
    b[2] = b[2].detach().t().contiguous().t().requires_grad_()
    return [x, *a, *b], lambda: lora.lora_linears(x, weights, [None] * 3, a, b, [1.7, 1.0, 2.0])


def feed_forward(dtype, adapter_dtypes, x):
    k, n = x.shape[-1], 48
    sizes, ranks = [(n, k), (n, k), (k, n)], (4, 6, 8)
    weights = [random(*size, dtype=dtype, grad=False) for size in sizes]
    a = [random(r, into, dtype=given, seed=1) for r, (_, into), given in zip(ranks, sizes, adapter_dtypes)]
    b = [random(out, r, dtype=given, seed=2) for r, (out, _), given in zip(ranks, sizes, adapter_dtypes)]
    return [x, *a, *b], lambda: [lora_glu.feed_forward(x, weights, a, b, [2.0, 0.5, 1.7], [[], [], []], "silu")]


def run(made):
    leaves, function = made
    outputs = function()
    return [*outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(y) * 0.3 for y in outputs])]


@pytest.mark.parametrize("made", [projections, feed_forward])
@pytest.mark.parametrize("adapter_dtypes", [(torch.float32,) * 3, (torch.float32, torch.bfloat16, torch.float32)])
def test_the_bits_are_those_of_plain_casts(made, adapter_dtypes, monkeypatch):
    x = random(2, 9, 32, dtype=torch.bfloat16)
    together = run(made(torch.bfloat16, adapter_dtypes, x))

    def cast(matrices, dtype):
        return [matrix.to(dtype) for matrix in matrices]

    def stacked_and_cast(a, b, dtype):
        return torch.cat(cast(a, dtype)), cast(b, dtype)

    for module in OPS:
        for name, plain in (("cast", cast), ("stacked_and_cast", stacked_and_cast)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, plain)
    for one, other in zip(together, run(made(torch.bfloat16, adapter_dtypes, x)), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_what_has_the_dtype_already_is_not_copied():
    matrices = [random(3, 4), random(4, 2, dtype=torch.bfloat16)]
    made = casts.cast(matrices, torch.float32)
    assert made[0] is matrices[0]
    assert torch.equal(made[1], matrices[1].float())
    stack, others = casts.stacked_and_cast([matrices[0]], [matrices[0]], torch.float32)
    assert stack is matrices[0]
    assert others[0] is matrices[0]


def test_what_is_cast_together_lies_aligned_and_apart_from_what_it_was_made_of():
    """GEMMs want 16 bytes: a matrix of another size or layout is cast by itself, wherever it stands."""
    b = [random(*size, grad=False, seed=i) for i, size in enumerate([(3, 5), (4, 12), (0, 8), (8, 2), (5, 3), (2, 24)])]
    b[3] = b[3].t()
    a = [random(2, 12, grad=False), random(0, 12, grad=False), random(4, 12, grad=False, seed=1)]
    stack, others = casts.stacked_and_cast(a, b, torch.bfloat16)
    assert torch.equal(stack, torch.cat(a).to(torch.bfloat16)) and stack.is_contiguous()
    for one, other, alone in zip(others, b, casts.cast(b, torch.bfloat16), strict=True):
        assert torch.equal(one, other.to(torch.bfloat16)) and torch.equal(alone, one)
        assert one.stride() == alone.stride() == other.to(torch.bfloat16).stride()
        assert one.data_ptr() % 16 == alone.data_ptr() % 16 == 0


def test_scaling_is_that_of_a_product_in_place():
    scales = [1.7, 1.0, 0.3]
    matrices = [random(5, 7, grad=False, seed=i) for i in range(3)]
    wanted = [matrix.clone().mul_(scale) for matrix, scale in zip(matrices, scales)]
    casts.scale_(matrices, scales)
    assert all(torch.equal(one, other) for one, other in zip(matrices, wanted))


def test_a_transpose_is_contiguous_and_rounded_once():
    matrix = random(3, 5, grad=False)
    made = casts.transposed(matrix, torch.bfloat16)
    assert made.is_contiguous()
    assert torch.equal(made, matrix.to(torch.bfloat16).t())


class Copies(TorchDispatchMode):
    """Counts by operation the calls that copy one of the given matrices, inside the registered operations too."""

    def __init__(self, matrices):
        super().__init__()
        self.places = {matrix.data_ptr() for matrix in matrices if matrix.numel()}
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastft":
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        made = func(*args, **(kwargs or {}))
        read = {t.data_ptr() for t in tree_leaves(args) if isinstance(t, torch.Tensor)}
        same = isinstance(made, torch.Tensor) and made.data_ptr() in read and not func._schema.name.endswith("_")
        if func._schema.name in COPYING and self.places & read and not same:
            self.counts[func._schema.name.removeprefix("aten::")] += 1
        return made


def test_one_call_copies_all_adapters_of_an_operation():
    leaves, function = projections(torch.bfloat16, (torch.float32,) * 3, random(2, 9, 32, dtype=torch.bfloat16))
    with Copies(leaves[1:]) as forward:
        outputs = function()
    with Copies(leaves[1:]) as backward:
        torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])
    # The transposed matrix by itself: of its copy the layout is kept.
    assert forward.counts == {"cat": 1, "to": 1}
    assert backward.counts == {"cat": 1, "to": 1}


def test_a_feed_forward_copies_its_adapters_in_two_calls_and_one_transpose():
    leaves, function = feed_forward(torch.bfloat16, (torch.float32,) * 3, random(2, 9, 32, dtype=torch.bfloat16))
    with Copies(leaves[1:]) as forward:
        outputs = function()
    with Copies(leaves[1:]) as backward:
        torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])
    # The matrices A of gate and up, then all B; A of down by itself, which the kernels want transposed.
    wanted = {"cat": 2, "to": 1}
    assert forward.counts == wanted
    assert backward.counts == wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_16_bit_factors_are_taken_and_scaled_in_fp32(dtype, monkeypatch):
    asked = []

    def fp32_mm(lhs, rhs):  # a CPU has no such product of 16-bit factors
        asked.append((lhs.dtype, rhs.dtype))
        return torch.mm(lhs.float(), rhs.float())

    monkeypatch.setattr(gemm, "may_sum_in_16_bits", lambda device, given: given == dtype)
    monkeypatch.setattr(gemm, "fp32_mm", fp32_mm)
    shapes, scales = [(7, 33, 3), (5, 33, 0), (0, 33, 4), (3, 9, 5), (8, 33, 1)], [1.7, 2.0, 0.5, 0.3, 1.0]
    given = [dtype, dtype, dtype, torch.float32, dtype]
    results = [torch.float32, torch.float32, dtype, torch.float32, dtype]
    lhs = [random(m, k, dtype=d, grad=False, seed=1) for (m, k, _), d in zip(shapes, given)]
    rhs = [random(k, n, dtype=d, grad=False, seed=2) for (_, k, n), d in zip(shapes, given)]
    together = gemm.accumulating_mms(lhs, rhs, results, scales)
    assert asked == [(dtype, dtype)] * 2  # not for a matrix of no elements
    for index, (left, right, made, result, scale) in enumerate(zip(lhs, rhs, together, results, scales, strict=True)):
        alone = gemm.accumulating_mm(left, right, result, scale)
        assert made.dtype == result and torch.equal(made, alone) and made.shape == (shapes[index][0], shapes[index][2])
        if given[index] == dtype:
            assert torch.equal(made, torch.mm(left.float(), right.float()).mul_(scale).to(result))
        exact = scale * left.double() @ right.double()
        allowed = 2.0**-7 if result == torch.bfloat16 else 2.0**-10 if result == torch.float16 else 2.0**-19
        assert (
            (made.double() - exact).abs() <= allowed * (abs(scale) * left.double().abs() @ right.double().abs())
        ).all()


def test_where_a_gemm_may_sum_in_16_bits():
    asked = [(device, dtype) for device in ("cuda", "cpu") for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    found = [gemm.may_sum_in_16_bits(torch.device(device), dtype) for device, dtype in asked]
    assert found == [True, True, False, False, False, False]
