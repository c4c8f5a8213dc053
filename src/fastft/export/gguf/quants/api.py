"""Quantise and dequantise tensors: whole rows in, bytes of whole rows out, a chunk of blocks at a time."""

from collections.abc import Callable, Iterator

import torch
from attrs import frozen
from torch import Tensor

from fastft.errors import Problem, UsageError
from fastft.export.gguf.quants import kquants, nonlinear, simple, ternary
from fastft.export.gguf.quants.arithmetic import divide, half, ordered_sum
from fastft.export.gguf.quants.compiled import compiled_steps
from fastft.export.gguf.quants.kquants import Importance
from fastft.export.gguf.quants.search import PLAIN, Steps
from fastft.export.gguf.quants.types import TYPES, GgufType, gguf_type

_CHUNK = 1 << 18  # weights at once where no search decides: what fits the cache with its intermediates
_CHUNK_GPU = 1 << 26
_ROWS_AT_ONCE = 1 << 24  # weights


@frozen
class _Codec:
    """The two directions of a format, over blocks as columns, and where its fp16 numbers lie in a block's bytes."""

    encode: Callable[[Tensor, Importance | None, Steps], Tensor]
    decode: Callable[[Tensor], Tensor]
    halves: tuple[int, ...] = ()
    importance: bool = False
    row_spread: bool = False  # its error weights take the mean square of the whole row


def _codecs() -> dict[str, _Codec]:
    table = {
        "f32": (simple, (), ""),
        "f16": (simple, (0,), ""),
        "bf16": (simple, (), ""),
        "q8_0": (simple, (0,), ""),
        "q4_0": (simple, (0,), "row"),
        "q4_1": (simple, (0, 2), "row"),
        "q5_0": (simple, (0,), "row"),
        "q5_1": (simple, (0, 2), "row"),
        "q2_k": (kquants, (80, 82), "block"),
        "q3_k": (kquants, (108,), "block"),
        "q4_k": (kquants, (0, 2), "block"),
        "q5_k": (kquants, (0, 2), "block"),
        "q6_k": (kquants, (208,), "block"),
        "iq4_nl": (nonlinear, (0,), "block"),
        "iq4_xs": (nonlinear, (0,), "block"),
        "mxfp4": (nonlinear, (), ""),
        "tq1_0": (ternary, (52,), ""),
        "tq2_0": (ternary, (64,), ""),
    }
    return {
        name: _Codec(
            getattr(module, f"quantize_{name}"),
            getattr(module, f"dequantize_{name}"),
            halves,
            importance=bool(spread),
            row_spread=spread == "row",
        )
        for name, (module, halves, spread) in table.items()
    }


_CODECS = _codecs()


def takes_importance(type: str | GgufType) -> bool:
    """Say whether an importance matrix changes what a format's quantiser writes."""
    return _CODECS[gguf_type(type).name].importance


@torch.no_grad()
def quantize(
    x: Tensor,
    type: str | GgufType,
    importance: Tensor | None = None,
    *,
    compiled: bool = False,
    strict: bool = True,
) -> Tensor:
    """Return the bytes of x in a format, the same that ggml's `ggml_quantize_chunk` writes.

    * x: floats [rows, n] on a CPU or CUDA device, taken as fp32; n is a multiple of the format's block size.
    * importance: fp32 [n], how much an error in each column counts (the mean square of what the layer's input holds
      there), or [experts, n] for the matrices of experts one below the other; formats that take none ignore it, as in
      ggml.
    * compiled: run the searches as code compiled once a process by `torch.compile`, which needs a C++ compiler and some
      seconds, and is worth it from some hundred million weights on; the bytes stay the same.
    * strict: raise also where finite weights are too large for the fp16 scale, so that infinity would be written.

    Returns uint8 [rows, bytes a row] on x's device. Raises `UsageError` for wrong shapes, and for NaN or infinity.
    """
    entry = gguf_type(type)
    codec = _CODECS[entry.name]
    _check_input(x, entry, importance)
    if importance is not None and importance.ndim == 2:
        parts = zip(x.chunk(len(importance)), importance, strict=True)
        return torch.cat([quantize(part, entry, own, compiled=compiled, strict=strict) for part, own in parts])
    if importance is not None:
        importance = importance.to(x.device, torch.float32).contiguous() if codec.importance else None
    steps = compiled_steps() if compiled and x.device.type == "cpu" else PLAIN
    rows, n = x.shape
    out = torch.empty(rows, entry.row_bytes(n), dtype=torch.uint8, device=x.device)
    for start, stop in _row_ranges(rows, n, _ROWS_AT_ONCE if x.device.type == "cpu" else _CHUNK_GPU):
        part = x[start:stop].float().contiguous()
        if not all(end.isfinite() for end in part.aminmax()):
            raise UsageError(_not_finite(part, start))
        blocks = _encode(part, entry, codec, importance, steps)
        if strict:
            _check_scales(blocks, codec, entry, start, n)
        out[start:stop] = blocks.view(stop - start, -1)
    return out


