"""NF4: byte-equal to bitsandbytes, and the kernel byte-equal to the reference."""

import importlib.util
from pathlib import Path

import pytest
import torch

from fastft.environment import triton_interpreted
from fastft.errors import UsageError
from fastft.kernels.dispatch import use_triton
from fastft.kernels.nf4 import dequantize_into, nf4_dequantize, ref
from fastft.kernels.nf4.launch import Nf4Launch, heuristic

_spec = importlib.util.spec_from_file_location("matrix_judge", Path(__file__).parent / "matrix_judge.py")
judge = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(judge)
DEVICE = judge.DEVICE
KERNEL = DEVICE == "cuda" or triton_interpreted()

SHAPES = [(1, 1), (1, 7), (3, 8), (5, 51), (64, 64), (7, 129), (129, 64), (257, 72), (128, 1031), (300, 640)]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def random_weight(shape, nested, seed=0):
    """Return (packed, absmax, code2, absmax2, offset) of random bytes: every nibble and every absmax code occurs."""
    g = torch.Generator().manual_seed(seed)
    numel = shape[0] * shape[1]
    blocks = -(-numel // 64)
    packed = torch.randint(0, 256, (-(-numel // 2), 1), dtype=torch.uint8, generator=g)
    if not nested:
        parts = [packed, torch.rand(blocks, generator=g) + 0.01]
    else:
        code2 = torch.sort(torch.rand(256, generator=g) * 2 - 1).values
        absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=g)
        parts = [packed, absmax, code2, torch.rand(-(-blocks // 256), generator=g), torch.tensor(0.3217)]
    return [*(part.to(DEVICE) for part in parts), *[None] * (5 - len(parts))]


def quantised(weight, nested):
    """Return (arguments of nf4_dequantize up to absmax, what bitsandbytes dequantises it to)."""
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type="nf4")
    second = (state.state2.code, state.state2.absmax, state.offset) if nested else (None, None, None)
    return (packed, state.absmax, *second), functional.dequantize_4bit(packed, state)


def bits(tensor):
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("nested", [False, True], ids=["single", "nested"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_byte_equal_to_bitsandbytes(shape, nested, dtype, poisoned_empty):
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.7).to(DEVICE, dtype)
    args, want = quantised(weight, nested)
    got = nf4_dequantize(*args, *shape, dtype)
    assert got.dtype == dtype and got.is_contiguous()
    assert torch.equal(bits(got), bits(want))
    assert torch.equal(bits(ref.nf4_dequantize(*args, *shape, dtype)), bits(want))


def test_levels_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    assert list(ref.LEVELS) == functional.get_4bit_type("nf4", device="cpu").tolist()


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32], ids=["in_two_bytes", "in_four_bytes"])
def test_other_storage_dtypes(storage):
    packed, *rest = random_weight((64, 48), True)
    want = nf4_dequantize(packed, *rest, 64, 48, torch.float32)
    other = packed.reshape(-1).view(storage)[:, None]
    assert torch.equal(nf4_dequantize(other, *rest, 64, 48, torch.float32), want)
    assert torch.equal(ref.nf4_dequantize(other, *rest, 64, 48, torch.float32), want)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("nested", [False, True], ids=["single", "nested"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_random_bytes_equal_the_reference(shape, nested, dtype, poisoned_empty):
    args = random_weight(shape, nested)
    assert torch.equal(bits(nf4_dequantize(*args, *shape, dtype)), bits(ref.nf4_dequantize(*args, *shape, dtype)))


@pytest.mark.skipif(not KERNEL, reason="no Triton here; the interpreter test runs it")
@pytest.mark.parametrize("blocks", [1, 4, 16, 64, 256])
@pytest.mark.parametrize("gather", [False, True], ids=["select", "gather"])
def test_every_launch_setting_gives_the_same(blocks, gather):
    for shape in ((2 * blocks + 1, 72), (2 * blocks, 128)):  # programs with a tail, and four whole ones
        args = random_weight(shape, True)
        assert use_triton(*args)
        got = dequantize_into(*args, *shape, torch.float32, launch=Nf4Launch(blocks, 2, gather))
        assert torch.equal(got, ref.nf4_dequantize(*args, *shape, torch.float32))


def test_bytes_that_start_at_an_odd_address():
    args = random_weight((64, 64), True)
    shifted = torch.cat([args[0].new_zeros(1, 1), args[0]])[1:]
    assert shifted.data_ptr() % 4
    assert torch.equal(
        nf4_dequantize(shifted, *args[1:], 64, 64, torch.float32), nf4_dequantize(*args, 64, 64, torch.float32)
    )


def test_into_a_buffer_that_is_reused():
    buffer = torch.full((300 * 640,), float("nan"), device=DEVICE, dtype=torch.float16)
    for shape in ((300, 640), (64, 64), (5, 51)):
        args = random_weight(shape, True)
        out = buffer[: shape[0] * shape[1]].view(shape)
        got = dequantize_into(*args, *shape, torch.float16, out=out)
        assert got.data_ptr() == buffer.data_ptr()
        assert torch.equal(out, ref.nf4_dequantize(*args, *shape, torch.float16))


@pytest.mark.parametrize("nested", [False, True])
def test_opcheck(nested):
    for shape, dtype in (((5, 51), torch.float16), ((64, 64), torch.float32)):
        torch.library.opcheck(torch.ops.fastft.nf4_dequantize, (*random_weight(shape, nested), *shape, dtype))


@pytest.mark.parametrize("function", [nf4_dequantize, ref.nf4_dequantize], ids=["op", "ref"])
def test_compiles_whole(function):
    args = random_weight((64, 72), True)

    def both(x, *args):
        return x @ function(*args, 64, 72, torch.float32).t()

    x = torch.randn(3, 72, device=DEVICE, requires_grad=True)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, *args), both(x, *args))


@pytest.mark.parametrize("function", [nf4_dequantize, ref.nf4_dequantize], ids=["op", "ref"])
def test_can_be_emitted_as_graph_nodes(function):
    args = random_weight((5, 51), True)
    graph = torch.fx.Graph()
    tracer = torch.fx.proxy.GraphAppendingTracer(graph)
    proxies = [torch.fx.Proxy(graph.placeholder(f"p{i}"), tracer) for i in range(5)]
    graph.output(function(*proxies, 5, 51, torch.float32).node)
    module = torch.fx.GraphModule(torch.nn.Module(), graph)
    assert torch.equal(module(*args), ref.nf4_dequantize(*args, 5, 51, torch.float32))


def test_sizes_that_do_not_fit_are_told_at_once():
    packed, absmax, code2, absmax2, offset = random_weight((64, 64), True)
    with pytest.raises(UsageError, match=r"packed: (.|\n)*absmax: (.|\n)*absmax2: (.|\n)*out: "):
        dequantize_into(packed, absmax, code2, absmax2, offset, 640, 640, torch.float32, out=torch.empty(2))
    with pytest.raises(UsageError, match="all three or none"):
        dequantize_into(packed, absmax, code2, None, offset, 64, 64, torch.float32)


@pytest.mark.parametrize("numel", [1, 64, 1 << 20, 14336 * 4096, 1 << 32])
def test_heuristic_fills_the_gpu_and_stays_in_the_grid(numel):
    launch = heuristic(numel)
    programs = -(-numel // (64 * launch.blocks))
    assert 256 % launch.blocks == 0 and programs < 2**31
    assert numel < 1 << 20 or programs >= 1024


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("nested", [False, True], ids=["single", "nested"])
def test_beyond_two_to_the_31_elements(nested):
    shape = (33000, 66000)  # 2.18e9 weights: the last rows lie beyond 32-bit offsets
    args = random_weight(shape, nested)
    got = nf4_dequantize(*args, *shape, torch.bfloat16)
    start = (shape[0] * shape[1] - 64 * 256 * 40) // (64 * 256) * (64 * 256)  # the tail, on a second-level block
    tail = [args[0][start // 2 :], args[1][start // 64 :], args[2], None, args[4]]
    tail[3] = None if args[3] is None else args[3][start // (64 * 256) :]
    want = ref.nf4_dequantize(*tail, 1, shape[0] * shape[1] - start, torch.bfloat16)
    assert torch.equal(got.view(-1)[start:], want.view(-1))
