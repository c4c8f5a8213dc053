"""Log-probabilities and entropies under a head: both, and every gradient, against fp64, whatever the chunks."""

import importlib.util
from pathlib import Path

import pytest
import torch

from fastft.environment import triton_interpreted
from fastft.errors import UsageError
from fastft.kernels import linear_logprob as room
from fastft.kernels.linear_logprob.launch import GPU_LOGITS_BYTES, LogprobLaunch
from fastft.kernels.linear_logprob.op import linear_logprob
from fastft.memory import estimate
from fastft.memory.shape import Shape

_spec = importlib.util.spec_from_file_location("matrix_judge", Path(__file__).parent / "matrix_judge.py")
judge = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(judge)
DEVICE = judge.DEVICE
EPS32 = 2.0**-23
KERNEL = DEVICE == "cuda" or triton_interpreted()
FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
NAMES = ("logprobs", "entropies", "dhidden", "dweight", "dbias")

SETTINGS = {
    "plain": {},
    "scale": {"scale": 0.0625},
    "softcap": {"softcap": 5.0},
    "cool": {"temperature": 0.6},
    "all": {"scale": 0.3, "softcap": 2.0, "temperature": 1.7},
}


def make(shape=(3, 7), d=24, vocab=101, dtype=FP32, weight_dtype=None, bias=True, size=1.0, masked=0.4, seed=0):
    """Return (hidden, weight, targets, bias) leaves; about `masked` of the targets are -100. size: of the logits."""
    g = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(*shape, d, generator=g) * size).to(DEVICE, dtype).requires_grad_()
    weight = (torch.randn(vocab, d, generator=g) * d**-0.5).to(DEVICE, weight_dtype or dtype).requires_grad_()
    targets = torch.randint(0, vocab, shape, generator=g)
    targets[torch.rand(*shape, generator=g) < masked] = -100
    offset = (torch.randn(vocab, generator=g) * 0.3).to(DEVICE, weight_dtype or dtype).requires_grad_()
    return hidden, weight, targets.to(DEVICE), offset if bias else None


def upstreams(shape):
    """Return a gradient for each log-probability and each entropy, of both signs."""
    g = torch.Generator().manual_seed(9)
    return [torch.randn(shape, generator=g).to(DEVICE) for _ in range(2)]


def run(function, inputs, entropy=True, frozen=False, **settings):
    """Return log-probabilities, entropies, and the gradients of hidden, weight and bias; frozen: of hidden alone."""
    hidden, weight, targets, bias = inputs
    if frozen:
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    values = function(hidden, weight, targets, bias, entropy=entropy, **settings)
    values = [value for value in values if value is not None]
    leaves = [hidden] if frozen else [hidden, weight, *([] if bias is None else [bias])]
    ups = [up.to(value.dtype) for value, up in zip(values, upstreams(targets.shape))]
    total = sum((value * up).sum() for value, up in zip(values, ups) if value.requires_grad)
    return [*values, *torch.autograd.grad(total, leaves)]


