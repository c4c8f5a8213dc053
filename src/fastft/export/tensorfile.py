"""A safetensors file written one tensor at a time, so that no shard has to be in memory whole.

The format (documentation of safetensors): eight bytes with the header's length, a JSON header of names, dtypes, shapes
and byte ranges (it may end in spaces), then the tensors without gaps. Room for the header is kept free at the start and
filled at the end. Readers want each tensor at a multiple of its element's size: what does not fill whole eight bytes is
kept back and written last.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fastft.export.stored import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = {"format": "pt"}


class TensorFile:
    """Write tensors with `add`, then `close`; the names, dtypes and shapes to come must be known at the start.

    `planned` maps names to (dtype, shape); a dimension that is not known yet is None. Raises OSError as writing does.
    """

    def __init__(self, path: Path, planned: Mapping[str, tuple[torch.dtype, Iterable[int | None]]]) -> None:
        self._planned = planned
        self._ranges: dict[str, dict[str, Any]] = {}
        self._late: dict[str, Tensor] = {}
        self._at = 0
        widest = 10**15
        longest = {
            name: _entry(dtype, [widest if size is None else size for size in shape], widest, widest)
            for name, (dtype, shape) in planned.items()
        }
        self._room = -(-len(json.dumps({"__metadata__": _METADATA, **longest})) // 8) * 8
        self._file: BinaryIO = path.open("wb")
        self._file.seek(8 + self._room)

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor, from any device."""
        if name not in self._planned or name in self._ranges or name in self._late:
            raise KeyError(name)
        tensor = tensor.detach().contiguous()
        if tensor.numel() * tensor.element_size() % 8:
            self._late[name] = tensor.cpu()
        else:
            self._write(name, tensor)

    def _write(self, name: str, tensor: Tensor) -> None:
        data = tensor.cpu().reshape(-1).view(torch.uint8).numpy()
        self._file.write(data)
        self._ranges[name] = _entry(tensor.dtype, list(tensor.shape), self._at, self._at + data.nbytes)
        self._at += data.nbytes

    def close(self) -> None:
        """Write what was kept back and the header, and wait until all is on the disk. Raises KeyError if one lacks."""
        for name, tensor in sorted(self._late.items(), key=lambda item: -item[1].element_size()):
            self._write(name, tensor)
        if set(self._ranges) != set(self._planned):
            raise KeyError(f"not written: {sorted(set(self._planned) - set(self._ranges))}")
        header = json.dumps({"__metadata__": _METADATA, **self._ranges}).encode()
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


def _entry(dtype: torch.dtype, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
