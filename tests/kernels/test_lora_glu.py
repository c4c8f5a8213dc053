"""A gated feed-forward of LoRA linears as two ops: values and every gradient against fp64, on dense and NF4 weights."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastft.errors import UsageError
from fastft.kernels import lora_glu
from fastft.kernels.dispatch import use_triton
from fastft.kernels.lora_glu import eight_bits, launch, op
from fastft.kernels.lora_glu import plain as in_torch
from fastft.kernels.nf4 import nf4_dequantize

_spec = importlib.util.spec_from_file_location("matrix_judge", Path(__file__).parent / "matrix_judge.py")
judge = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(judge)
DEVICE = judge.DEVICE
EPS32 = 2.0**-23
FP32 = (torch.float32,) * 3

#        rows     K   N    ranks         scales
CASES = {
    "usual": ((2, 40), 64, 128, (16, 16, 16), (2.0, 2.0, 2.0)),
    "ranks-differ": ((70,), 48, 192, (3, 20, 8), (0.5, 1.5, 1.0)),
    "odd": ((3, 25), 37, 51, (1, 5, 2), (1.7, 0.3, 2.0)),
    "few-rows": ((7,), 64, 64, (16, 16, 16), (1.0, 1.0, 1.0)),
    "rank-beyond-the-kernel": ((33,), 64, 64, (40, 8, 4), (1.0, 1.0, 1.0)),
}


def random_nf4(n, k, generator):
    blocks = -(-n * k // 64)
    packed = torch.randint(0, 256, (-(-n * k // 2), 1), dtype=torch.uint8, generator=generator)
    absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator)
    state = [absmax, torch.linspace(-1, 1, 256), torch.rand(-(-blocks // 256), generator=generator) * 0.05]
    return packed.to(DEVICE), [t.to(DEVICE) for t in (*state, torch.tensor(0.15))]


def make(case, quant, dtype, adapter_dtype, activation="silu"):
    """Return the arguments of feed_forward on the device, and dy."""
    g = torch.Generator().manual_seed(sum(map(ord, case)))
    shape, narrow, wide, ranks, scales = CASES[case]

    def leaf(*size, to, grad=True, scale=1.0):
        return (torch.randn(*size, generator=g) * scale).to(DEVICE, to).requires_grad_(grad)

    x = leaf(*shape, narrow, to=dtype)
    weights, states, a, b = [], [], [], []
    for rank, (out, into) in zip(ranks, [(wide, narrow), (wide, narrow), (narrow, wide)]):
        weight, state = leaf(out, into, to=dtype, grad=False, scale=into**-0.5), []
        if quant == "nested":
            weight, state = random_nf4(out, into, g)
        weights.append(weight)
        states.append(state)
        a.append(leaf(rank, into, to=adapter_dtype, scale=into**-0.5))
        b.append(leaf(out, rank, to=adapter_dtype, scale=0.3))
    dy = torch.randn(*shape, narrow, generator=g).to(DEVICE, dtype)
    return [x, weights, a, b, list(scales), states, activation], dy


def packed(args):
    """Return the same computation with gate and up side by side in one projection, with one adapter."""
    x, weights, a, b, scales, states, activation = args
    both = torch.cat([w.detach() for w in weights[:2]])
    b_both = torch.cat([b[0].detach(), b[1].detach()[:, : b[0].shape[1]]]).requires_grad_()
    return [x, [both, weights[2]], [a[0], a[2]], [b_both, b[2]], [scales[0], scales[2]], [[], states[2]], activation]


def apart(args):
    """Return packed arguments as the separate projections they stand for; gradients flow back to them."""
    x, weights, a, b, scales, _, activation = args
    gate, up = weights[0].chunk(2)
    b_gate, b_up = b[0].chunk(2)
    return [x, [gate, up, weights[1]], [a[0], a[0], a[1]], [b_gate, b_up, b[1]], [scales[0], *scales], None, activation]


def leaves(args):
    return [args[0], *args[2], *args[3]]


def run(function, args, dy):
    y = function(*args)
    return [y, *torch.autograd.grad(y, leaves(args), dy)]


def dense(args, dtype):
    """Return the same arguments with weights dequantised as the model sees them, all in `dtype`."""
    x, weights, a, b, scales, states, activation = args

    def to(t):
        return t.detach().to(dtype).requires_grad_(t.requires_grad)

    made = [
        nf4_dequantize(w, *state, q.shape[0], p.shape[1], x.dtype) if state else w
        for w, state, p, q in zip(weights, states, a, b)
    ]
    return [to(x), [w.to(dtype) for w in made], *([to(t) for t in group] for group in (a, b)), scales, None, activation]


def plain(x, weights, a, b, scales, _, activation):
    """Compute it in the textbook's way, out of place."""

    def linear(value, i):
        return value @ weights[i].t() + scales[i] * ((value @ a[i].to(value.dtype).t()) @ b[i].to(value.dtype).t())

    functional = torch.nn.functional
    activate = functional.silu
    if activation != "silu":
        approximate = "tanh" if activation == "gelu_tanh" else "none"

        def activate(value):
            return functional.gelu(value, approximate=approximate)

    return linear(activate(linear(x, 0)) * linear(x, 1), 2)