def as_fp64(inputs):
    hidden, weight, targets, bias = inputs
    double = [None if t is None else t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    return double[0], double[1], targets, double[2]


def check(inputs, chunk=None, slack=1.25, entropy=True, frozen=False, **settings):
    more = {"entropy": entropy, "frozen": frozen, **settings}
    truth = run(room.ref.linear_logprob, as_fp64(inputs), **more)
    eager = run(room.ref.linear_logprob, inputs, **more)
    got = run(linear_logprob, inputs, chunk_rows=chunk, **more)
    assert [t.dtype for t in got] == [t.dtype for t in eager]
    names = [name for name in NAMES if entropy or name != "entropies"]
    for name, value, budget, exact in zip(names, got, eager, truth):
        judge.assert_within(name, value, budget, exact, slack=slack, floor=4 * EPS32)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_values_and_all_gradients(settings, dtype, bias, poisoned_empty):
    check(make(dtype=dtype, bias=bias), chunk=4, **settings)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("entropy", [False, True], ids=["slopes", "entropy"])
def test_under_a_frozen_head(settings, dtype, entropy, poisoned_empty):
    """Without an entropy's gradient the slopes made in the forward are scaled, and nothing is rounded once more."""
    check(make(dtype=dtype, shape=(4, 16)), chunk=10, frozen=True, entropy=entropy, **settings)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("size", [0.0, 1e-3, 40.0], ids=["equal", "flat", "peaked"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_flat_and_peaked_logits(size, dtype, frozen):
    check(make(dtype=dtype, size=size, shape=(65,)), frozen=frozen, entropy=False)
    if size:  # of equal logits the entropy's gradient is 0, and only rounding is left of it
        check(make(dtype=dtype, size=size, shape=(65,)), frozen=frozen, slack=1.5)


@pytest.mark.parametrize("vocab", [2, 3, 127, 128, 129, 1025])
@pytest.mark.parametrize("chunk", [1, 5, None])
def test_odd_vocabularies_and_chunks(vocab, chunk):
    check(make(vocab=vocab, shape=(2, 5), d=7), chunk=chunk, temperature=0.9)


def test_slopes_and_logits_made_again_give_the_same_gradient():
    hidden, weight, targets, bias = make(shape=(33,))
    scaled = run(linear_logprob, (hidden, weight, targets, bias), entropy=False, frozen=True, softcap=3.0)[1]
    again = run(linear_logprob, (hidden, weight, targets, bias), entropy=False, softcap=3.0)[1]
    assert judge.rms_ratio(scaled, again) < 4 * EPS32


def test_entropies_without_gradient_are_the_same_and_constants():
    inputs = make(shape=(33,))
    got = run(linear_logprob, inputs, frozen=True, entropy_gradient=False, temperature=0.7)
    want = run(linear_logprob, inputs, temperature=0.7)
    assert got[0].requires_grad and not got[1].requires_grad
    assert torch.equal(got[1], want[1].detach())
    assert judge.rms_ratio(got[2], run(linear_logprob, inputs, entropy=False, temperature=0.7)[1]) < 4 * EPS32


def test_backward_twice_gives_the_same():
    hidden, weight, targets, bias = make()
    for inputs in ((hidden, weight, targets, bias), (hidden, weight.detach(), targets, bias.detach())):
        value = linear_logprob(*inputs)[0].sum()
        first = torch.autograd.grad(value, hidden, retain_graph=True)[0]
        assert torch.equal(torch.autograd.grad(value, hidden)[0], first)


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 2), (1, 2)])
@pytest.mark.parametrize("entropy", [False, True])
def test_only_the_gradients_that_are_needed(which, entropy):
    inputs = make()
    leaves = [inputs[0], inputs[1], inputs[3]]
    full = run(linear_logprob, inputs, entropy=entropy)[-3:]
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i in which)
    values = linear_logprob(*inputs, entropy=entropy)
    total = sum((v * up).sum() for v, up in zip(values, upstreams(inputs[2].shape)) if v is not None)
    for value, i in zip(torch.autograd.grad(total, [leaves[i] for i in which]), which):
        assert judge.rms_ratio(value, full[i]) < 4 * EPS32


def test_entropies_alone_may_have_a_gradient():
    inputs = make()
    got = linear_logprob(*inputs, entropy=True)[1].square().sum()
    exact_inputs = as_fp64(inputs)
    exact = room.ref.linear_logprob(*exact_inputs, entropy=True)[1].square().sum()
    for i in (0, 1, 3):
        ours, truth = (
            torch.autograd.grad(v, t[i], retain_graph=True)[0] for v, t in ((got, inputs), (exact, exact_inputs))
        )
        assert judge.rms_ratio(ours, truth) < 16 * EPS32


def test_nothing_is_kept_without_gradient_mode():
    inputs = make()
    want = linear_logprob(*inputs)[0]
    with torch.no_grad():
        value = linear_logprob(*inputs)[0]
        flat = (inputs[0].reshape(-1, 24), inputs[1], inputs[2].reshape(-1), inputs[3])
        outputs = torch.ops.fastft.linear_logprob(*flat, 1.0, 0.0, 1.0, False, -100, -1, 0, False)
    assert outputs[4].numel() == outputs[1].numel() == 0
    assert not value.requires_grad and torch.equal(value, want.detach())


def test_no_targets_at_all():
    inputs = make(masked=2.0)
    assert (inputs[2] == -100).all()
    for frozen in (False, True):
        assert all(not v.any() for v in run(linear_logprob, inputs, entropy=not frozen, frozen=frozen))
    empty = make(shape=(0,))
    assert [v.shape for v in linear_logprob(*empty, entropy=True)] == [(0,), (0,)]


