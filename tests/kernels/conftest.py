"""Judging kernels: RMS error ratio against fp64, with the error of the same-dtype torch computation as the budget."""

import pytest
import torch

from fastft.environment import triton_interpreted
from fastft.kernels.dispatch import use_triton

# No smaller budget than this, lest torch's good luck be our failure: about the RMS of one rounding for 16-bit dtypes,
# and for few values twice that, the most that one rounding does; for fp32, where sums in another order differ by a few
# roundings, four units in the last place.
FLOOR = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float32: 4 * 2.0**-23, torch.float64: 1e-13}
FACTOR = 1.1
FEW = 64


@pytest.fixture
def device():
    """Where kernels are tested: the GPU if there is one, else the CPU (reference, or Triton's interpreter)."""
    return torch.device("cuda" if torch.cuda.is_available() and not triton_interpreted() else "cpu")


@pytest.fixture
def cuda():
    if not torch.cuda.is_available() or triton_interpreted():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")


@pytest.fixture
def check_dtype(device):
    """Skip what only a GPU can judge: Triton's interpreter truncates when it rounds to bf16."""

    def check(dtype):
        if dtype == torch.bfloat16 and triton_interpreted():
            pytest.skip("Triton's interpreter truncates to bf16; judged on a GPU")

    return check


@pytest.fixture
def kernel_device(device):
    """The device, where a Triton kernel would run on it."""
    if not use_triton(torch.empty(1, device=device)):
        pytest.skip("no Triton kernel runs here: needs a GPU or TRITON_INTERPRET=1")
    return device


def error_ratio(out: torch.Tensor, truth: torch.Tensor) -> float:
    """||out - truth|| / ||truth|| in fp64; NaN and infinity count as infinite error."""
    out, truth = out.detach().double(), truth.detach().double()
    if not out.isfinite().all():
        return float("inf")
    scale = truth.norm().item()
    return ((out - truth).norm() / (scale if scale > 0 else 1.0)).item()


def evaluate(fn, args, seed=0):
    """Return fn's outputs and its gradients for the arguments that require them, under seeded upstream gradients."""
    outputs = fn(*args)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(seed)
    # Rounded to bf16, so that every dtype gets the same upstream gradient.
    upstream = [torch.randn(out.shape, generator=generator).bfloat16().to(out.device, out.dtype) for out in outputs]
    wanted = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.requires_grad]
    return [*outputs, *(torch.autograd.grad(outputs, wanted, upstream) if wanted else ())]


def as_double(args):
    """The same values in fp64."""
    return [
        arg.detach().double().requires_grad_(arg.requires_grad)
        if isinstance(arg, torch.Tensor) and arg.is_floating_point()
        else arg
        for arg in args
    ]


@pytest.fixture
def compare():
    """Judge op(*args) and all its gradients; `eager` is the same computation in torch, `truth` that for fp64 inputs."""

    def compared(op, eager, truth, args):
        got, same_dtype, exact = evaluate(op, args), evaluate(eager, args), evaluate(truth, as_double(args))
        assert len(got) == len(same_dtype) == len(exact)
        for index, (ours, theirs, reference) in enumerate(zip(got, same_dtype, exact)):
            assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
            floor = FLOOR[ours.dtype] * (2 if ours.numel() < FEW else 1)
            budget = max(FACTOR * error_ratio(theirs, reference), floor)
            error = error_ratio(ours, reference)
            assert error <= budget, f"result {index}: error {error:.3e}, budget {budget:.3e}"

    return compared


@pytest.fixture
def same_as_eager():
    """Require equality with what eager modules compute: bit for bit where the reference runs.

    A GPU sums in another order, which moves a 16-bit rounding now and then: at most 2 in 1,000 values there.
    """

    def same(out, expected):
        assert out.shape == expected.shape and out.dtype == expected.dtype
        differing = (out != expected).double().mean().item()
        assert differing <= (0.002 if use_triton(out) else 0.0)
        assert error_ratio(out, expected) <= (FLOOR[out.dtype] if use_triton(out) else 0.0)

    return same


@pytest.fixture
def strided():
    """Make a tensor of the given shape with the named memory layout, filled with seeded normal values."""

    def make(shape, layout, dtype, device, seed=0):
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
        if layout == "contiguous":
            return values
        if layout == "transposed":  # [..., A, B, D] whose memory is [..., B, A, D]
            return values.transpose(-2, -3).contiguous().transpose(-2, -3)
        if layout == "packed":  # a slice of a wider last dimension
            wide = torch.zeros((*shape[:-1], 2 * shape[-1] + 8), dtype=dtype, device=device)
            view = wide[..., 8 : 8 + shape[-1]]
        elif layout == "columns":  # last stride 2
            view = torch.zeros((*shape[:-1], 2 * shape[-1]), dtype=dtype, device=device)[..., ::2]
        elif layout == "scattered":  # no two dimensions merge
            view = torch.zeros([size + 1 for size in shape], dtype=dtype, device=device)[
                tuple(slice(size) for size in shape)
            ]
        return view.copy_(values)

    return make
