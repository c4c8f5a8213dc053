"""The GGUF file format, version 3: sizes known before anything is written, data streamed, files whole or absent.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, counts; keys with typed values;
for each tensor its name, shape (fastest dimension first), type and offset; then the data, each tensor at a multiple of
32 bytes. All numbers are little-endian.
"""

import os
import re
import shutil
import struct
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
from attrs import frozen

from fastft.errors import LoadError, SaveError

ALIGNMENT = 32
_MAGIC, _VERSION = b"GGUF", 3
_KINDS = {"u32": (4, "<u4"), "i32": (5, "<i4"), "f32": (6, "<f4"), "bool": (7, "<u1"), "u64": (10, "<u8")}
_STRING, _ARRAY = 8, 9


@frozen
class Value:
    """One value of a key: a number, truth value or text, or a list of them."""

    kind: Literal["u32", "i32", "f32", "bool", "u64", "str"]
    value: Any

    def packed(self) -> bytes:
        """Return the type and the value as the file holds them."""
        number = _STRING if self.kind == "str" else _KINDS[self.kind][0]
        if isinstance(self.value, (list, tuple)):
            head = struct.pack("<IIQ", _ARRAY, number, len(self.value))
            return head + _packed_items(self.kind, self.value)
        return struct.pack("<I", number) + _packed_items(self.kind, [self.value])


@frozen
class TensorEntry:
    """One tensor of a file: `shape` as torch has it (rows first), `type` as ggml names it, `size` in bytes."""

    name: str
    shape: tuple[int, ...]
    type: str
    size: int


def u32(value: int) -> Value:
    """Return an unsigned number."""
    return Value("u32", int(value))


def f32(value: float) -> Value:
    """Return a floating-point number, rounded to 32 bits."""
    return Value("f32", float(value))


def text(value: str) -> Value:
    """Return a string."""
    return Value("str", value)


def truth(value: bool) -> Value:
    """Return true or false."""
    return Value("bool", bool(value))


def _packed_items(kind: str, items: Iterable[Any]) -> bytes:
    if kind == "str":
        # A byte string stands for text that is no UTF-8, as some vocabularies hold.
        encoded = (item if isinstance(item, bytes) else item.encode("utf-8") for item in items)
        return b"".join(struct.pack("<Q", len(data)) + data for data in encoded)
    return np.asarray(list(items), dtype=_KINDS[kind][1]).tobytes()


def _string(value: str) -> bytes:
    return _packed_items("str", [value])


def type_size(name: str) -> tuple[int, int, int]:
    """Return ggml's number of a tensor type, the values in a block and the bytes of a block."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    number = GGMLQuantizationType[name.upper()]
    return int(number), *GGML_QUANT_SIZES[number]


def tensor_entry(name: str, shape: tuple[int, ...], type_name: str) -> TensorEntry:
    """Return the entry of a tensor whose last dimension is divisible by the type's block."""
    _, block, size = type_size(type_name)
    return TensorEntry(name, shape, type_name, prod(shape) // block * size)


def padded(size: int) -> int:
    """Return `size` rounded up to the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def header(metadata: Mapping[str, Value], tensors: Iterable[TensorEntry]) -> bytes:
    """Return all that stands before the first tensor's data, padded."""
    tensors = list(tensors)
    parts = [_MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))]
    parts += [_string(key) + value.packed() for key, value in metadata.items()]
    offset = 0
    for entry in tensors:
        dimensions = entry.shape[::-1]
        number = type_size(entry.type)[0]
        parts += [_string(entry.name), struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)]
        parts.append(struct.pack("<IQ", number, offset))
        offset += padded(entry.size)
    data = b"".join(parts)
    return data.ljust(padded(len(data)), b"\0")


