"""LoRA linears: values and every gradient against fp64, on dense and NF4 weights."""

import importlib.util
from pathlib import Path

import pytest
import torch

from fastft.errors import UsageError
from fastft.kernels import lora
from fastft.kernels.nf4 import nf4_dequantize

_spec = importlib.util.spec_from_file_location("matrix_judge", Path(__file__).parent / "matrix_judge.py")
judge = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(judge)
DEVICE = judge.DEVICE
EPS32 = 2.0**-23  # sums in another order differ by a few of these, whatever the algorithm

#        rows   K    [(N, rank, scale, bias)]
CASES = {
    "one": ((2, 9), 48, [(40, 8, 2.0, False)]),
    "one-bias-rank-1": ((13,), 33, [(17, 1, 0.5, True)]),
    "qkv": ((2, 7), 64, [(64, 16, 2.0, False), (32, 4, 0.3, True), (16, 64, 1.0, False)]),
    "gate-up-odd": ((3, 5), 37, [(51, 3, 1.7, True), (51, 5, 1.7, True)]),
    "no-adapter-among-two": ((1, 11), 40, [(24, 0, 1.0, True), (8, 4, 2.0, False)]),
}


def random_nf4(n, k, nested, generator):
    """Return (packed, quant_state) of a random NF4 weight of size about 0.1, as bitsandbytes lays it out."""
    blocks = -(-n * k // 64)
    packed = torch.randint(0, 256, (-(-n * k // 2), 1), dtype=torch.uint8, generator=generator)
    if not nested:
        return packed, [torch.rand(blocks, generator=generator) * 0.2]
    code2 = torch.linspace(-1, 1, 256)
    absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator)
    return packed, [absmax, code2, torch.rand(-(-blocks // 256), generator=generator) * 0.05, torch.tensor(0.15)]


def make(case, quant, dtype, adapter_dtype, *, train_base=False):
    """Return the arguments of lora_linears on the device, leaves that require gradients, and dys."""
    g = torch.Generator().manual_seed(sum(map(ord, case)))
    shape, k, projections = CASES[case]

    def leaf(*size, to, grad=True, scale=1.0):
        value = (torch.randn(*size, generator=g) * scale).to(DEVICE, to)
        return value.requires_grad_(grad)

    x = leaf(*shape, k, to=dtype)
    weights, biases, a, b, scales, states = [], [], [], [], [], []
    for n, r, scale, bias in projections:
        if quant == "dense":
            weights.append(leaf(n, k, to=dtype, grad=train_base, scale=k**-0.5))
            states.append([])
        else:
            packed, state = random_nf4(n, k, quant == "nested", g)
            weights.append(packed.to(DEVICE))
            states.append([tensor.to(DEVICE) for tensor in state])
        biases.append(leaf(n, to=dtype) if bias else None)
        a.append(leaf(r, k, to=adapter_dtype, scale=k**-0.5))
        b.append(leaf(n, r, to=adapter_dtype))
        scales.append(scale)
    dys = [torch.randn(*shape, p[0], generator=g).to(DEVICE, dtype) for p in projections]
    return [x, weights, biases, a, b, scales, states], dys


def leaves(args):
    x, weights, biases, a, b = args[:5]
    return [t for t in (x, *weights, *biases, *a, *b) if t is not None and t.requires_grad]


def run(function, args, dys):
    """Return outputs and gradients of every leaf that requires one."""
    outputs = function(*args)
    return [*outputs, *torch.autograd.grad(outputs, leaves(args), dys)]


def as_fp64(args):
    """Return the same numbers in fp64, NF4 weights dequantised (that is exact in fp32) and dense."""
    x, weights, biases, a, b, scales, states = args

    def double(t):
        return None if t is None else t.detach().double().requires_grad_(t.requires_grad)

    dense = []
    for weight, state, matrix in zip(weights, states, b):
        if state:
            full = state if len(state) == 4 else [state[0], None, None, None]
            weight = nf4_dequantize(
                weight, *full, matrix.shape[0], x.shape[-1], x.dtype
            )  # rounded as the model sees it
        dense.append(double(weight))
    return [double(x), dense, [double(t) for t in biases], [double(t) for t in a], [double(t) for t in b], scales, None]


def plain(x, weights, biases, a, b, scales, states):
    """Compute it in the textbook's way, out of place, one projection after another."""
    out = []
    for w, bias, p, q, s in zip(weights, biases, a, b, scales):
        y = x @ w.t() + (0 if bias is None else bias)
        out.append(y + s * ((x @ p.to(x.dtype).t()) @ q.to(x.dtype).t()))
    return out


DTYPES = [
    pytest.param(torch.float32, torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, torch.float32, id="bf16-adapters-fp32"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, torch.float32, id="fp16-adapters-fp32"),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("quant", ["dense", "single", "nested"])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
def test_values_and_gradients(case, quant, dtype, adapter_dtype, poisoned_empty):
    args, dys = make(case, quant, dtype, adapter_dtype, train_base=quant == "dense")
    truth = run(plain, as_fp64(args), [dy.double() for dy in dys])
    dense = [args[0], *args[1:]]
    if quant != "dense":
        reference = as_fp64(args)
        dense[1] = [w.to(dtype) for w in reference[1]]
    eager = run(plain, dense, dys)
    names = ["y"] * len(dys) + ["grad"] * (len(truth) - len(dys))
    for function in (lora.lora_linears, lora.ref.lora_linears):
        got = run(function, args, dys)
        assert [t.dtype for t in got] == [t.dtype for t in eager]
        for i, (name, value, budget, exact) in enumerate(zip(names, got, eager, truth)):
            judge.assert_within(f"{function.__module__} {name} {i}", value, budget, exact, slack=1.25, floor=4 * EPS32)


def test_outputs_are_contiguous_for_input_that_is_not():
    args, dys = make("qkv", "nested", torch.float32, torch.float32)
    base = torch.randn(64, 7, 2, device=DEVICE)
    args[0] = base.permute(2, 1, 0).detach().requires_grad_()
    assert not args[0].is_contiguous()
    strided = [torch.randn(64, 7, 2, device=DEVICE)[: dy.shape[-1]].permute(2, 1, 0) for dy in dys]
    truth = run(plain, as_fp64(args), [dy.double() for dy in strided])
    got = run(lora.lora_linears, args, strided)
    assert all(y.is_contiguous() for y in got[: len(dys)])
    for i, (value, exact) in enumerate(zip(got, truth)):
        assert judge.rms_ratio(value, exact) < 1e-6, i


def test_input_that_needs_no_gradient_gets_none_and_the_rest_is_the_same():
    args, dys = make("qkv", "nested", torch.float32, torch.float32)
    full = run(lora.lora_linears, args, dys)
    args[0] = args[0].detach()
    for value, same in zip(run(lora.lora_linears, args, dys)[3:], full[4:]):
        assert torch.equal(value, same)


def test_an_unused_output_costs_nothing_and_changes_nothing():
    args, dys = make("qkv", "dense", torch.float64, torch.float64)
    used = [args[0], args[3][0], args[4][0], args[3][2], args[4][2], args[3][1]]

    def grads(function):
        y = function(*args)
        return torch.autograd.grad((y[0] * dys[0]).sum() + (y[2] * dys[2]).sum(), used, allow_unused=True)

    got, want = grads(lora.lora_linears), grads(plain)
    assert got[-1] is None
    for value, exact in zip(got[:-1], want[:-1]):
        assert judge.rms_ratio(value, exact) < 1e-12


def test_gradients_that_are_expanded_scalars():
    args, _ = make("qkv", "dense", torch.float64, torch.float64, train_base=True)
    got = torch.autograd.grad(sum(y.sum() for y in lora.lora_linears(*args)), leaves(args))
    want = torch.autograd.grad(sum(y.sum() for y in plain(*args)), leaves(args))
    assert all(judge.rms_ratio(value, exact) < 1e-12 for value, exact in zip(got, want))


def test_only_x_and_xa_are_kept_between_forward_and_backward():
    args, _ = make("qkv", "nested", torch.float32, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora.lora_linears(*args)
    own = {t.data_ptr() for group in args[1:5] for t in group if t is not None} | {args[0].data_ptr()}
    own |= {t.data_ptr() for state in args[6] for t in state}
    extra = [t for t in kept if t.data_ptr() not in own]
    assert [t.shape for t in extra] == [(2, 7, 16 + 4 + 64)]


def test_autocast_computes_in_its_dtype():
    args, dys = make("qkv", "dense", torch.float32, torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        outputs = lora.lora_linears(*args)
        eager = lora.ref.lora_linears(*args)
    assert [y.dtype for y in outputs] == [torch.bfloat16] * 3
    truth = plain(*as_fp64(args))
    for y, budget, exact in zip(outputs, eager, truth):
        judge.assert_within("y", y, budget, exact, slack=1.25)
    grads = torch.autograd.grad(outputs, leaves(args), [dy.bfloat16() for dy in dys])
    assert {g.dtype for g in grads} == {torch.float32}


@pytest.mark.parametrize("quant", ["dense", "nested"])
def test_gradcheck(quant):
    args, _ = make("gate-up-odd", quant, torch.float64, torch.float64, train_base=quant == "dense")
    x, weights, biases, a, b, scales, states = args

    def function(x, *rest):
        groups = [list(rest[i : i + 2]) for i in range(0, len(rest), 2)]
        w = groups.pop(0) if quant == "dense" else weights
        return tuple(lora.lora_linears(x, w, *groups, scales, states))

    inputs = [x, *(weights if quant == "dense" else []), *biases, *a, *b]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("case", ["one", "qkv", "no-adapter-among-two"])
@pytest.mark.parametrize("quant", ["dense", "nested"])
def test_opcheck(case, quant):
    args, dys = make(case, quant, torch.float32, torch.float32)
    x, weights, biases, a, b, scales, states = args
    counts = [len(state) for state in states]
    flat = [t for state in states for t in state]
    present = [t for t in biases if t is not None]
    has_bias = [t is not None for t in biases]
    given = (x, weights, present, has_bias, a, b, scales, flat, counts, False)
    torch.library.opcheck(torch.ops.fastft.lora_linears, given)
    ranks = [m.shape[0] for m in a]
    starts = [sum(ranks[:i]) for i in range(len(ranks))]
    xa = torch.randn(*x.shape[:-1], sum(ranks), device=DEVICE)
    backward = torch.ops.fastft.lora_linears_backward
    a, b = [m.detach() for m in a], [m.detach() for m in b]
    for needs_x in (True, False):
        inputs = (dys, x.detach(), xa, starts, weights, a, b, scales, flat, counts, needs_x)
        torch.library.opcheck(backward, (*inputs, [quant == "dense"] * len(a), [True] * len(a), False))


@pytest.mark.parametrize("function", [lora.lora_linears, lora.ref.lora_linears], ids=["op", "ref"])
@pytest.mark.parametrize("quant", ["dense", "nested"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(function, quant, dynamic):
    args, dys = make("qkv", quant, torch.float32, torch.float32)
    want = run(function, args, dys)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for value, same in zip(run(compiled, args, dys), want):
        assert judge.rms_ratio(value, same) < 1e-6


@pytest.mark.inductor
def test_inductor_agrees_with_eager():
    args, dys = make("qkv", "nested", torch.float32, torch.float32)
    want = run(lora.lora_linears, args, dys)
    for value, same in zip(run(torch.compile(lora.lora_linears, fullgraph=True), args, dys), want):
        assert judge.rms_ratio(value, same) < 1e-6


def test_reference_can_be_emitted_as_graph_nodes():
    args, _ = make("qkv", "nested", torch.float32, torch.float32)
    x, weights, biases, a, b, scales, states = args
    graph = torch.fx.Graph()
    tracer = torch.fx.proxy.GraphAppendingTracer(graph)
    tensors = [x, *weights, *[t for t in biases if t is not None], *a, *b, *[t for state in states for t in state]]
    proxies = {id(t): torch.fx.Proxy(graph.placeholder(f"p{i}"), tracer) for i, t in enumerate(tensors)}

    def lift(value):
        return [lift(v) for v in value] if isinstance(value, list) else proxies.get(id(value), value)

    rows = [m.shape[0] for m in b]
    out = lora.ref.lora_linears(*[lift(v) for v in (x, weights, biases, a, b)], scales, lift(states), rows)
    graph.output(tuple(y.node for y in out))
    module = torch.fx.GraphModule(torch.nn.Module(), graph)
    for y, want in zip(module(*tensors), lora.ref.lora_linears(*args)):
        assert torch.equal(y, want)


def test_every_mistake_is_told_at_once():
    args, _ = make("qkv", "dense", torch.float32, torch.float32)
    args[1][0] = args[1][0][:, :-1]
    args[3][1] = args[3][1][:-1]
    with pytest.raises(UsageError, match=r"weights\[0\](.|\n)*b\[1\]"):
        lora.lora_linears(*args)
    with pytest.raises(UsageError, match="scales: expected 3 entries"):
        lora.lora_linears(*make("qkv", "dense", torch.float32, torch.float32)[0][:5], [1.0])
