"""Attention of completions that share a prompt, against an explicit mask and against each behind its own copy."""

import math

import pytest
import torch

from fastft.errors import UsageError
from fastft.kernels.attention import Numbers, SharedPrompts, attention, masked_attention, shared_attention, shared_pairs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# prompt length, lengths of its completions
GROUPS = {
    "one": [(5, (7,))],
    "several": [(9, (4, 1, 6)), (1, (3, 3)), (17, (2,)), (4, (1, 1, 1, 1, 13))],
    "long": [(130, (65, 200, 1)), (64, (129,))],
}
DRAWS = {"one": 8, "several": 4, "long": 1}  # of a dozen tokens the error of one draw is noise
DTYPES = [torch.float32, torch.bfloat16, torch.float16] if DEVICE == "cpu" else [torch.bfloat16, torch.float16]


def offsets(sizes):
    return torch.tensor([0, *sizes], dtype=torch.int32, device=DEVICE).cumsum(0, dtype=torch.int32)


def describe(groups):
    prompts, completions = [p for p, _ in groups], [list(c) for _, c in groups]
    flat = [size for sizes in completions for size in sizes]
    rows = [p + c for p, sizes in groups for c in sizes]
    totals = [sum(sizes) for sizes in completions]
    numbers = Numbers(sum(prompts), max(prompts + flat), max(prompts), max(totals), max(rows))
    return SharedPrompts(offsets(prompts + flat), offsets(prompts), offsets(totals), torch.tensor(numbers))


