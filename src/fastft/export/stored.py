"""The tensors of a checkpoint on disk, read one at a time."""

from collections.abc import Mapping
from pathlib import Path

import torch
from attrs import frozen

from fastft.errors import LoadError
from fastft.model import files

# What safetensors calls the dtypes of weights.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@frozen
class StoredTensor:
    """One tensor in a safetensors file; `read()` reads it as it is stored, onto a device."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the tensor in the dtype it is stored in. Raises `LoadError` if the file cannot be read any more."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, framework="pt", device=str(device)) as shard:
                return shard.get_tensor(self.name)
        except (SafetensorError, OSError) as error:
            raise LoadError(f"{self.path}: {self.name} cannot be read ({error})") from error


def stored_tensors(folder: Path) -> Mapping[str, StoredTensor]:
    """Return the tensors of a checkpoint's safetensors files by name; headers only are read.

    Empty if the folder has none (a pickled checkpoint, say). Raises `LoadError` for damaged or missing files.
    """
    problems = files.weight_problems(folder)
    if problems:
        raise LoadError(*(f"{folder}: {problem}" for problem in problems))
    if (folder / files.INDEX).is_file():
        shards = sorted(set(files.read_json(folder / files.INDEX)["weight_map"].values()))
    else:
        shards = [files.WEIGHTS] if (folder / files.WEIGHTS).is_file() else []
    found: dict[str, StoredTensor] = {}
    for shard in shards:
        found |= _of_file(folder / shard)
    return found


def _of_file(path: Path) -> dict[str, StoredTensor]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as shard:
        slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118, it is no dict
        unknown = {name: part.get_dtype() for name, part in slices.items() if part.get_dtype() not in DTYPES}
        if unknown:
            name, dtype = next(iter(unknown.items()))
            raise LoadError(f"{path}: {name} is stored as {dtype}, which is not known here")
        return {
            name: StoredTensor(path, name, tuple(part.get_shape()), DTYPES[part.get_dtype()])
            for name, part in slices.items()
        }