def test_rows_without_a_target_are_zero_whatever_they_hold():
    inputs = make()
    for frozen in (False, True):
        logprobs, *_, grad = run(linear_logprob, inputs, entropy=False, frozen=frozen)[:2]
        assert not logprobs[inputs[2] == -100].any() and not grad[inputs[2] == -100].any()
        assert (grad[inputs[2] != -100].abs().sum(-1) > 0).all()


def test_another_ignore_index():
    inputs = make(dtype=FP64)
    targets = inputs[2].masked_fill(inputs[2] == -100, 3)
    inputs = (*inputs[:2], targets, inputs[3])
    got = run(linear_logprob, inputs, ignore_index=3)
    for value, exact in zip(got, run(room.ref.linear_logprob, inputs, ignore_index=3)):
        assert judge.rms_ratio(value, exact) < 1e-12


@pytest.mark.parametrize("bound", [0, 1, 30])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_a_bound_on_the_targets_changes_nothing(bound, frozen):
    inputs = make()
    count = int((inputs[2] != -100).sum())
    want = run(linear_logprob, inputs, entropy=not frozen, frozen=frozen)
    got = run(linear_logprob, inputs, entropy=not frozen, frozen=frozen, valid_rows=count + bound)
    for value, same in zip(got, want):
        assert judge.rms_ratio(value, same) < 4 * EPS32
    lost = linear_logprob(*inputs, entropy=True, valid_rows=count - 1)
    assert all(v.isnan().all() for v in lost)


@pytest.mark.parametrize("target", [101, -1, -101, 2**40])
def test_a_target_out_of_range(target):
    hidden, weight, targets, bias = make()
    targets[0, 0] = target
    if not KERNEL:
        with pytest.raises(UsageError, match=f"targets: expected 0 to 100, or -100 for none, got {target}"):
            linear_logprob(hidden, weight, targets, bias)
        return
    for frozen in (False, True):
        logprobs, dhidden = run(linear_logprob, (hidden, weight, targets, bias), entropy=False, frozen=frozen)[:2]
        assert logprobs[0, 0].isnan() and dhidden[0, 0].isnan().all()
        assert dhidden.reshape(-1, 24)[1:].isfinite().all() and logprobs.reshape(-1)[1:].isfinite().all()


def test_infinite_logits_of_forbidden_tokens():
    hidden, weight, targets, _ = make(masked=0.0)
    targets = targets.clamp(max=49)
    bias = torch.zeros(101, device=DEVICE)
    bias[50:] = -float("inf")
    inputs = (hidden, weight, targets, bias.requires_grad_())
    got = run(linear_logprob, inputs)
    for value, exact in zip(got, run(room.ref.linear_logprob, as_fp64(inputs))):
        assert judge.rms_ratio(value, exact) < 1e-6


def test_input_that_is_not_contiguous():
    hidden, weight, targets, bias = make(shape=(4, 6))
    hidden = hidden.detach().transpose(0, 1).requires_grad_()
    weight = weight.detach().t().contiguous().t().requires_grad_()
    check((hidden, weight, targets.t(), bias))
    check((hidden, weight, targets.t(), bias), frozen=True, entropy=False)


def test_head_in_fp32_under_hidden_states_in_bf16_gets_fp32_gradients():
    hidden, weight, targets, bias = make(dtype=BF16, weight_dtype=FP32, shape=(64,))
    got = run(linear_logprob, (hidden, weight, targets, bias), chunk_rows=8)
    assert [t.dtype for t in got] == [FP32, FP32, BF16, FP32, FP32]
    rounded = [weight.detach().bfloat16().requires_grad_(), targets, bias.detach().bfloat16().requires_grad_()]
    truth = run(room.ref.linear_logprob, as_fp64((hidden, *rounded)))
    eager = run(room.ref.linear_logprob, (hidden, *rounded))
    for name, value, budget, exact in zip(NAMES, got, eager, truth):
        judge.assert_within(name, value, budget, exact, slack=1.25, floor=4 * EPS32)