def dequantize(data: Tensor, type: str | GgufType, shape: tuple[int, ...]) -> Tensor:
    """Return the fp32 tensor of `shape` that uint8 `data` (any shape, whole blocks in order) holds in a format.

    Raises `UsageError` if the number of bytes does not belong to the shape.
    """
    entry = gguf_type(type)
    count = 1
    for size in shape:
        count *= size
    if count % entry.block_size or entry.row_bytes(count) != data.numel():
        expected = f"{entry.row_bytes(count)} bytes for shape {tuple(shape)} in {entry.name}"
        raise UsageError(Problem("data", f"{data.numel()} bytes", expected))
    codec = _CODECS[entry.name]
    out = torch.empty(count // entry.block_size, entry.block_size, device=data.device)
    blocks = data.reshape(-1, entry.type_size)
    size = max(1, (_CHUNK if data.device.type == "cpu" else _CHUNK_GPU) // entry.block_size)
    for start in range(0, len(blocks), size):
        out[start : start + size] = codec.decode(blocks[start : start + size].t().contiguous()).t()
    return out.view(shape)


def _row_ranges(rows: int, n: int, weights: int) -> Iterator[tuple[int, int]]:
    step = max(1, weights // max(n, 1))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _encode(x: Tensor, entry: GgufType, codec: _Codec, importance: Tensor | None, steps: Steps) -> Tensor:
    """Return the blocks' bytes [blocks, type_size] of whole rows x [rows, n]."""
    blocks = x.view(-1, entry.block_size)
    out = torch.empty(len(blocks), entry.type_size, dtype=torch.uint8, device=x.device)
    a_row = x.shape[1] // entry.block_size
    spread = None
    if importance is not None and codec.row_spread:
        transposed = x.t().contiguous()
        spread = divide(ordered_sum(transposed.mul_(transposed)), x.shape[1])
    size = max(1, (steps.chunk if x.device.type == "cpu" else _CHUNK_GPU) // entry.block_size)
    for start in range(0, len(blocks), size):
        columns = blocks[start : start + size].t()
        count = columns.shape[1]
        short = size - count if steps.fixed else 0
        columns = torch.nn.functional.pad(columns, (0, short)) if short else columns.contiguous()
        weights = None
        if importance is not None:
            index = torch.arange(start, start + columns.shape[1], device=x.device)
            column_weights = importance.view(a_row, -1)[index % a_row].t().contiguous()
            mean = spread[(index // a_row).clamp_(max=len(spread) - 1)] if spread is not None else None
            weights = Importance(column_weights, mean)
        out[start : start + count] = codec.encode(columns, weights, steps)[:, :count].t()
    return out


def _check_input(x: Tensor, entry: GgufType, importance: Tensor | None) -> None:
    problems = []
    if x.ndim != 2:
        problems.append(Problem("x", f"shape {tuple(x.shape)}", "two dimensions, [rows, n]"))
    elif x.shape[1] % entry.block_size or not x.shape[1]:
        problems.append(
            Problem("x", f"rows of {x.shape[1]}", f"rows of a multiple of {entry.block_size} weights for {entry.name}")
        )
    if not x.is_floating_point():
        problems.append(Problem("x", str(x.dtype), "a floating-point tensor"))
    if importance is not None:
        experts = len(importance) if importance.ndim == 2 else 1
        if x.ndim == 2 and (importance.shape[-1:] != x.shape[1:] or importance.ndim > 2 or len(x) % max(experts, 1)):
            expected = f"[{x.shape[-1]}], one a column, or [experts, {x.shape[-1]}]"
            problems.append(Problem("importance", f"shape {tuple(importance.shape)}", expected))
        if not bool((importance.isfinite() & (importance >= 0)).all()):
            problems.append(Problem("importance", "a negative number, NaN or infinity", "finite numbers from 0 on"))
    if problems:
        raise UsageError(*problems)


def _not_finite(x: Tensor, first_row: int) -> Problem:
    wrong = (~x.isfinite()).nonzero()
    row, column = wrong[0].tolist()
    value = f"{x[row, column].item()} at row {first_row + row}, column {column}"
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return Problem("x", value + more, "finite weights", "such a model answers with garbage; train or load it anew")


def _check_scales(blocks: Tensor, codec: _Codec, entry: GgufType, first_row: int, n: int) -> None:
    for place in codec.halves:
        wrong = ~half(blocks[:, place : place + 2].t()).isfinite()
        if bool(wrong.any()):
            row = first_row + int(wrong.nonzero()[0]) * entry.block_size // n
            value = f"weights too large for an fp16 {'scale' if entry.block_size > 1 else 'number'} in row {row}"
            raise UsageError(Problem("x", value, f"weights that {entry.name} can hold", "export as bf16 or f32"))


def supported() -> tuple[str, ...]:
    """Return the names of the formats that fastft reads and writes."""
    return tuple(TYPES)
