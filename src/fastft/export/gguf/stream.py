"""Tensors through the quantisers into files: one is read and one is written while one is quantised."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from attrs import define, frozen
from tqdm.auto import tqdm

from fastft.errors import SaveError, UsageError
from fastft.export.gguf.file import FileWriter, padded
from fastft.export.gguf.quants import quantize
from fastft.export.gguf.tensors import FileTensor

_COMPILE_FROM = 100_000_000  # weights
# Float formats are casts; torch rounds to the nearest, ties to even, as ggml does.
_FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@frozen
class Phases:
    """Seconds of an export's work on its tensors; reading, quantising, and copying with writing go on side by side.

    `read`: from files or the model, merged, onto the quantisers' device. `quantise`: to every type. `copy`: the bytes
    from that device. `write`: into the files. `finish`: until the disk had all of it. `whole`: by the clock.
    """

    read: float
    quantise: float
    copy: float
    write: float
    finish: float
    whole: float


def stream(
    tensors: Sequence[FileTensor],
    writers: Sequence[FileWriter],
    device: torch.device,
    importance: Mapping[str, torch.Tensor] | None = None,
    progress: bool = True,
) -> Phases:
    """Write `tensors` to every file, each in the type the file asks for, and give the files their names.

    At most three tensors are held: one being read, one being quantised on `device`, and one's bytes being written.
    Raises UsageError that names the tensor for NaN and infinity, and SaveError; then no file is left.
    """
    types = [{entry.name: entry.type for entry in writer.tensors} for writer in writers]
    encoder = _Encoder(device, importance or {}, _worth_compiling(writers))
    total = sum(padded(entry.size) for writer in writers for entry in writer.tensors)
    began = perf_counter()
    read = quantise = 0.0
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # what a model's weights still wait for: another stream reads them
    with ExitStack() as stack:
        files = [stack.enter_context(writer) for writer in writers]
        # the threads are joined before the files are closed
        reader, writing = (stack.enter_context(_thread(device)) for _ in range(2))
        bar = stack.enter_context(
            tqdm(total=total, unit="B", unit_scale=True, desc="GGUF", disable=None if progress else True)
        )
        put = _Putter(files, bar)
        pending: Future[None] | None = None
        for tensor, values, seconds in _ahead(reader, tensors, device):
            read += seconds
            started = perf_counter()
            kinds = [kind[tensor.name] for kind in types]
            made = encoder.encoded(tensor, values, tuple(dict.fromkeys(kinds)))
            quantise += perf_counter() - started
            del values
            if pending is not None:
                pending.result()
            pending = writing.submit(put, tensor.name, kinds, made)
            del made
        if pending is not None:
            pending.result()
        finishing = perf_counter()
        for file in files:
            file.finish()
    ended = perf_counter()
    return Phases(read, quantise, put.copy, put.write, ended - finishing, ended - began)


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


def _thread(device: torch.device) -> ThreadPoolExecutor:
    """Return one thread; on a GPU its copies have a stream of their own and wait for no quantiser."""
    if device.type != "cuda":
        return ThreadPoolExecutor(1)
    return ThreadPoolExecutor(1, initializer=torch.cuda.set_stream, initargs=(torch.cuda.Stream(device),))


def _settle(device: torch.device) -> None:
    """Wait for what this thread has asked of a GPU, so that other threads' streams may use it."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _ahead(
    reader: ThreadPoolExecutor, tensors: Sequence[FileTensor], device: torch.device
) -> Iterator[tuple[FileTensor, torch.Tensor, float]]:
    """Yield each tensor with its values on `device` and the seconds it took, while the next one is being read."""
    waiting = reader.submit(_read, tensors[0], device)
    for index, tensor in enumerate(tensors):
        values, seconds = waiting.result()
        if index + 1 < len(tensors):
            waiting = reader.submit(_read, tensors[index + 1], device)
        yield tensor, values, seconds


def _read(tensor: FileTensor, device: torch.device) -> tuple[torch.Tensor, float]:
    began = perf_counter()
    with torch.no_grad():
        values = tensor.read().detach().to(device)
    _settle(device)
    return values, perf_counter() - began


@define(eq=False)
class _Putter:
    """Appends a tensor's bytes to the files, and counts the seconds it takes; it is called by one thread."""

    files: Sequence[FileWriter]
    bar: Any
    copy: float = 0.0
    write: float = 0.0

    def __call__(self, name: str, kinds: Sequence[str], made: Mapping[str, torch.Tensor]) -> None:
        began = perf_counter()
        data = {kind: part.cpu().numpy() for kind, part in made.items()}
        copied = perf_counter()
        for file, kind in zip(self.files, kinds):
            file.write(name, data[kind])
        self.copy += copied - began
        self.write += perf_counter() - copied
        self.bar.update(sum(padded(data[kind].nbytes) for kind in kinds))


@frozen(eq=False)
class _Encoder:
    """How values become bytes: on which device, with what importance of columns, by compiled code or not."""

    device: torch.device
    importance: Mapping[str, torch.Tensor]
    compiled: bool

    def encoded(self, tensor: FileTensor, values: torch.Tensor, kinds: Sequence[str]) -> Mapping[str, torch.Tensor]:
        """Return the tensor's bytes in each of `kinds`, uint8 on the device; `values` are fp32 there."""
        rows = values.reshape(-1, values.shape[-1])
        made = {}
        for kind in kinds:
            try:
                data = _cast(rows, _FLOATS[kind]) if kind in _FLOATS else None
                if data is None:
                    data = quantize(rows, kind, self.importance.get(tensor.name), compiled=self.compiled)
            except UsageError as error:
                raise UsageError(f"{tensor.weight} ({tensor.name} as {kind}): {error}") from error
            made[kind] = data
        _settle(self.device)
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
