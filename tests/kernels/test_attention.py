"""Attention against an explicit fp64 softmax: dense, windowed, packed, soft-capped, grouped, in every combination."""

import itertools
import math

import pytest
import torch

from fastft.kernels.attention import attention, masked_attention, parts
from fastft.kernels.attention.packed import packed_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = (19, 1, 26, 5)
OFFSETS = (0, 19, 20, 46, 51)
CASES = list(itertools.product([None, 1, 7, 64], [None, 1.5], [False, True]))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def exact(q, k, v, scale, window, softcap, packed):
    """Return attention by loops over documents and an explicit mask."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    length = q.shape[2]
    spans = list(itertools.pairwise(OFFSETS)) if packed else [(0, length)]
    out = torch.zeros_like(q)
    for start, end in spans:
        scores = q[:, :, start:end] @ k[:, :, start:end].transpose(-1, -2) * scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        i = torch.arange(end - start, device=q.device)
        hidden = (i[None] > i[:, None]) | (i[:, None] - i[None] >= (window or length))
        out[:, :, start:end] = torch.softmax(scores.masked_fill(hidden, -math.inf), -1) @ v[:, :, start:end]
    return out


def make(dtype, heads=4, kv_heads=2, rows=1, length=51, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, length, n, size) for n in (heads, kv_heads, kv_heads)]
    made = [torch.randn(shape, generator=generator).to(DEVICE, dtype).transpose(1, 2) for shape in shapes]
    upstream = torch.randn(rows, heads, length, size, generator=generator).to(DEVICE, dtype)
    return [t.requires_grad_() for t in made], upstream


def with_gradients(function, inputs, upstream):
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = function(*inputs)
    return [out, *torch.autograd.grad(out, inputs, upstream)]


def ratio(truth, value):
    error = ((value.double() - truth).norm() / truth.norm()).item()
    return error if error == error else math.inf


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window, softcap, packed", CASES)
def test_against_fp64(window, softcap, packed, dtype):
    inputs, upstream = make(dtype)
    scale = 0.3
    offsets = torch.tensor(OFFSETS, dtype=torch.int32, device=DEVICE) if packed else None

    def ours(q, k, v):
        return attention(
            q, k, v, scale, window=window, softcap=softcap, cu_seqlens=offsets, max_length=26 if packed else None
        )

    def plain(q, k, v):
        return exact(q, k, v, scale, window, softcap, packed)

    truth = with_gradients(plain, [t.double() for t in inputs], upstream.double())
    eager = with_gradients(plain, inputs, upstream)
    got = with_gradients(ours, inputs, upstream)
    for name, t, e, g in zip(("out", "dq", "dk", "dv"), truth, eager, got, strict=True):
        # A window of one token leaves nothing to q and k: of their gradient, 0, rounding errors remain.
        error = ratio(t, g) if t.norm() > 1e-9 else g.double().norm().item()
        vanishing = 1e-4 if dtype == torch.float32 else 1e-2
        budget = 1.25 * ratio(t, e) if t.norm() > 1e-9 else vanishing
        assert error <= budget + 8 * torch.finfo(torch.float32).eps, f"{name}: {error:.2e} > {budget:.2e}"


def packed(q, k, v, scale, window=None, longest=26):
    """Return what the op makes of [1, H, T, D], in that layout."""
    offsets = torch.tensor(OFFSETS, dtype=torch.int32, device=q.device)
    rows = (t.transpose(1, 2)[0] for t in (q, k, v))
    return packed_attention(*rows, scale, offsets, longest, window)[None].transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("window", [None, 1, 7, 64])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_packed_documents_by_the_operation_itself(window, kv_heads, dtype, poisoned_empty):
    if DEVICE == "cuda" and dtype == torch.float32:
        pytest.skip("it runs where FlashAttention does not: on a CPU")
    inputs, upstream = make(dtype, kv_heads=kv_heads)
    truth = with_gradients(
        lambda *t: exact(*t, 0.3, window, None, True), [t.double() for t in inputs], upstream.double()
    )
    eager = with_gradients(lambda *t: exact(*t, 0.3, window, None, True), inputs, upstream)
    got = with_gradients(lambda *t: packed(*t, 0.3, window), inputs, upstream)
    for name, t, e, g in zip(("out", "dq", "dk", "dv"), truth, eager, got, strict=True):
        assert g.dtype == dtype
        error = ratio(t, g) if t.norm() > 1e-9 else g.double().norm().item()
        budget = 1.25 * ratio(t, e) if t.norm() > 1e-9 else 1e-4 if dtype == torch.float32 else 1e-2
        assert error <= budget + 8 * torch.finfo(torch.float32).eps, f"{name}: {error:.2e} > {budget:.2e}"


@pytest.mark.skipif(DEVICE == "cuda", reason="fp64 is for the CPU")
@pytest.mark.parametrize("window", [None, 3])
def test_packed_gradcheck(window):
    inputs, _ = make(torch.float64, size=4)
    assert torch.autograd.gradcheck(lambda *t: packed(*t, 0.4, window), inputs, fast_mode=True)


@pytest.mark.parametrize("before", [-1, 6])
def test_packed_opcheck(before):
    inputs, _ = make(torch.float32 if DEVICE == "cpu" else torch.bfloat16)
    q, k, v = (t.detach().transpose(1, 2)[0].contiguous().requires_grad_() for t in inputs)
    where = (torch.tensor(OFFSETS, dtype=torch.int32, device=DEVICE), 26, 0.3, before)
    torch.library.opcheck(torch.ops.fastft.packed_attention, (q, k, v, *where))
    out, lse = torch.ops.fastft.packed_attention(q, k, v, *where)
    saved = (t.detach() for t in (q, k, v, out, lse))
    torch.library.opcheck(torch.ops.fastft.packed_attention_backward, (torch.randn_like(out), *saved, *where))


def test_gpus_without_flash_attention_take_plain_torch(monkeypatch):
    monkeypatch.setattr("fastft.kernels.attention.parts.flash_refusal", lambda *given: "")
    for have, flash in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, have=have: have)
        assert parts._flash(torch.empty(1, 1, 64, dtype=torch.float16)) == flash


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batched_rows_with_offsets_equal_each_row_alone(dtype):
    inputs, _ = make(dtype, rows=3, length=17)
    offsets = torch.tensor([0, 5, 17, 34, 40, 51], dtype=torch.int32, device=DEVICE)
    together = attention(*inputs, 0.3, cu_seqlens=offsets, max_length=17)
    for row, (begin, middle) in enumerate([(0, 5), (0, 17), (0, 6)]):
        part = [t[row : row + 1, :, begin:middle] for t in inputs]
        alone = exact(*[t.double() for t in part], 0.3, None, None, False)
        assert ratio(alone, together[row : row + 1, :, begin:middle]) < (2e-6 if dtype == torch.float32 else 6e-3)


def test_a_mask_of_bools_and_an_additive_one_are_the_same():
    inputs, _ = make(torch.float32)
    mask = torch.rand(1, 1, 51, 51, device=DEVICE) > 0.4
    mask |= torch.eye(51, dtype=torch.bool, device=DEVICE)
    additive = torch.zeros(mask.shape, device=DEVICE).masked_fill(~mask, torch.finfo(torch.float32).min)
    for softcap in (None, 2.0):
        a, b = (masked_attention(*inputs, m, 0.3, softcap) for m in (mask, additive))
        assert ratio(a.double(), b) < 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize(
    "window, softcap, packed", [(None, None, True), (512, None, False), (512, None, True), (None, 30.0, True)]
)
def test_long_rows_on_a_gpu_need_no_square_mask(window, softcap, packed):
    inputs, upstream = make(torch.bfloat16, heads=8, kv_heads=2, length=8192, size=64)
    offsets = torch.tensor([0, 3000, 3001, 8192], dtype=torch.int32, device=DEVICE) if packed else None
    function = torch.compile(attention) if softcap else attention
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = function(
        *inputs, 0.125, window=window, softcap=softcap, cu_seqlens=offsets, max_length=5191 if packed else None
    )
    torch.autograd.grad(out, inputs, upstream)
    # Copies, repeated keys and gradients take 8 MiB each; scores would take 2 bytes a pair for each of 8 heads.
    assert torch.cuda.max_memory_allocated() - before < 8192 * 8192 * 2