def eager_args(args, dtype, adapter_dtype):
    made = dense(args, dtype)
    made[2:4] = [[t.detach().to(adapter_dtype).requires_grad_() for t in group] for group in args[2:4]]
    return made


DTYPES = [
    pytest.param(torch.float32, torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, torch.float32, id="bf16-adapters-fp32"),
    pytest.param(torch.float16, torch.float16, id="fp16"),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("quant", ["dense", "nested"])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
def test_values_and_gradients(case, quant, dtype, adapter_dtype, poisoned_empty):
    args, dy = make(case, quant, dtype, adapter_dtype)
    truth = run(plain, dense(args, torch.float64), dy.double())
    eager = run(plain, eager_args(args, dtype, adapter_dtype), dy)
    names = ["y", "dx", "dA gate", "dA up", "dA down", "dB gate", "dB up", "dB down"]
    for function in (lora_glu.feed_forward, lora_glu.ref.feed_forward):
        got = run(function, args, dy)
        assert [t.dtype for t in got] == [t.dtype for t in eager]
        for name, value, budget, exact in zip(names, got, eager, truth):
            judge.assert_within(f"{function.__module__} {name}", value, budget, exact, slack=1.25, floor=8 * EPS32)


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
def test_gate_and_up_side_by_side(dtype, adapter_dtype, poisoned_empty):
    made, dy = make("usual", "dense", dtype, adapter_dtype)
    args = packed(made)

    def together(*given):
        return plain(*apart(given))

    wide = dense(args, torch.float64)
    truth = run(together, wide, dy.double())
    eager = run(together, eager_args(args, dtype, adapter_dtype), dy)
    for function in (lora_glu.feed_forward, lora_glu.ref.feed_forward):
        for index, (value, budget, exact) in enumerate(zip(run(function, args, dy), eager, truth, strict=True)):
            judge.assert_within(f"{function.__module__} {index}", value, budget, exact, slack=1.25, floor=8 * EPS32)


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu"])
def test_other_activations(activation):
    dtype = torch.float16 if use_triton(torch.empty(1, device=DEVICE)) else torch.float32
    args, dy = make("ranks-differ", "dense", dtype, torch.float32, activation)
    truth = run(plain, dense(args, torch.float64), dy.double())
    eager = run(plain, eager_args(args, dtype, torch.float32), dy)
    for value, budget, exact in zip(run(lora_glu.feed_forward, args, dy), eager, truth):
        judge.assert_within(activation, value, budget, exact, slack=1.25, floor=8 * EPS32)


@pytest.mark.parametrize("scale", [30.0, -30.0, 3e3])
def test_large_gates_stay_finite(scale):
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    args, dy = make("usual", "dense", dtype, torch.float32)
    args[0] = (args[0].detach() * scale).requires_grad_()
    truth = run(plain, dense(args, torch.float64), dy.double())
    eager = run(plain, eager_args(args, dtype, torch.float32), dy)
    for value, budget, exact in zip(run(lora_glu.feed_forward, args, dy), eager, truth):
        judge.assert_within(f"{scale}", value, budget, exact, slack=1.25, floor=8 * EPS32)


WIDE = ((2, 40, 128), torch.float32)
IN_EIGHT_BITS = ((80, 2, 64, 2), torch.uint8), ((2, 2, 80), torch.float32)


@pytest.mark.parametrize(("compressed", "of_gate_and_up"), [(False, (WIDE, WIDE)), (True, IN_EIGHT_BITS)])
def test_only_matrix_products_are_kept_between_forward_and_backward(compressed, of_gate_and_up):
    args, _ = make("usual", "nested", torch.float32, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_glu.feed_forward(*args, eight_bits=compressed)
    own = {t.data_ptr() for group in (*args[1:4], *args[5]) for t in group} | {args[0].data_ptr()}
    extra = [(tuple(t.shape), t.dtype) for t in kept if t.data_ptr() not in own]
    low_rank = ((2, 40, 32), torch.float32), ((2, 40, 16), torch.float32)
    assert sorted(extra, key=str) == sorted([*of_gate_and_up, *low_rank], key=str)


@pytest.mark.parametrize("wide", [1, 63, 64, 65, 192])
def test_numbers_in_eight_bits(wide):
    """None is off by more than half a step of a 127th of the largest of its 64; zeros and tiny numbers stay such."""
    g = torch.Generator().manual_seed(wide)
    gate = (torch.randn(9, wide, generator=g) * torch.logspace(-30, 30, 9)[:, None]).to(DEVICE)
    up = torch.randn(9, wide, generator=g).to(DEVICE)
    up[3], up[4] = 0.0, 1e-36
    q, scale = eight_bits.compress(gate, up)
    assert (tuple(q.shape), tuple(scale.shape)) == eight_bits.shapes(9, wide) and q.dtype == torch.uint8
    assert q.min() >= 1 and q.max() <= 255
    for x, back in zip((gate, up), eight_bits.expand(q, scale, wide, torch.float64), strict=True):
        for start in range(0, wide, 64):
            part = slice(start, start + 64)
            largest = x[:, part].double().abs().amax(1, keepdim=True)
            assert ((back - x.double())[:, part].abs() <= largest / 254 * (1 + 1e-4) + eight_bits.LEAST).all()
    assert not eight_bits.expand(q, scale, wide, torch.float32)[1][3].any()


class Largest(TorchDispatchMode):
    """Keeps the bytes of the largest tensor that is made within."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.most = max(self.most, out.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_plain_torch_goes_through_the_rows_a_part_at_a_time(compressed, dtype, monkeypatch):
    """What it makes of a part is no larger than what comes in, and the numbers are those of all rows at once."""
    generator = torch.Generator().manual_seed(0)

    def made(*size, dtype=dtype):
        return torch.randn(*size, generator=generator).to(DEVICE, dtype)

    count, wide, rank = 100, 65, 3
    given = [made(count, wide), made(count, wide), made(count, 2 * rank), made(wide, rank), made(wide, rank)]
    given.append(made(rank, wide, dtype=torch.float32))
    dh, g = made(count, wide), made(count, rank)
    results, most = [], []
    for rows in (1024, 16):
        monkeypatch.setattr(in_torch, "ROWS", rows)
        with Largest() as seen:
            h, ha, *kept = in_torch.forward(*given, (2.0, 0.5), "silu", compressed)
            back = in_torch.backward(
                dh.clone(), *(kept or given[:2]), *given[2:3], g, *given[3:], (2.0, 0.5), "silu", FP32
            )
        results.append([h, ha, *kept, *back])
        most.append(seen.most)
    assert most[1] == max(t.nbytes for t in (h, *kept)) and (not compressed or most[0] > most[1])
    for index, (one, other) in enumerate(zip(*results, strict=True)):
        if one.dtype == torch.float32 == dtype or index >= len(results[0]) - 3:
            assert judge.rms_ratio(other, one) < 1e-6 if dtype == torch.float32 else judge.rms_ratio(other, one) < 1e-3
        else:
            assert torch.equal(one, other), index


@pytest.mark.parametrize("compressed", [False, True])
def test_no_rows(compressed):
    args, dy = make("usual", "dense", torch.float32, torch.float32)
    args[0], dy = args[0].detach()[:0].requires_grad_(), dy[:0]
    y, dx, *grads = run(lambda *given: lora_glu.feed_forward(*given, eight_bits=compressed), args, dy)
    assert y.shape == dx.shape == (0, 40, 64) and not any(grad.any() for grad in grads)


def at_what_is_kept(q, scale, x, weights, a, b, scales, *_):
    """Compute `plain`, but for gradients that are taken where 8 bits put gate and up."""

    def linear(value, i):
        return value @ weights[i].t() + scales[i] * ((value @ a[i].to(value.dtype).t()) @ b[i].to(value.dtype).t())

    exact = [linear(x, i) for i in range(2)]
    stand_ins = eight_bits.expand(q, scale, exact[0].shape[-1], x.dtype)
    gate, up = (t + (kept.view(t.shape) - t).detach() for t, kept in zip(exact, stand_ins))
    return linear(torch.nn.functional.silu(gate) * up, 2)


@pytest.mark.parametrize("case", ["usual", "ranks-differ", "odd", "few-rows"])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
def test_gate_and_up_kept_in_eight_bits(case, dtype, adapter_dtype, poisoned_empty):
    """The same result to the bit; gradients at most a hundredth off, and as exact as they can be from what is kept."""
    args, dy = make(case, "nested" if case == "usual" else "dense", dtype, adapter_dtype)
    wide, same = dense(args, torch.float64), eager_args(args, dtype, adapter_dtype)
    truth = run(plain, wide, dy.double())
    exact, saved = run(lora_glu.feed_forward, args, dy), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        got = run(lambda *given: lora_glu.feed_forward(*given, eight_bits=True), args, dy)
    (at,) = [i for i, t in enumerate(saved) if t.dim() == 4 and t.dtype == torch.uint8]
    kept, eager = (
        run(lambda *given: at_what_is_kept(saved[at], saved[at + 1], *given), given, dy.to(given[0].dtype))
        for given in (wide, same)
    )
    kept[7] = truth[7]  # dB of down reads what the forward made of the exact ones
    assert torch.equal(got[0], exact[0]) and [t.dtype for t in got] == [t.dtype for t in exact]
    for index, value in enumerate(got[1:], 1):
        budget = 1.25 * judge.rms_ratio(eager[index], truth[index])
        off = judge.rms_ratio(value, kept[index])
        assert off <= max(budget, 8 * EPS32), (index, off, budget)
        assert judge.rms_ratio(value, truth[index]) <= 0.01 + budget, index
    if dtype == torch.float32:  # they are not the exact ones by chance
        assert judge.rms_ratio(got[3], truth[3]) > 1e-3


def test_an_input_that_needs_no_gradient():
    args, dy = make("usual", "nested", torch.float32, torch.float32)
    full = run(lora_glu.feed_forward, args, dy)
    args[0] = args[0].detach()
    y = lora_glu.feed_forward(*args)
    for value, same in zip(torch.autograd.grad(y, leaves(args)[1:], dy), full[2:]):
        assert torch.equal(value, same) or (DEVICE == "cuda" and judge.rms_ratio(value, same) < 1e-6)


def test_deterministic_algorithms_give_the_same_bits_twice():
    args, dy = make("usual", "nested", torch.float16, torch.float32)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert op._kernels(torch.empty(4, 4, dtype=torch.float16, device=DEVICE), 4) is in_torch
        first, second = (run(lora_glu.feed_forward, args, dy) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("quant", ["dense", "nested"])
def test_opcheck(quant):
    args, dy = make("odd", quant, torch.float32, torch.float32)
    x, weights, a, b, scales, states, activation = args
    counts = [len(state) for state in states[:2]]
    flat = [t for state in states[:2] for t in state]
    wide = b[0].shape[0]
    torch.library.opcheck(torch.ops.fastft.linears, (x, weights[:2], a[:2], flat, counts, [wide, wide], False))
    made = lora_glu.op.linears(x, weights[:2], a[:2], states[:2], [wide, wide])
    gate0, up0, xa = (t.detach().requires_grad_() for t in made)
    down = (gate0, up0, xa, b[0], b[1], a[2], b[2], weights[2], states[2], scales, activation, False)
    ha = torch.randn(*x.shape[:-1], a[2].shape[0], device=DEVICE)
    given = [t.detach() for t in (xa, ha, b[0], b[1], a[2], b[2], weights[2])]
    for compressed in (False, True):
        torch.library.opcheck(torch.ops.fastft.lora_glu_down, (*down, compressed))
        kept = torch.ops.fastft.lora_glu_down(*down, compressed)[2:] or [gate0, up0]
        kept = [t.detach() for t in kept]
        back = (dy, kept, *given, states[2], scales, activation, False)
        torch.library.opcheck(torch.ops.fastft.lora_glu_down_backward, back)
    dys = [torch.randn_like(gate0), torch.randn_like(up0)]
    for needs_x in (True, False):
        given = (dys, torch.randn_like(xa), x.detach(), weights[:2], [t.detach() for t in a[:2]], flat, counts)
        torch.library.opcheck(torch.ops.fastft.linears_backward, (*given, needs_x, False))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    args, dy = make("usual", "nested", torch.float32, torch.float32)
    want = run(lora_glu.feed_forward, args, dy)
    compiled = torch.compile(lora_glu.feed_forward, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for value, same in zip(run(compiled, args, dy), want):
        assert judge.rms_ratio(value, same) < 1e-6


def test_every_mistake_is_told_at_once():
    args, _ = make("usual", "dense", torch.float32, torch.float32)
    args[2][0] = args[2][0][:, :-1]
    args[3][1] = args[3][1][:-1]
    args[6] = "relu"
    with pytest.raises(UsageError, match=r"activation(.|\n)*a\[0\](.|\n)*b\[1\]"):
        lora_glu.feed_forward(*args)


class Launches:
    """Stands for a kernel, and keeps the grids in which it was to run."""

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **constants: None


def test_the_grid_of_many_rows_is_one_that_cuda_allows(monkeypatch):
    """Along its first axis 2^31 - 1 programs, along the others 65,535: of 64 rows each, 4 million rows."""
    kernels = pytest.importorskip("fastft.kernels.lora_glu.triton")
    launches, count, width = Launches(), 64 * 65_535 + 1, 512
    monkeypatch.setattr(kernels, "lora_glu_fwd_kernel", launches)
    monkeypatch.setattr(kernels, "lora_glu_bwd_kernel", launches)
    wide, xa, g = (torch.empty(count, n, dtype=torch.bfloat16, device="meta") for n in (width, 8, 4))
    b, a_down = (torch.empty(*size, dtype=torch.bfloat16, device="meta") for size in ((width, 4), (4, width)))
    for cfg in (launch.launch(count, width, 132), launch.Launch(splits=2)):
        kernels.forward(wide, wide, xa, b, b, a_down, (1.0, 1.0), "silu", True, cfg)
        kernels.backward(wide, wide, wide, xa, g, b, b, a_down, (1.0, 1.0), "silu", cfg=cfg)
    blocks = -(-count // 64)
    assert [math.prod(grid) for grid in launches.grids] == [blocks, blocks, 2 * blocks, 2 * blocks]
    for first, *others in launches.grids:
        assert first < 2**31 and all(programs <= 65_535 for programs in others)


def test_the_kernels_run_where_they_should():
    probe = torch.empty(4, 4, dtype=torch.float16, device=DEVICE)
    assert (op._kernels(probe, 32) is not in_torch) == use_triton(probe)
    assert op._kernels(probe, 33) is op._kernels(probe.float(), 8) is in_torch
