"""Tensors through the quantisers into files: one is read and one is written while one is quantised."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from math import prod
from pathlib import Path

import numpy as np
import torch
from attrs import frozen
from tqdm.auto import tqdm

from fastft.errors import SaveError, UsageError
from fastft.export.gguf.file import FileWriter, padded
from fastft.export.gguf.quants import quantize
from fastft.export.gguf.tensors import FileTensor

_COMPILE_FROM = 100_000_000  # weights
# Float formats are casts; torch rounds to the nearest, ties to even, as ggml does.
_FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def stream(
    tensors: Sequence[FileTensor],
    writers: Sequence[FileWriter],
    device: torch.device,
    importance: Mapping[str, torch.Tensor] | None = None,
    progress: bool = True,
) -> None:
    """Write `tensors` to every file, each in the type the file asks for, and give the files their names.

    At most three tensors are held: one being read, one being quantised on `device`, and one's bytes being written.
    Raises UsageError that names the tensor for NaN and infinity, and SaveError; then no file is left.
    """
    types = [{entry.name: entry.type for entry in writer.tensors} for writer in writers]
    encoder = _Encoder(device, importance or {}, _worth_compiling(writers))
    total = sum(padded(entry.size) for writer in writers for entry in writer.tensors)
    with ExitStack() as stack:
        files = [stack.enter_context(writer) for writer in writers]
        # the threads are joined before the files are closed
        reader, putter = (stack.enter_context(ThreadPoolExecutor(1)) for _ in range(2))
        bar = stack.enter_context(
            tqdm(total=total, unit="B", unit_scale=True, desc="GGUF", disable=None if progress else True)
        )
        pending: Future[int] | None = None
        for tensor, values in _ahead(reader, tensors):
            kinds = [kind[tensor.name] for kind in types]
            made = encoder.encoded(tensor, values, tuple(dict.fromkeys(kinds)))
            del values
            if pending is not None:
                bar.update(pending.result())
            pending = putter.submit(_put, files, tensor.name, [made[kind] for kind in kinds])
        if pending is not None:
            bar.update(pending.result())
        for file in files:
            file.finish()


def check_folder(folder: Path) -> None:
    """Raise UsageError if a file has the name of the folder."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: this is a file; give the name of a folder")


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; raises UsageError for a file of that name, and SaveError."""
    check_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"{folder}: the folder cannot be made ({error.strerror})") from error


def _ahead(reader: ThreadPoolExecutor, tensors: Sequence[FileTensor]) -> Iterator[tuple[FileTensor, torch.Tensor]]:
    """Yield each tensor with its values, while the next one is being read."""
    waiting = reader.submit(_read, tensors[0])
    for index, tensor in enumerate(tensors):
        values = waiting.result()
        if index + 1 < len(tensors):
            waiting = reader.submit(_read, tensors[index + 1])
        yield tensor, values


def _read(tensor: FileTensor) -> torch.Tensor:
    with torch.no_grad():
        return tensor.read().detach()


def _put(files: Sequence[FileWriter], name: str, data: Sequence[np.ndarray]) -> int:
    for file, part in zip(files, data):
        file.write(name, part)
    return sum(padded(part.nbytes) for part in data)


@frozen(eq=False)
class _Encoder:
    """How values become bytes: on which device, with what importance of columns, by compiled code or not."""

    device: torch.device
    importance: Mapping[str, torch.Tensor]
    compiled: bool

    def encoded(self, tensor: FileTensor, values: torch.Tensor, kinds: Sequence[str]) -> Mapping[str, np.ndarray]:
        """Return the tensor's bytes in each of `kinds`; `values` are fp32 of any device."""
        rows = values.to(self.device).reshape(-1, values.shape[-1])
        made = {}
        for kind in kinds:
            try:
                data = _cast(rows, _FLOATS[kind]) if kind in _FLOATS else None
                if data is None:
                    data = quantize(rows, kind, self.importance.get(tensor.name), compiled=self.compiled)
            except UsageError as error:
                raise UsageError(f"{tensor.weight} ({tensor.name} as {kind}): {error}") from error
            made[kind] = data.cpu().numpy()
        return made


def _worth_compiling(writers: Sequence[FileWriter]) -> bool:
    """Say whether compiled searches save more time than compiling takes."""
    weights = sum(
        prod(entry.shape) for writer in writers for entry in writer.tensors if entry.type not in (*_FLOATS, "q8_0")
    )
    return weights > _COMPILE_FROM


def _cast(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """Return the bytes of `rows` in a float format, None where a number is not finite there (the quantiser tells)."""
    data = rows.contiguous().to(dtype)
    low, high = data.aminmax()
    return data.view(torch.uint8) if bool(low.isfinite() & high.isfinite()) else None