def make(groups, dtype, heads=4, kv_heads=2, size=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    total = sum(p + sum(c) for p, c in groups)
    shapes = [(1, total, n, size) for n in (heads, kv_heads, kv_heads)]
    made = [torch.randn(shape, generator=g).to(DEVICE, dtype).transpose(1, 2) for shape in shapes]
    upstream = torch.randn(1, heads, total, size, generator=g).to(DEVICE, dtype)
    return [t.requires_grad_() for t in made], upstream


def with_gradients(function, inputs, upstream):
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = function(*inputs)
    return [out, *torch.autograd.grad(out, inputs, upstream)]


def copies(groups, scale):
    """Return a function that attends for every completion behind a copy of its prompt."""

    def function(q, k, v):
        pieces, start, behind = [], 0, sum(p for p, _ in groups)
        for prompt, sizes in groups:
            above = slice(start, start + prompt)
            outs = []
            for size in sizes:
                own = slice(behind, behind + size)
                row = [torch.cat([t[:, :, above], t[:, :, own]], 2) for t in (q, k, v)]
                mask = torch.ones(prompt + size, prompt + size, dtype=torch.bool, device=q.device).tril()
                outs.append(masked_attention(*row, mask, scale))
                behind += size
            start += prompt
            pieces.append((outs[0][:, :, :prompt], [out[:, :, prompt:] for out in outs]))
        return torch.cat([p for p, _ in pieces] + [c for _, cs in pieces for c in cs], 2)

    return function


def ratio(truth, value):
    error = ((value.double() - truth).norm() / truth.norm()).item()
    return error if error == error else math.inf


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", GROUPS)
def test_equals_a_copy_of_the_prompt_for_each(kind, dtype, poisoned_empty):
    groups, scale = GROUPS[kind], 0.3
    shared, errors = describe(groups), []
    for seed in range(DRAWS[kind]):
        inputs, upstream = make(groups, dtype, seed=seed)
        truth = with_gradients(copies(groups, scale), [t.double() for t in inputs], upstream.double())
        eager = with_gradients(copies(groups, scale), inputs, upstream)
        got = with_gradients(lambda q, k, v: shared_attention(q, k, v, scale, shared), inputs, upstream)
        assert all(value.dtype == dtype for value in got)
        errors.append([(ratio(t, e), ratio(t, g)) for t, e, g in zip(truth, eager, got, strict=True)])
    for name, of_draws in zip(("out", "dq", "dk", "dv"), zip(*errors, strict=True), strict=True):
        eager, ours = (math.sqrt(sum(error**2 for error in made) / len(made)) for made in zip(*of_draws, strict=True))
        budget = 1.25 * eager + 8 * torch.finfo(torch.float32).eps
        assert ours <= budget, f"{name}: {ours:.2e} > {budget:.2e}"


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_the_mask_says_the_same(groups):
    inputs, _ = make(groups, torch.float32)
    mask = shared_pairs(inputs[0].shape[2], describe(groups))
    got = masked_attention(*inputs, mask, 0.3)
    assert ratio(copies(groups, 0.3)(*[t.double() for t in inputs]), got) < 1e-6


def test_prompts_alone_are_packed_documents():
    """With one completion each the same tokens, laid out as documents, have the same attention."""
    groups = [(5, (7,)), (3, (2,))]
    inputs, _ = make(groups, torch.float32)
    order = torch.tensor([*range(5), *range(8, 15), *range(5, 8), 15, 16], device=DEVICE)
    packed = attention(*[t[:, :, order] for t in inputs], 0.3, cu_seqlens=offsets([12, 5]), max_length=12)
    got = shared_attention(*inputs, 0.3, describe(groups))
    assert ratio(packed.double(), got[:, :, order]) < 1e-6


def test_gradcheck():
    groups = [(2, (1, 3)), (3, (2,))]
    inputs, _ = make(groups, torch.float64, size=4)
    if DEVICE == "cpu":
        function = lambda q, k, v: shared_attention(q, k, v, 0.4, describe(groups))  # noqa: E731
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def test_opcheck():
    groups, dtype = GROUPS["several"], torch.float32 if DEVICE == "cpu" else torch.bfloat16
    inputs, _ = make(groups, dtype)
    q, k, v = (t.detach().transpose(1, 2)[0].contiguous().requires_grad_() for t in inputs)
    where = (*describe(groups), 0.3)
    torch.library.opcheck(torch.ops.fastft.shared_attention, (q, k, v, *where, 99))
    out, lse = torch.ops.fastft.shared_attention(q, k, v, *where, -1)
    saved = (t.detach() for t in (q, k, v, out, lse))
    torch.library.opcheck(torch.ops.fastft.shared_attention_backward, (torch.randn_like(out), *saved, *where))


def test_rows_beyond_a_window_are_refused():
    inputs, _ = make(GROUPS["several"], torch.float32)
    with pytest.raises(UsageError, match="rows of 19 tokens"):
        shared_attention(*inputs, 0.3, describe(GROUPS["several"]), window=18)
    shared_attention(*inputs, 0.3, describe(GROUPS["several"]), window=19)


def test_compiles_whole_and_once_for_all_lengths():
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    def layer(q, k, v, shared):
        return shared_attention(q * 1.0, k, v, 0.3, shared)

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    batches = [
        GROUPS["several"],
        GROUPS["long"],
        [(7, (2, 2))],
        [(20, (5,)), (20, (5, 5))],
        [(3, (9, 8, 7))],
        GROUPS["one"],
    ]
    for groups in batches:
        inputs, _ = make(groups, torch.float32 if DEVICE == "cpu" else torch.bfloat16)
        shared = describe(groups)
        assert torch.equal(compiled(*inputs, shared), layer(*inputs, shared))
    assert len(seen) <= 3, len(seen)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (32, 4)])
def test_heads_on_a_gpu(heads, size):
    groups = [(1024, (512,) * 4), (70, (1, 300))]
    inputs, upstream = make(groups, torch.bfloat16, *heads, size=size)
    scale, shared = size**-0.5, describe(groups)
    truth = with_gradients(copies(groups, scale), [t.double() for t in inputs], upstream.double())
    eager = with_gradients(copies(groups, scale), inputs, upstream)
    got = with_gradients(lambda q, k, v: shared_attention(q, k, v, scale, shared), inputs, upstream)
    for name, t, e, g in zip(("out", "dq", "dk", "dv"), truth, eager, got, strict=True):
        assert ratio(t, g) <= 1.25 * ratio(t, e), name


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
def test_no_square_mask_on_a_gpu():
    groups = [(4096, (512,) * 8)]
    inputs, upstream = make(groups, torch.bfloat16, 8, 2, size=64)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = shared_attention(*inputs, 0.125, describe(groups))
    torch.autograd.grad(out, inputs, upstream)
    assert torch.cuda.max_memory_allocated() - before < 8192 * 8192 * 2
