"""The loss head: loss and every gradient against torch's own cross entropy in fp64, whatever the chunks."""

import importlib.util
from pathlib import Path

import pytest
import torch

from fastft.environment import triton_interpreted
from fastft.errors import UsageError
from fastft.kernels import linear_ce
from fastft.kernels.linear_ce.launch import GPU_LOGITS_BYTES, CrossEntropyLaunch
from fastft.kernels.logits import chunk_rows

_spec = importlib.util.spec_from_file_location("matrix_judge", Path(__file__).parent / "matrix_judge.py")
judge = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(judge)
DEVICE = judge.DEVICE
EPS32 = 2.0**-23
KERNEL = DEVICE == "cuda" or triton_interpreted()
FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

SETTINGS = {
    "plain": {},
    "scale": {"scale": 0.0625},
    "softcap": {"softcap": 5.0},
    "smoothing": {"label_smoothing": 0.1},
    "all": {"scale": 0.3, "softcap": 2.0, "label_smoothing": 0.2, "num_items": 7},
}


def make(shape=(3, 7), d=24, vocab=101, dtype=FP32, weight_dtype=None, bias=True, size=1.0, masked=0.4, seed=0):
    """Return (hidden, weight, labels, bias) leaves; about `masked` of the labels are -100. size: of the logits."""
    g = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(*shape, d, generator=g) * size).to(DEVICE, dtype).requires_grad_()
    weight = (torch.randn(vocab, d, generator=g) * d**-0.5).to(DEVICE, weight_dtype or dtype).requires_grad_()
    labels = torch.randint(0, vocab, shape, generator=g)
    labels[torch.rand(*shape, generator=g) < masked] = -100
    offset = (
        (torch.randn(vocab, generator=g) * 0.3).to(DEVICE, weight_dtype or dtype).requires_grad_() if bias else None
    )
    return hidden, weight, labels.to(DEVICE), offset


def run(function, inputs, upstream=1.0, **settings):
    """Return the loss and the gradients of hidden, weight and bias under an upstream gradient."""
    loss = function(*inputs, **settings)
    leaves = [inputs[0], inputs[1], *([inputs[3]] if inputs[3] is not None else [])]
    return [loss, *torch.autograd.grad(loss * upstream, leaves)]