def test_autocast():
    inputs = make(shape=(40,))
    with torch.autocast(DEVICE, dtype=BF16):
        got = run(linear_logprob, inputs)
        eager = run(room.ref.linear_logprob, inputs)
    assert [t.dtype for t in got] == [FP32] * 5
    for name, value, budget, exact in zip(NAMES, got, eager, run(room.ref.linear_logprob, as_fp64(inputs))):
        judge.assert_within(name, value, budget, exact, slack=1.25)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_gradcheck(settings):
    hidden, weight, targets, bias = make(dtype=FP64, shape=(5,), d=4, vocab=9)

    def both(h, w, b):
        return linear_logprob(h, w, targets, b, chunk_rows=2, entropy=True, **settings)

    assert torch.autograd.gradcheck(both, (hidden, weight, bias), fast_mode=True)

    def slopes(h):
        return linear_logprob(h, weight.detach(), targets, chunk_rows=2, **settings)[0]

    assert torch.autograd.gradcheck(slopes, (hidden,), fast_mode=True)


@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(bias):
    hidden, weight, targets, offset = make(shape=(9,), bias=bias)
    ops = torch.ops.fastft
    torch.library.opcheck(
        ops.linear_logprob, (hidden, weight, targets, offset, 0.5, 3.0, 0.7, True, -100, -1, 4, False)
    )
    still = [None if t is None else t.detach() for t in (weight, targets, offset)]
    torch.library.opcheck(ops.linear_logprob, (hidden, *still, 1.0, 0.0, 1.0, False, -100, 8, 0, True))
    rows = [torch.rand(9, device=DEVICE) for _ in range(5)]
    torch.library.opcheck(
        ops.linear_logprob_backward,
        (*rows[:2], hidden.detach(), *still, *rows[2:], 0.5, 3.0, 0.7, -100, -1, 4, True, True, bias),
    )
    torch.library.opcheck(ops.scale_rows, (hidden.detach(), rows[0], BF16))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic, frozen):
    inputs = make()
    settings = {"softcap": 3.0, "scale": 0.5, "temperature": 0.8, "entropy": not frozen, "frozen": frozen}
    want = run(linear_logprob, inputs, **settings)
    compiled = torch.compile(linear_logprob, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for value, same in zip(run(compiled, inputs, **settings), want):
        assert judge.rms_ratio(value, same) < 1e-6


def test_every_mistake_is_told_at_once():
    hidden, weight, targets, bias = make()
    wrong = ("weight", "targets", "bias", "temperature", "scale", "softcap")
    with pytest.raises(UsageError, match="(.|\n)*".join(f"{name}: " for name in wrong)):
        linear_logprob(hidden, weight[:, :3], targets[:2], bias[:4], temperature=0.0, scale=-1.0, softcap=-30.0)


def peak_of(function):
    """Return by how many bytes the tensors alive at once, on the CPU, grow while `function` runs."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    alive = most = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


@pytest.mark.skipif(DEVICE != "cpu" or triton_interpreted(), reason="counts the tensors of a CPU")
@pytest.mark.parametrize("gradients", [False, True], ids=["values", "gradients"])
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
def test_memory_is_a_tenth_of_the_logits(gradients, entropy):
    """4,096 rows, V / D = 32 as in a model of 8B; a chunk has the share of all rows that it has there: 1 in 32.

    Of a chunk the plain torch that runs here holds four copies, the kernels none: twice as many chunks."""
    n, vocab, d = 4096, 2048, 64
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=g).requires_grad_(gradients)
    weight, targets = torch.randn(vocab, d, generator=g) / 8, torch.randint(0, vocab, (n,), generator=g)

    def step():
        values = linear_logprob(hidden, weight, targets, entropy=entropy, chunk_rows=n // 64)
        if gradients:
            torch.autograd.grad(sum(v.sum() for v in values if v is not None), hidden)

    def plain():
        values = room.ref.linear_logprob(hidden, weight, targets, entropy=entropy)
        if gradients:
            torch.autograd.grad(sum(v.sum() for v in values if v is not None), hidden)

    logits = n * vocab * 4
    step()
    assert peak_of(plain) > logits  # the count sees what a plain computation holds
    assert peak_of(step) < logits / 10


@pytest.mark.skipif(DEVICE != "cpu" or triton_interpreted(), reason="counts the tensors of a CPU")
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_the_memory_estimate_is_what_is_held(trained, dtype, monkeypatch):
    """Two thirds of the tokens have a log-probability, gathered from all as `completion_logprobs` does. The chunk is so
    small that the copies of it that plain torch makes, where the kernels make none, do not count."""
    tokens, rows, vocab, d, height = 4503, 3002, 1024 if trained else 16, 256, 4
    monkeypatch.setattr("fastft.kernels.linear_logprob.op.SCALED_ROWS", 16)  # of which a CPU makes a copy
    monkeypatch.setattr(estimate, "LOGPROB_CHUNK_BYTES", height * vocab * dtype.itemsize)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, d, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(vocab, d, generator=g).to(dtype).requires_grad_(trained)
    before, targets = torch.arange(rows), torch.randint(0, vocab, (rows,), generator=g)
    leaves = [hidden, weight] if trained else [hidden]

    def step():
        gathered = hidden.index_select(0, before)
        values, _ = linear_logprob(gathered, weight, targets, entropy=True, entropy_gradient=False, chunk_rows=height)
        del gathered
        torch.autograd.grad(values.sum(), leaves)

    shape = Shape(2, d, 2 * d, 4, d, d, vocab, True, (None,))
    setup = estimate.Setup(
        shape, 1, tokens, 0, 0, 0, 0, full=trained, element=dtype.itemsize, head="logprobs", answers=rows
    )
    step()
    assert estimate.logprob_bytes(setup) == pytest.approx(peak_of(step), rel=0.03)


def test_the_memory_estimate_knows_the_chunk():
    assert estimate.LOGPROB_CHUNK_BYTES == GPU_LOGITS_BYTES


@pytest.mark.skipif(not KERNEL, reason="no Triton here; the interpreter test runs it")
@pytest.mark.parametrize("block", [16, 64, 128])
@pytest.mark.parametrize("order", ["rising", "falling", "random"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_rows_of_several_blocks(block, order, settings, poisoned_empty):
    """The largest logit comes in the first block, in the last, or anywhere; some rows have no target.

    Logits of tens: an ulp of the largest one, were it left in the probabilities, is many times eager's error.
    """
    from fastft.kernels.linear_logprob.triton import gradient_, statistics

    logits = torch.randn(5, 131, generator=torch.Generator().manual_seed(4)).to(DEVICE) * 8
    if order != "random":
        logits = logits.sort(-1, descending=order == "falling").values
    targets = torch.tensor([0, 130, 64, -100, 15], device=DEVICE)
    settings = {"scale": 1.0, "softcap": 0.0, "temperature": 1.0, **settings}
    ups = upstreams(targets.shape)

    def plain(dtype):
        leaf = logits.to(dtype, copy=True).requires_grad_()
        one = torch.eye(131, device=DEVICE, dtype=dtype)
        values = room.ref.linear_logprob(leaf, one, targets, entropy=True, **settings)
        return *values, *torch.autograd.grad(sum((v * up).sum() for v, up in zip(values, ups)), leaf)

    truth, eager = plain(FP64), plain(FP32)
    more = {**settings, "ignore_index": -100, "launch": LogprobLaunch(block, 2)}
    logprobs, entropies, *sums = statistics(logits, targets, entropy=True, **more)
    assert logprobs[3] == 0 and entropies[3] == 0
    gradient_(logits, targets, entropies, *sums, *ups, **more)
    assert not logits[3].any()
    names, got, floors = ("logprobs", "entropies", "dlogits"), (logprobs, entropies, logits), (8, 8, 16)
    for name, value, budget, exact, floor in zip(names, got, eager, truth, floors, strict=True):
        judge.assert_within(name, value, budget, exact, slack=1.25, floor=floor * EPS32)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("vocab", [128256, 151936, 262144])
@pytest.mark.parametrize("size", [0.01, 30.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_large_vocabularies_on_a_gpu(vocab, size, frozen):
    inputs = make(shape=(257,), d=64, vocab=vocab, dtype=BF16, size=size)
    check(inputs, chunk=128, softcap=30.0, temperature=0.9, frozen=frozen, entropy=not frozen)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
def test_memory_on_a_gpu_is_a_tenth_of_the_logits(entropy):
    """8 completions of 4,096 tokens under a head of 8B: 8.4 GB of logits in bf16."""
    hidden = torch.randn(8, 4096, 4096, device="cuda", dtype=BF16).requires_grad_()
    weight = torch.randn(128256, 4096, device="cuda", dtype=BF16) / 64
    targets = torch.randint(0, 128256, (8, 4096), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    values = linear_logprob(hidden, weight, targets, entropy=entropy)
    sum(v.sum() for v in values if v is not None).backward()
    assert torch.cuda.max_memory_allocated() - before <= 8 * 4096 * 128256 * 2 / 10
