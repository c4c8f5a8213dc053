"""The number formats, byte for byte against ggml's own quantisers, and back."""

import ctypes
import importlib.util
from pathlib import Path

import pytest
import torch

from fastft.errors import UsageError
from fastft.export.gguf.quants import BY_ID, TYPES, compiled, dequantize, gguf_type, quantize, search, takes_importance

N = 512
FLOATS = ("f32", "f16", "bf16")
WEIGHTED = [name for name in TYPES if takes_importance(name)]


@pytest.fixture(scope="module")
def ggml():
    """The C functions of the ggml that the package xllamacpp carries."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None:
        pytest.skip("xllamacpp is not installed (pip install 'fastft[judges]')")
    library = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("xllamacpp*.so"))))
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def ggml_bytes(ggml, x, name, importance=None):
    kind = gguf_type(name)
    x = x.contiguous()
    out = torch.full((len(x), kind.row_bytes(x.shape[1])), 0xAA, dtype=torch.uint8)
    weights = None if importance is None else importance.data_ptr()
    size = ggml.ggml_quantize_chunk(kind.ggml_id, x.data_ptr(), out.data_ptr(), 0, *x.shape, weights)
    assert size == out.numel()
    return out


def ggml_numbers(ggml, data, name, count):
    call = getattr(ggml, f"dequantize_row_{name[:-1] + 'K' if name.endswith('_k') else name}")
    call.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    call.restype = None
    out = torch.empty(count)
    call(data.data_ptr(), out.data_ptr(), count)
    return out


def cases():
    g = torch.Generator().manual_seed(0)

    def normal(rows=8, scale=1.0):
        return torch.randn(rows, N, generator=g) * scale

    def uniform(rows=8):
        return torch.rand(rows, N, generator=g)

    def but(value, every, start, others):
        x = others.clone()
        x[:, start::every] = value
        return x

    signs = torch.randint(0, 2, (8, N), generator=g) * 2.0 - 1
    zeros = torch.where(torch.rand(8, N, generator=g) < 0.5, 0.0, -0.0)
    near = 1 - torch.randint(0, 40, (24, 1), generator=g) / 2**24
    near = near * 2.0 ** torch.randint(-140, 120, (24, 1), generator=g)
    found = {
        "normal": normal(24),
        "weights": normal(16, 0.02),
        "uniform": uniform() * 2 - 1,
        "positive": uniform(),
        "negative": -uniform(),
        "heavy tails": normal() / normal().abs().clamp(min=1e-4),
        "heavier tails": normal() ** 5,
        "constant": torch.tensor([1.0, -1.0, 0.5, -3e-5, 7.0])[:, None].expand(5, N),
        "zero": torch.zeros(1, N),
        "minus zero": -torch.zeros(1, N),
        "both zeros": zeros,
        "zeros among positive": torch.where(uniform() < 0.3, zeros, uniform()),
        "ties": torch.randint(-8, 8, (8, N), generator=g).float(),
        "half ties": torch.randint(-3, 4, (8, N), generator=g) * 0.5,
        "plus minus one": signs,
        "outlier": but(100.0, 64, 0, normal(8, 0.01)),
        "one large": but(-100.0, 256, 5, normal(8, 1e-6)),
        "all but one": but(0.5, 32, 3, torch.full((4, N), 0.25)),
        "all but one, negative": but(-0.26, 32, 3, torch.full((4, N), -0.25)),
        "one": but(-3.0, 32, 9, zeros),
        "powers": signs * 2.0 ** torch.randint(-20, 20, (8, N), generator=g),
        "just below powers": torch.cat((near, normal(24)[:, 1:].clamp(-1, 1) * near), 1),
        "groups of all sizes": (normal().view(8, -1, 16) * torch.exp(4 * normal()[:, : N // 16, None])).view(8, N),
        "denormal": normal(8, 1e-40),
        "smallest denormal": normal(8, 1e-44),
    }
    for exponent in (-15, -20, -30, -37, 4, 6, 15, 19, 30):
        found[f"1e{exponent}"] = normal(4, 10.0**exponent)
    found["1e38"] = normal(4, 1e38).clamp(-3.4e38, 3.4e38)
    return {name: x.contiguous() for name, x in found.items()}


def importances():
    g = torch.Generator().manual_seed(1)
    plain = torch.rand(N, generator=g)
    return {
        "uniform": plain + 0.01,
        "spread": torch.exp(3 * torch.randn(N, generator=g)),
        "half zero": torch.where(torch.rand(N, generator=g) < 0.5, 0.0, plain),
        "zero": torch.zeros(N),
    }


@pytest.mark.parametrize("name", TYPES)
def test_bytes_and_numbers_are_ggmls(ggml, name):
    for case, x in cases().items():
        expected = ggml_bytes(ggml, x, name)
        assert torch.equal(quantize(x, name, strict=False), expected), case
        back = dequantize(expected, name, tuple(x.shape))
        if name not in FLOATS:
            numbers = ggml_numbers(ggml, expected, name, x.numel()).view_as(x)
            assert torch.equal(back.nan_to_num(nan=7.0), numbers.nan_to_num(nan=7.0)), case


@pytest.mark.parametrize("name", WEIGHTED)
def test_bytes_with_importance_are_ggmls(ggml, name):
    changed = 0
    every = list(cases().items())
    without = {case: quantize(x, name, strict=False) for case, x in every}
    for kind, importance in importances().items():
        for case, x in every if kind == "spread" else every[::3]:
            got = quantize(x, name, importance, strict=False)
            assert torch.equal(got, ggml_bytes(ggml, x, name, importance)), (kind, case)
            changed += not torch.equal(got, without[case])
    assert changed > 10


@pytest.mark.parametrize("name", [name for name in TYPES if name not in WEIGHTED])
def test_types_that_take_no_importance_ignore_it(ggml, name):
    x, importance = cases()["normal"], importances()["uniform"]
    assert torch.equal(quantize(x, name, importance), ggml_bytes(ggml, x, name, importance))


def test_chunks_and_ranges_of_rows_do_not_show(ggml, monkeypatch):
    x = torch.randn(37, N, generator=torch.Generator().manual_seed(2))
    importance = importances()["spread"]
    monkeypatch.setattr("fastft.export.gguf.quants.api._ROWS_AT_ONCE", 5 * N)
    monkeypatch.setattr("fastft.export.gguf.quants.api.PLAIN", search.Steps(*_plain(), chunk=3 * 256, fixed=True))
    for name in ("q4_k", "q4_1", "q6_k", "iq4_nl"):
        assert torch.equal(quantize(x, name, importance), ggml_bytes(ggml, x, name, importance)), name


def test_every_expert_has_its_own_importance(ggml):
    x = torch.randn(6, N, generator=torch.Generator().manual_seed(4))
    importance = torch.stack([importances()["uniform"], importances()["spread"], importances()["half zero"]])
    for name in ("q4_k", "q4_0", "q8_0"):
        own = [ggml_bytes(ggml, x[2 * i : 2 * i + 2], name, importance[i]) for i in range(3)]
        assert torch.equal(quantize(x, name, importance), torch.cat(own)), name
    with pytest.raises(UsageError, match=r"importance: expected \[512\], one a column, or \[experts, 512\]"):
        quantize(x, "q4_k", importance[[0, 1, 2, 0]])


def _plain():
    return search.PLAIN.affine, search.PLAIN.symmetric, search.PLAIN.descend, search.PLAIN.table


def test_error_of_the_round_trip_falls_with_the_bits():
    x = cases()["weights"]

    def error(name):
        return ((dequantize(quantize(x, name), name, tuple(x.shape)) - x).norm() / x.norm()).item()

    errors = [error(name) for name in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0", "f16", "f32")]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0 and errors[2] < 0.08 and errors[0] < 0.4


def test_any_float_and_layout_is_taken():
    x = torch.randn(N, 16).t().to(torch.bfloat16)
    assert torch.equal(quantize(x, "q4_k"), quantize(x.float().contiguous(), "q4_k"))


@pytest.mark.parametrize(("value", "text"), [(float("nan"), "nan"), (float("-inf"), "-inf")])
def test_nan_and_infinity_are_refused_and_placed(value, text):
    x = torch.randn(4, N)
    x[2, 300] = x[3, 1] = value
    for name in TYPES:
        with pytest.raises(UsageError, match=rf"{text} at row 2, column 300 and 1 more"):
            quantize(x, name)


def test_weights_that_overflow_the_scale_are_refused_unless_told_otherwise():
    x = torch.ones(3, N)
    x[1, 40] = 1e9
    for name in ("q4_k", "q8_0", "f16", "q5_1"):
        with pytest.raises(UsageError, match=r"too large for an fp16 (scale|number) in row 1"):
            quantize(x, name)
        assert quantize(x, name, strict=False).shape[0] == 3
    quantize(x, "bf16")


def test_shapes_and_names_are_checked_together():
    with pytest.raises(UsageError, match=r"rows of a multiple of 256 weights for q4_k(.|\n)*importance"):
        quantize(torch.zeros(2, 96), "q4_k", torch.zeros(7))
    with pytest.raises(UsageError, match="negative"):
        quantize(torch.zeros(2, 256), "q4_k", -torch.ones(256))
    with pytest.raises(UsageError, match=r"did you mean 'q4_k'"):
        quantize(torch.zeros(2, 256), "q4_kk")
    with pytest.raises(UsageError, match="144 bytes for shape"):
        dequantize(torch.zeros(143, dtype=torch.uint8), "q4_k", (1, 256))


def test_the_table_is_gguf_pys():
    gguf = pytest.importorskip("gguf")
    for kind in TYPES.values():
        number = gguf.GGMLQuantizationType[kind.name.upper()]
        assert int(number) == kind.ggml_id and gguf.GGML_QUANT_SIZES[number] == (kind.block_size, kind.type_size)
        assert BY_ID[kind.ggml_id] is kind


@pytest.mark.inductor
@pytest.mark.parametrize("name", ["q4_k", "q6_k"])
def test_compiled_steps_give_the_same_bytes(ggml, name, caplog):
    if not compiled.can_compile():
        pytest.skip("no C++ compiler is installed")
    x = torch.cat([x for case, x in cases().items()])
    importance = importances()["spread"]
    for weights in (None, importance):
        got = quantize(x, name, weights, compiled=True, strict=False)
        assert torch.equal(got, ggml_bytes(ggml, x, name, weights))
    assert "is not used" not in caplog.text and "no C++" not in caplog.text


def test_a_compiled_step_that_differs_is_not_used(monkeypatch, caplog):
    monkeypatch.setattr(torch, "compile", lambda step, **options: lambda *arguments: (step(*arguments)[0] + 1,))
    step = compiled._checked(lambda x: (x * 2,))
    for _ in range(2):
        assert torch.equal(step(torch.ones(3))[0], torch.full((3,), 2.0))
    assert len([record for record in caplog.records if "is not used" in record.message]) == 1


def test_a_compiler_that_fails_leaves_the_plain_steps(monkeypatch, caplog):
    """A compiler may be there without the headers that Inductor's code includes."""

    def broken(step, **options):
        def fails(*arguments):
            raise torch._dynamo.exc.TorchDynamoException("omp.h: no such file\nand more")

        return fails

    monkeypatch.setattr(torch, "compile", broken)
    step = compiled._checked(lambda x: (x * 2,))
    for _ in range(2):
        assert torch.equal(step(torch.ones(3))[0], torch.full((3,), 2.0))
    assert [record.message.endswith("slower: omp.h: no such file") for record in caplog.records] == [True]


def test_without_a_compiler_the_plain_steps_are_taken_and_it_is_said(monkeypatch, caplog):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert compiled.compiled_steps.__wrapped__() is search.PLAIN
    assert "no C++ compiler" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("name", TYPES)
def test_the_same_bytes_on_cuda(name):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    # scales become NaN in those left out, which has other bits on a GPU
    every = {case: x for case, x in cases().items() if case not in ("1e19", "1e30", "1e38")}
    usual = {
        case: x for case, x in every.items() if x.abs().max() < 1e3
    }  # rounding takes another way among larger ones
    for group in (usual, every):
        x = torch.cat(list(group.values()))
        owner = [case for case, part in group.items() for _ in part]
        for importance in (None, importances()["spread"]):
            expected = quantize(x, name, importance, strict=False)
            got = quantize(x.cuda(), name, importance, strict=False).cpu()
            differing = (got != expected).any(1).nonzero().flatten().tolist()
            assert not differing, sorted({owner[row] for row in differing})