def as_fp64(inputs):
    hidden, weight, labels, bias = inputs
    double = [None if t is None else t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    return double[0], double[1], labels, double[2]


def check(inputs, upstream=1.0, chunk=None, slack=1.25, **settings):
    truth = run(linear_ce.ref.linear_cross_entropy, as_fp64(inputs), upstream, **settings)
    eager = run(linear_ce.ref.linear_cross_entropy, inputs, upstream, **settings)
    got = run(linear_ce.linear_cross_entropy, inputs, upstream, chunk_rows=chunk, **settings)
    assert [t.dtype for t in got] == [t.dtype for t in eager]
    for name, value, budget, exact in zip(("loss", "dhidden", "dweight", "dbias"), got, eager, truth):
        judge.assert_within(name, value, budget, exact, slack=slack, floor=4 * EPS32)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_loss_and_gradients(settings, dtype, bias, poisoned_empty):
    check(make(dtype=dtype, bias=bias), upstream=0.25, chunk=4, **settings)


@pytest.mark.parametrize("size", [0.0, 1e-3, 40.0], ids=["equal", "flat", "peaked"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_flat_and_peaked_logits(size, dtype):
    check(make(dtype=dtype, size=size, shape=(33,)))


@pytest.mark.parametrize("vocab", [2, 3, 127, 128, 129, 1025])
@pytest.mark.parametrize("chunk", [1, 5, None])
def test_odd_vocabularies_and_chunks(vocab, chunk):
    check(make(vocab=vocab, shape=(2, 5), d=7), chunk=chunk, label_smoothing=0.05)


@pytest.mark.parametrize("upstream", [1.0, -3.0, 1 / 3, 65504.0])
def test_upstream_gradient_scales_exactly(upstream):
    """In 16 bits the scalar must not be rounded before it multiplies: a bias of 0.2 % in every gradient."""
    dtype = FP16 if triton_interpreted() else BF16
    inputs = make(dtype=dtype, size=0.01)
    loss = linear_ce.linear_cross_entropy(*inputs, num_items=1)
    one = torch.autograd.grad(loss, inputs[0], retain_graph=True)[0]
    got = torch.autograd.grad(loss, inputs[0], torch.tensor(upstream, device=DEVICE))[0]
    assert torch.equal(got, (one.double() * torch.tensor(upstream).double().item()).to(FP32).to(dtype))


def test_backward_twice_gives_the_same():
    inputs = make()
    loss = linear_ce.linear_cross_entropy(*inputs)
    first = torch.autograd.grad(loss, inputs[:2], retain_graph=True)
    for value, same in zip(torch.autograd.grad(loss, inputs[:2]), first):
        assert torch.equal(value, same)


def test_head_in_fp32_under_hidden_states_in_bf16_gets_fp32_gradients():
    hidden, weight, labels, bias = make(dtype=BF16, weight_dtype=FP32, shape=(64,))
    got = run(linear_ce.linear_cross_entropy, (hidden, weight, labels, bias), chunk_rows=8)
    assert [t.dtype for t in got] == [FP32, BF16, FP32, FP32]
    rounded = [weight.detach().bfloat16().requires_grad_(), labels, bias.detach().bfloat16().requires_grad_()]
    truth = run(linear_ce.ref.linear_cross_entropy, as_fp64((hidden, *rounded)))
    eager = run(linear_ce.ref.linear_cross_entropy, (hidden, *rounded))
    for value, budget, exact in zip(got, eager, truth):
        judge.assert_within("gradient", value, budget, exact, slack=1.25, floor=4 * EPS32)


def test_weight_gradient_of_many_chunks_is_summed_in_fp32():
    """A sum kept in bf16 loses what is under 1/256 of it: many small chunks must be as good as one."""
    inputs = make(dtype=BF16, shape=(512,), d=8, vocab=5, masked=0.0)
    truth = run(linear_ce.ref.linear_cross_entropy, as_fp64(inputs))
    errors = [
        judge.rms_ratio(run(linear_ce.linear_cross_entropy, inputs, chunk_rows=chunk)[2], truth[2])
        for chunk in (512, 1)
    ]
    assert errors[1] <= 1.1 * errors[0]


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_only_the_gradients_that_are_needed(which):
    inputs = make()
    leaves = [inputs[0], inputs[1], inputs[3]]
    full = run(linear_ce.linear_cross_entropy, inputs)[1:]
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i in which)
    loss = linear_ce.linear_cross_entropy(*inputs)
    for value, i in zip(torch.autograd.grad(loss, [leaves[i] for i in which]), which):
        assert torch.equal(value, full[i])


def test_no_gradient_is_made_without_gradient_mode():
    inputs = make()
    want = linear_ce.linear_cross_entropy(*inputs)
    real = torch.ops.fastft.linear_cross_entropy.default
    with torch.no_grad():
        outputs = real(inputs[0].reshape(-1, 24), *inputs[1:2], inputs[2].reshape(-1), inputs[3], None, [],
                       1.0, 0.0, 0.0, -100, -1, 0, False, False, False, False)  # fmt: skip
        shapes = [t.numel() for t in outputs[1:4]]
        loss = linear_ce.linear_cross_entropy(*inputs)
    assert shapes == [0, 0, 0]
    assert not loss.requires_grad and torch.equal(loss, want.detach())


def test_gradients_that_were_not_made_are_an_error_not_a_zero():
    hidden, weight, labels, _ = make(shape=(9,))
    loss = torch.ops.fastft.linear_cross_entropy(
        hidden, weight, labels, None, None, [], 1.0, 0.0, 0.0, -100, -1, 0, False, True, False, False
    )[0]
    with pytest.raises(RuntimeError, match=r"need \[True, True, False\]"):
        loss.backward()


def test_nothing_labelled():
    hidden, weight, labels, bias = make(masked=2.0)
    inputs = (hidden, weight, labels, bias)
    assert (labels == -100).all()
    loss, *grads = run(linear_ce.linear_cross_entropy, inputs, num_items=5, label_smoothing=0.1)
    assert loss.item() == 0
    assert [g.abs().sum().item() for g in grads] == [0, 0, 0]
    mean, *grads = run(linear_ce.linear_cross_entropy, inputs)
    assert mean.isnan()  # the mean of nothing, as torch has it
    assert [g.abs().sum().item() for g in grads] == [0, 0, 0]
    assert linear_ce.ref.linear_cross_entropy(*inputs).isnan()


def test_masked_rows_have_zero_gradient_whatever_they_hold():
    hidden, weight, labels, bias = make()
    inputs = (hidden, weight, labels, bias)
    grad = run(linear_ce.linear_cross_entropy, inputs)[1]
    assert grad[labels == -100].abs().sum() == 0 and (grad[labels != -100].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("num_items", [11, 11.0, "tensor"])
def test_num_items(num_items):
    inputs = make()
    n = torch.tensor(11, device=DEVICE) if num_items == "tensor" else num_items
    mean = linear_ce.linear_cross_entropy(*inputs)
    got = linear_ce.linear_cross_entropy(*inputs, num_items=n)
    count = (inputs[2] != -100).sum()
    assert torch.allclose(got * 11, mean * count, rtol=1e-6)


def test_another_ignore_index():
    inputs = make(dtype=FP64)
    labels = inputs[2].masked_fill(inputs[2] == -100, 3)
    inputs = (*inputs[:2], labels, inputs[3])
    got = run(linear_ce.linear_cross_entropy, inputs, ignore_index=3)
    for value, exact in zip(got, run(linear_ce.ref.linear_cross_entropy, inputs, ignore_index=3)):
        assert judge.rms_ratio(value, exact) < 1e-12


@pytest.mark.parametrize("bound", [0, 1, 30])
def test_a_bound_on_the_labelled_rows_changes_nothing(bound):
    inputs = make()
    count = int((inputs[2] != -100).sum())
    want = run(linear_ce.linear_cross_entropy, inputs)
    for value, same in zip(run(linear_ce.linear_cross_entropy, inputs, valid_rows=count + bound), want):
        assert judge.rms_ratio(value, same) < 2 * EPS32
    assert linear_ce.linear_cross_entropy(*inputs, valid_rows=count - 1).isnan()  # a row would have been lost


@pytest.mark.parametrize("label", [101, -1, -101, 2**40])
def test_a_label_out_of_range(label):
    hidden, weight, labels, bias = make()
    labels[0, 0] = label
    if not KERNEL:
        with pytest.raises(UsageError, match=f"labels: expected 0 to 100, or -100 for none, got {label}"):
            linear_ce.linear_cross_entropy(hidden, weight, labels, bias)
        return
    loss, dhidden, *_ = run(linear_ce.linear_cross_entropy, (hidden, weight, labels, bias))
    assert loss.isnan() and dhidden[0, 0].isnan().all()
    assert dhidden.reshape(-1, 24)[1:].isfinite().all()


def test_infinite_logits_of_forbidden_tokens():
    hidden, weight, labels, bias = make(bias=False, masked=0.0)
    labels = labels.clamp(max=49)
    bias = torch.zeros(101, device=DEVICE)
    bias[50:] = -float("inf")
    bias.requires_grad_()
    got = run(linear_ce.linear_cross_entropy, (hidden, weight, labels, bias))
    truth = run(linear_ce.ref.linear_cross_entropy, as_fp64((hidden, weight, labels, bias)))
    for value, exact in zip(got, truth):
        assert judge.rms_ratio(value, exact) < 1e-6


def test_input_that_is_not_contiguous():
    hidden, weight, labels, bias = make(shape=(4, 6))
    hidden = hidden.detach().transpose(0, 1).requires_grad_()
    weight = weight.detach().t().contiguous().t().requires_grad_()
    check((hidden, weight, labels.t(), bias))


def test_autocast():
    inputs = make(shape=(40,))
    with torch.autocast(DEVICE, dtype=BF16):
        got = run(linear_ce.linear_cross_entropy, inputs)
        eager = run(linear_ce.ref.linear_cross_entropy, inputs)
    assert [t.dtype for t in got] == [FP32] * 4
    for value, budget, exact in zip(got, eager, run(linear_ce.ref.linear_cross_entropy, as_fp64(inputs))):
        judge.assert_within("autocast", value, budget, exact, slack=1.25)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_gradcheck(settings):
    hidden, weight, labels, bias = make(dtype=FP64, shape=(5,), d=4, vocab=9)

    def function(h, w, b):
        return linear_ce.linear_cross_entropy(h, w, labels, b, chunk_rows=2, **settings)

    assert torch.autograd.gradcheck(function, (hidden, weight, bias), fast_mode=True)


@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(bias):
    hidden, weight, labels, offset = make(shape=(9,), bias=bias)
    op = torch.ops.fastft.linear_cross_entropy
    torch.library.opcheck(
        op, (hidden, weight, labels, offset, None, [], 0.5, 3.0, 0.1, -100, -1, 4, False, True, True, bias)
    )
    torch.library.opcheck(
        op,
        (hidden.detach(), weight.detach(), labels, None, torch.tensor(3), [], 1.0, 0.0, 0.0, -100, 8, 0, *[False] * 4),
    )
    factor = torch.tensor(0.3, device=DEVICE)
    for dtype in (FP32, FP16):
        torch.library.opcheck(torch.ops.fastft.scale_gradient, (torch.randn(5, 7, device=DEVICE), factor, dtype))


def test_can_be_emitted_as_graph_nodes():
    inputs = make()
    want = linear_ce.ref.linear_cross_entropy(*inputs, softcap=3.0)

    def node(h, w, y, b):
        h, y = h.reshape(-1, 24), y.reshape(-1)
        settings = (1.0, 3.0, 0.0, -100, -1, 0, False, True, True, True)
        return torch.ops.fastft.linear_cross_entropy(h, w, y, b, None, [], *settings)[0]

    for function in (lambda *args: linear_ce.ref.linear_cross_entropy(*args, softcap=3.0), node):
        graph = torch.fx.Graph()
        tracer = torch.fx.proxy.GraphAppendingTracer(graph)
        proxies = [torch.fx.Proxy(graph.placeholder(f"p{i}"), tracer) for i in range(4)]
        graph.output(function(*proxies).node)
        got = torch.fx.GraphModule(torch.nn.Module(), graph)(*inputs)
        assert judge.rms_ratio(got, want) < 2 * EPS32
        assert got.requires_grad


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    inputs = make()
    settings = {"softcap": 3.0, "scale": 0.5, "label_smoothing": 0.1}
    want = run(linear_ce.linear_cross_entropy, inputs, upstream=2.0, **settings)
    compiled = torch.compile(linear_ce.linear_cross_entropy, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for value, same in zip(run(compiled, inputs, upstream=2.0, **settings), want):
        assert judge.rms_ratio(value, same) < 1e-6


@pytest.mark.inductor
def test_inductor_agrees_with_eager():
    inputs = make()
    want = run(linear_ce.linear_cross_entropy, inputs)
    for value, same in zip(run(torch.compile(linear_ce.linear_cross_entropy, fullgraph=True), inputs), want):
        assert judge.rms_ratio(value, same) < 1e-6


def test_every_mistake_is_told_at_once():
    hidden, weight, labels, bias = make()
    with pytest.raises(UsageError, match=r"weight: (.|\n)*labels: (.|\n)*bias: (.|\n)*label_smoothing: "):
        linear_ce.linear_cross_entropy(hidden, weight[:, :3], labels[:2], bias[:4], label_smoothing=1.5)


@pytest.mark.parametrize("vocab", [32000, 128256, 151936, 262144])
@pytest.mark.parametrize("rows", [1, 300, 2048, 16384, 100001])
def test_chunks_on_a_gpu_stay_in_their_budget_and_are_even(vocab, rows):
    height = chunk_rows(rows, vocab, 2, cuda=True, gpu_bytes=GPU_LOGITS_BYTES)
    assert height * vocab * 2 <= GPU_LOGITS_BYTES
    assert height == rows or height % 128 == 0
    assert rows % height == 0 or rows % height > height // 2 or rows < 2 * height or -(-rows // height) > 4


@pytest.mark.skipif(not KERNEL, reason="no Triton here; the interpreter test runs it")
@pytest.mark.parametrize("block", [16, 64, 128])
@pytest.mark.parametrize("order", ["rising", "falling", "random"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_rows_of_several_blocks(block, order, settings, poisoned_empty):
    """The largest logit comes in the first block, in the last, or anywhere; some rows have no label."""
    from fastft.kernels.linear_ce.triton import cross_entropy_

    logits = torch.randn(5, 131, generator=torch.Generator().manual_seed(4)).to(DEVICE) * 8
    if order != "random":
        logits = logits.sort(-1, descending=order == "falling").values
    labels = torch.tensor([0, 130, 64, -100, 15], device=DEVICE)
    settings = {"scale": 1.0, "softcap": 0.0, "label_smoothing": 0.0, **settings}
    settings.pop("num_items", None)
    exact = logits.double().requires_grad_()
    one = torch.eye(131, device=DEVICE, dtype=FP64)
    loss = linear_ce.ref.linear_cross_entropy(exact, one, labels, **settings, num_items=1)
    (grad,) = torch.autograd.grad(loss, exact)
    got = logits.clone()
    factor = torch.tensor(0.75, device=DEVICE)
    launch = CrossEntropyLaunch(block, 2)
    losses = cross_entropy_(got, labels, factor, **settings, ignore_index=-100, gradient=True, launch=launch)
    assert losses[3] == 0 and got[3].abs().sum() == 0
    assert judge.rms_ratio(losses.sum(), loss) < 4 * EPS32
    assert judge.rms_ratio(got / 0.75, grad) < 8 * EPS32


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("vocab", [128256, 151936, 262144])
@pytest.mark.parametrize("size", [0.01, 30.0], ids=["flat", "peaked"])
def test_large_vocabularies_on_a_gpu(vocab, size):
    check(make(shape=(257,), d=64, vocab=vocab, dtype=BF16, size=size), chunk=128, label_smoothing=0.1, softcap=30.0)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
def test_memory_on_a_gpu_is_bounded():
    """16,384 x 128,256 logits would be 4 GB in bf16; a chunk of them and the gradient is all there may be."""
    hidden = torch.randn(16384, 256, device="cuda", dtype=BF16, requires_grad=True)
    weight = torch.randn(128256, 256, device="cuda", dtype=BF16)
    labels = torch.randint(0, 128256, (16384,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_ce.linear_cross_entropy(hidden, weight, labels).backward()
    assert torch.cuda.max_memory_allocated() - before < 1 << 30
