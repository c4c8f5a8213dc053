"""A few rows of an output head's logits at a time: what the ops over a head share.

The logits of a chunk of rows are one GEMM into a buffer that all chunks use; the op replaces them by their gradient,
and more GEMMs turn that into the gradients of hidden states, weight and bias.
"""

from collections.abc import Iterator

import torch
from attrs import frozen
from torch import Tensor

from fastft.errors import Problem, UsageError

CPU_LOGITS_BYTES = 16 << 20


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums and probabilities of `dtype` logits have: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def chunk_rows(rows: int, vocab: int, itemsize: int, *, cuda: bool, gpu_bytes: int) -> int:
    """Return how many of `rows` rows of `vocab` logits of `itemsize` bytes to hold at once.

    On a GPU the logits of a chunk, which their gradient overwrites, stay within `gpu_bytes` and the chunks are of about
    equal height, a multiple of 128 so that no GEMM tile is cut; on a CPU within 16 MiB, near its caches.
    """
    budget = gpu_bytes if cuda else CPU_LOGITS_BYTES
    multiple = 128 if cuda else 16
    most = max(multiple, budget // (vocab * itemsize) // multiple * multiple)
    if rows <= most:
        return max(rows, 1)
    chunks = -(-rows // most)
    return min(most, -(-rows // chunks // multiple) * multiple)


def head_problems(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, name: str, targets: Tensor, **positive: int | None
) -> list[Problem]:
    """Return what is wrong with the arguments of an op over a head; `name`: how its user calls the targets.

    positive: options that are None or a number of rows; of `valid_rows` 0 is allowed.
    """
    problems = []
    if weight.dim() != 2 or weight.shape[-1] != hidden.shape[-1]:
        problems.append(Problem("weight", tuple(weight.shape), f"shape (V, {hidden.shape[-1]})"))
    if targets.shape != hidden.shape[:-1]:
        problems.append(Problem(name, tuple(targets.shape), f"shape {tuple(hidden.shape[:-1])}, one for each row"))
    if targets.is_floating_point():
        problems.append(Problem(name, targets.dtype, "integers"))
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        problems.append(Problem("bias", tuple(bias.shape), f"shape {(weight.shape[0],)}"))
    for option, value in positive.items():
        if value is not None and value < (option != "valid_rows"):
            problems.append(Problem(option, value, "None or a positive number"))
    return problems


def check_range(targets: Tensor, name: str, ignore_index: int, vocab: int) -> None:
    """Raise UsageError for targets that are neither in [0, vocab) nor `ignore_index`. Reads them: CPU only."""
    wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= vocab))]
    if wrong.numel():
        allowed = f"0 to {vocab - 1}, or {ignore_index} for none"
        raise UsageError(Problem(name, wrong[0].item(), allowed, f"{wrong.numel()} like it"))


def rows_to_compute(targets: Tensor, ignore_index: int, valid_rows: int) -> Tensor | None:
    """Return the rows to compute, those with a target first, or None for all of them.

    On a CPU rows without a target are dropped. On a GPU their number is known only to the device, and asking for it
    would stall the queue of launches: all rows are kept, unless the caller knows a bound, `valid_rows` (-1: none).
    """
    if targets.device.type == "cpu" and valid_rows < 0:
        kept = (targets != ignore_index).nonzero().squeeze(1)
        return None if kept.shape[0] == targets.shape[0] else kept
    if valid_rows < 0 or valid_rows >= targets.shape[0]:
        return None
    return torch.argsort((targets == ignore_index).to(torch.uint8), stable=True)[:valid_rows]


def logits_chunks(hidden: Tensor, weight: Tensor, bias: Tensor | None, height: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, hidden[rows] weight^T + bias) for all rows of hidden [n, D], `height` at a time, in one buffer."""
    n = hidden.shape[0]
    height = min(height, n) or 1
    logits = torch.empty(min(height, n), weight.shape[0], dtype=hidden.dtype, device=hidden.device)
    for start in range(0, n, height):
        part = slice(start, min(start + height, n))
        chunk = logits[: part.stop - start]
        if bias is None:
            torch.mm(hidden[part], weight.t(), out=chunk)
        else:
            torch.addmm(bias, hidden[part], weight.t(), out=chunk)
        yield part, chunk


@frozen(eq=False)
class HeadGradients:
    """Gradients of hidden [n, D] in its dtype or fp32, and of weight [V, D] and bias [V] in fp32 (fp64 for fp64).

    One that is not needed has no elements.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def zero(
        cls, hidden: Tensor, weight: Tensor, needs: tuple[bool, bool, bool], dtype: torch.dtype | None = None
    ) -> "HeadGradients":
        """Return zeros for those that are needed; `hidden`, which `add` fills row by row, is left unset.

        dtype: that of the gradient of hidden, if it is not hidden's.
        """
        work, where = work_dtype(hidden.dtype), hidden.device
        return cls(
            torch.empty(hidden.shape if needs[0] else 0, dtype=dtype or hidden.dtype, device=where),
            torch.zeros(weight.shape if needs[1] else 0, dtype=work, device=where),
            torch.zeros(weight.shape[0] if needs[2] else 0, dtype=work, device=where),
        )

    def add(self, part: slice, dlogits: Tensor, hidden: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]) -> None:
        """Take in the gradient over the logits of the rows `part` of `hidden`."""
        if needs[0]:
            _multiply(dlogits, weight, self.hidden[part])
        if needs[1]:
            _accumulate(self.weight, dlogits, hidden[part])
        if needs[2]:
            self.bias.add_(dlogits.sum(0, dtype=self.bias.dtype))


def fake_gradients(hidden: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Return tensors of the shapes and dtypes of `HeadGradients`, for the fake implementation of an op."""
    work = work_dtype(hidden.dtype)
    return (
        hidden.new_empty(hidden.shape if needs[0] else (0,)),
        hidden.new_empty(weight.shape if needs[1] else (0,), dtype=work),
        hidden.new_empty(weight.shape[:1] if needs[2] else (0,), dtype=work),
    )


def _multiply(dlogits: Tensor, weight: Tensor, out: Tensor) -> None:
    """Write dlogits weight to `out`; where that is fp32 and they are not, without rounding to 16 bits in between."""
    if out.dtype == dlogits.dtype:
        torch.mm(dlogits, weight, out=out)
    elif out.is_cuda:
        torch.ops.aten.mm.dtype_out(dlogits, weight, out.dtype, out=out)
    else:
        torch.mm(dlogits.to(out.dtype), weight.to(out.dtype), out=out)


def _accumulate(into: Tensor, dlogits: Tensor, hidden: Tensor) -> None:
    """Add dlogits^T hidden to `into`, which has at least fp32, without rounding the sum to 16 bits in between."""
    if into.dtype == dlogits.dtype:
        into.addmm_(dlogits.t(), hidden)
    elif into.is_cuda:
        torch.ops.aten.addmm.dtype_out(into, dlogits.t(), hidden, into.dtype, out=into)
    else:
        into.addmm_(dlogits.t().to(into.dtype), hidden.to(into.dtype))