class FileWriter:
    """Writes one file under a temporary name, and gives it its own name once it is whole.

    Use it in a `with` statement, call `write` once for each tensor in the order given, then `finish`. Leaving the
    statement before that removes what was written; a killed process leaves `.<name>.<pid>.partial` behind, which the
    next writer of that name removes. Raises SaveError that names the file when the disk is full or cannot be written.
    """

    def __init__(self, path: Path, metadata: Mapping[str, Value], tensors: Iterable[TensorEntry]) -> None:
        self.path = path
        self.tensors = tuple(tensors)
        self._header = header(metadata, self.tensors)
        self.size = len(self._header) + sum(padded(entry.size) for entry in self.tensors)
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
        self._written = 0
        self._file: Any = None

    def __enter__(self) -> "FileWriter":
        clear_leftovers(self.path)
        try:
            self._file = open(self._temporary, "wb", buffering=0)
        except OSError as error:
            raise self._failure(error) from error
        self._put(self._header)
        return self

    def write(self, name: str, data: np.ndarray) -> None:
        """Append the bytes of the next tensor, which must be `name`; `data` is contiguous."""
        entry = self.tensors[self._written]
        if entry.name != name or entry.size != data.nbytes:
            raise ValueError(f"{self.path}: next is {entry.name} with {entry.size} bytes, not {name}, {data.nbytes}")
        self._put(memoryview(data.reshape(-1)).cast("B") if data.nbytes else b"")
        self._put(bytes(padded(entry.size) - entry.size))
        self._written += 1

    def finish(self) -> Path:
        """Make the file durable and give it its name."""
        if self._written != len(self.tensors):
            raise ValueError(f"{self.path}: {self._written} of {len(self.tensors)} tensors were written")
        try:
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self.path)
            _sync_folder(self.path.parent)
        except OSError as error:
            raise self._failure(error) from error
        return self.path

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _put(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            self._file.close()
            self._temporary.unlink(missing_ok=True)
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> SaveError:
        return SaveError(
            f"{self.path}: could not be written ({error.strerror or error}); the file needs {self.size:,} bytes. "
            "Nothing was left under this name that was not there before"
        )


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clear_leftovers(path: Path) -> None:
    """Remove what a killed process left of an earlier try at `path`; a living process keeps its own."""
    for old in path.parent.glob(f".{path.name}.*.partial"):
        found = re.search(r"\.(\d+)\.partial$", old.name)
        if found and not _alive(int(found[1])):
            old.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def check_space(folder: Path, size: int, what: str) -> None:
    """Raise SaveError when `folder`'s disk has less than `size` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise SaveError(
            f"{folder}: {what} needs {size:,} bytes and {free:,} are free; free some space, or choose another folder "
            "or a smaller quant. Nothing was written"
        )


@frozen
class GgufFile:
    """What a file holds: `metadata` as plain values, `tensors` by name, and where each tensor's data starts."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorEntry]
    offsets: dict[str, int]

    def data(self, name: str) -> np.ndarray:
        """Return the bytes of one tensor, read now."""
        entry = self.tensors[name]
        return np.fromfile(self.path, dtype=np.uint8, count=entry.size, offset=self.offsets[name])


def read_gguf(path: str | Path) -> GgufFile:
    """Read a file's keys and its list of tensors, not their data.

    Raises LoadError for a file that is missing, no GGUF file, damaged or cut short.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            return _Reader(path, file, size).read()
    except OSError as error:
        raise LoadError(f"{path}: cannot be read ({error.strerror or error})") from error


class _Reader:
    def __init__(self, path: Path, file: Any, size: int) -> None:
        self.path, self.file, self.size = path, file, size

    def read(self) -> GgufFile:
        if self._bytes(4) != _MAGIC:
            raise LoadError(f"{self.path}: not a GGUF file (it does not begin with GGUF)")
        version = self._number("<u4")
        if version not in (2, 3):
            raise LoadError(f"{self.path}: GGUF version {version}; versions 2 and 3 are read")
        count, keys = self._number("<u8"), self._number("<u8")
        metadata = {}
        for _ in range(keys):
            key = self._text()
            metadata[key] = self._value(self._number("<u4"))
        entries = [self._entry() for _ in range(count)]
        alignment = metadata.get("general.alignment", ALIGNMENT)
        start = -(-self.file.tell() // alignment) * alignment
        tensors, offsets = {}, {}
        for entry, offset in entries:
            tensors[entry.name], offsets[entry.name] = entry, start + offset
            if start + offset + entry.size > self.size:
                raise self._cut(f"tensor {entry.name} ends at byte {start + offset + entry.size:,}")
        return GgufFile(self.path, metadata, tensors, offsets)

    def _cut(self, why: str) -> LoadError:
        return LoadError(
            f"{self.path}: cut short or damaged: {why}, the file has {self.size:,}; export or fetch it again"
        )

    def _bytes(self, count: int) -> bytes:
        data = self.file.read(count) if count <= self.size else b""
        if len(data) != count:
            raise self._cut(f"{count:,} bytes were expected at byte {self.file.tell() - len(data):,}")
        return data

    def _number(self, kind: str) -> int:
        return int(np.frombuffer(self._bytes(int(kind[-1])), dtype=kind)[0])

    def _text(self) -> str:
        return self._bytes(self._number("<u8")).decode("utf-8", "surrogateescape")

    def _value(self, number: int) -> Any:
        if number == _STRING:
            return self._text()
        if number == _ARRAY:
            inner, count = self._number("<u4"), self._number("<u8")
            if inner in (_STRING, _ARRAY):
                return [self._value(inner) for _ in range(count)]
            kind = self._numeric(inner)
            return np.frombuffer(self._bytes(count * int(kind[-1])), dtype=kind).tolist()
        kind = self._numeric(number)
        value = np.frombuffer(self._bytes(int(kind[-1])), dtype=kind)[0].item()
        return bool(value) if number == 7 else value

    def _numeric(self, number: int) -> str:
        kinds = ("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "<u1", "", "", "<u8", "<i8", "<f8")
        if number >= len(kinds) or not kinds[number]:
            raise self._cut(f"value type {number} at byte {self.file.tell():,} does not exist")
        return kinds[number]

    def _entry(self) -> tuple[TensorEntry, int]:
        from gguf import GGMLQuantizationType

        name, dimensions = self._text(), self._number("<u4")
        if dimensions > 4:
            raise self._cut(f"tensor {name} has {dimensions} dimensions")
        shape = tuple(self._number("<u8") for _ in range(dimensions))[::-1]
        number = self._number("<u4")
        known = {int(kind): kind.name.lower() for kind in GGMLQuantizationType}
        if number not in known:
            raise self._cut(f"tensor {name} has type {number}, which does not exist")
        return tensor_entry(name, shape, known[number]), self._number("<u8")
