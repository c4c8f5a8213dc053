from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend

from fastft.errors import UsageError
from fastft.kernels.attention import attention
from fastft.kernels.rope import ref, rope
from fastft.kernels.rope.launch import launch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# B, H, Hk, T, D, R: grouped and equal heads, whole and partial rotation, odd lengths, widths that are no power of two.
SIZES = [(2, 4, 2, 7, 40, 40), (1, 3, 1, 63, 64, 16), (2, 5, 5, 1, 6, 4), (1, 2, 1, 257, 24, 18), (1, 1, 1, 5, 2, 2)]


def _tables(batch, tokens, pairs, dtype, device, scale=1.2):
    angles = torch.randn(batch, tokens, pairs, generator=torch.Generator().manual_seed(9)) * 3
    return [(table * scale).to(device, dtype) for table in (angles.cos(), angles.sin())]


def _inputs(strided, size, dtype, device, *, table_dtype=None, table_batch=None, layout="transposed"):
    batch, heads, k_heads, tokens, width, rotated = size
    q = strided((batch, heads, tokens, width), layout, dtype, device, seed=1).requires_grad_()
    k = strided((batch, k_heads, tokens, width), layout, dtype, device, seed=2).requires_grad_()
    return [q, k, *_tables(table_batch or batch, tokens, rotated // 2, table_dtype or dtype, device)]


def _compare(compare, args, layout):
    eager = partial(ref.rope, layout=layout)
    compare(partial(rope, layout=layout), eager, eager, args)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ref.LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_fp64(compare, strided, check_dtype, device, size, layout, dtype):
    check_dtype(dtype)
    _compare(compare, _inputs(strided, size, dtype, device), layout)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ref.LAYOUTS)
def test_fp32_tables(compare, strided, check_dtype, device, layout, dtype):
    check_dtype(dtype)
    _compare(compare, _inputs(strided, SIZES[0], dtype, device, table_dtype=torch.float32, table_batch=1), layout)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("memory", ["contiguous", "packed", "columns", "scattered"])
@pytest.mark.parametrize("layout", ref.LAYOUTS)
def test_strides(compare, strided, device, memory, layout):
    q, k, cos, sin = _inputs(strided, (2, 3, 1, 5, 24, 16), torch.float32, device, layout=memory)
    # Tables cut out of the repeated ones that models make, and expanded over the batch.
    cos, sin = (torch.repeat_interleave(table[:1], 2, dim=-1)[..., ::2].expand(2, -1, -1) for table in (cos, sin))
    _compare(compare, [q, k, cos, sin], layout)


@pytest.mark.parametrize("layout", ref.LAYOUTS)
def test_results_are_contiguous_and_lengths_kept(strided, device, layout):
    q, k, cos, sin = _inputs(strided, SIZES[0], torch.float32, device)
    scale = (cos.square() + sin.square()).sqrt()
    rotated = rope(q, k, cos / scale, sin / scale, layout)
    assert all(out.is_contiguous() for out in rotated)
    for out, x in zip(rotated, (q, k)):
        torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("layout", ref.LAYOUTS)
def test_plain_results_lie_as_projections_do_and_so_does_what_attention_makes_of_them(device, layout):
    """[B, T, H, D] in memory: nothing is copied on the way from the projections into attention and out of it."""
    dtype, length, width = (torch.bfloat16, 128, 64) if device.type == "cuda" else (torch.float32, 9, 16)
    made = partial(torch.randn, device=device, dtype=dtype)
    q, k, v = (made(2, length, heads, width, requires_grad=True).transpose(1, 2) for heads in (4, 2, 2))
    q, k = ref.rope(q, k, *_tables(1, length, width // 2, dtype, device), layout)
    assert all(x.transpose(1, 2).is_contiguous() for x in (q, k))
    if device.type == "cuda":
        chosen = SDPBackend(torch._fused_sdp_choice(q, k, v, is_causal=True, scale=0.25, enable_gqa=True))
        if chosen != SDPBackend.CUDNN_ATTENTION:
            pytest.skip(f"torch chooses {chosen.name} on this GPU; cuDNN's attention is what writes as it reads")
    out = attention(q, k, v, 0.25)
    assert out.transpose(1, 2).is_contiguous()
    grads = torch.autograd.grad(out, (q, k, v), made(2, length, 4, width).transpose(1, 2))
    assert all(grad.transpose(1, 2).is_contiguous() for grad in grads)


def test_expanded_gradient_and_unused_keys(strided, device):
    q, k, cos, sin = _inputs(strided, SIZES[0], torch.float32, device)
    rope(q, k, cos, sin, "half")[0].sum().backward()
    got, q.grad = q.grad, None
    assert k.grad is None or not k.grad.any()
    ref.rope(q, k, cos, sin, "half")[0].sum().backward()
    torch.testing.assert_close(got, q.grad, rtol=1e-5, atol=1e-5)


def test_no_tokens(device):
    q, table = torch.empty(2, 3, 0, 8, device=device), torch.empty(2, 0, 4, device=device)
    assert [out.shape for out in rope(q, q[:, :1], table, table, "half")] == [(2, 3, 0, 8), (2, 1, 0, 8)]


# How each family's tables reach its function: whole (repeated after one another or in pairs), and in which dtype.
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(
    "family, layout, repeat, rotated, table_dtype",
    [
        ("llama", "half", "halves", 32, None),
        ("qwen3", "half", "halves", 32, None),
        ("phi3", "half", "halves", 24, None),
        ("olmo2", "half", "halves", 32, torch.float32),
        ("cohere", "interleaved", "pairs", 32, None),
        ("cohere2", "interleaved", "pairs", 32, None),
        ("glm4", "interleaved", "halves", 16, None),
    ],
)
def test_equals_transformers(
    same_as_eager, strided, check_dtype, device, family, layout, repeat, rotated, table_dtype, dtype
):
    check_dtype(dtype)
    modeling = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    size = (2, 4, 2, 31, 32, rotated)
    q, k, cos, sin = _inputs(strided, size, dtype, device, table_dtype=table_dtype)
    q, k = q.detach(), k.detach()
    if repeat == "halves":
        whole = [torch.cat((table, table), dim=-1) for table in (cos, sin)]
    else:
        whole = [torch.repeat_interleave(table, 2, dim=-1) for table in (cos, sin)]
    expected = modeling.apply_rotary_pos_emb(q, k, *whole)
    if family.startswith("cohere"):  # rotates in fp32
        cos, sin = cos.float(), sin.float()
    for out, reference in zip(rope(q, k, cos, sin, layout), expected):
        same_as_eager(out, reference)


def test_runs_the_kernel(kernel_device, strided, monkeypatch):
    def unwanted(*_):
        raise AssertionError("the reference ran")

    monkeypatch.setattr(ref, "rope", unwanted)
    args = _inputs(strided, SIZES[0], torch.float32, kernel_device)
    q, k = rope(*args, "half")
    assert torch.autograd.grad(q.sum() + k.sum(), args[:2])[0].isfinite().all()


@pytest.mark.parametrize("layout", ref.LAYOUTS)
@pytest.mark.parametrize("memory", ["contiguous", "transposed", "packed"])
@pytest.mark.parametrize("inverse", [False, True])
def test_opcheck(strided, device, memory, layout, inverse):
    args = _inputs(strided, (2, 4, 2, 7, 24, 16), torch.float32, device, layout=memory)
    torch.library.opcheck(torch.ops.fastft.rope.default, (*args, layout, inverse))


@pytest.mark.parametrize("layout", ref.LAYOUTS)
def test_gradcheck_twice(strided, device, layout):
    args = _inputs(strided, (2, 2, 1, 3, 8, 6), torch.float64, device)
    assert torch.autograd.gradcheck(lambda q, k: rope(q, k, *args[2:], layout), args[:2])
    assert torch.autograd.gradgradcheck(lambda q, k: rope(q, k, *args[2:], layout), args[:2])


@pytest.mark.parametrize("layout", ref.LAYOUTS)
def test_compiled(strided, device, layout):
    args = _inputs(strided, SIZES[0], torch.float32, device)

    def step(q, k, cos, sin):
        q, k = rope(q * 2, k, cos, sin, layout)
        return q * 3, k

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for fn in (step, compiled):
        q, k = fn(*args)
        results.append((q, k, *torch.autograd.grad(q.square().sum() + k.square().sum(), args[:2])))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_mistakes_are_told_together():
    q, k, table = torch.ones(2, 3, 5, 8), torch.ones(2, 1, 4, 8), torch.ones(1, 5, 6)
    with pytest.raises(UsageError) as caught:
        rope(q, k, table, table[..., :2].double(), "neox")
    assert len(caught.value.problems) == 5 and "'neox'" in str(caught.value) and "(2, 1, 4, 8)" in str(caught.value)


@pytest.mark.parametrize("pairs, passed", [(64, 0), (48, 32), (1, 0), (8, 112), (2048, 0), (0, 64)])
def test_launch_covers_all_rows(pairs, passed):
    cfg = launch(8192 * 32, 8192 * 8 + 1, pairs, passed)
    assert cfg.pairs_block >= pairs and cfg.pass_block >= passed
    for count, programs in ((8192 * 32, cfg.q_programs), (8192 * 8 + 1, cfg.k_programs)):
        assert cfg.rows * programs >= count > cfg.rows * (programs - 1)


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_2_to_the_31_elements(cuda):
    tokens, heads, width = 2**19 + 3, 32, 128
    q = torch.randn(1, tokens, heads, width, dtype=torch.bfloat16, device=cuda).transpose(1, 2)
    k = torch.randn(1, tokens, 1, width, dtype=torch.bfloat16, device=cuda).transpose(1, 2)
    cos, sin = _tables(1, tokens, width // 2, torch.bfloat16, cuda)
    out = rope(q, k, cos, sin, "half")
    for part in (slice(0, 8), slice(tokens // 2, tokens // 2 + 8), slice(tokens - 8, tokens)):
        expected = ref.rope(q[:, :, part], k[:, :, part], cos[:, part], sin[:, part], "half")
        assert all(torch.equal(ours[:, :, part], theirs) for ours, theirs in zip(out, expected))
