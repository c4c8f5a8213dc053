"""Where an export goes: what may be replaced, whether it fits on the disk, and that it appears whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastft.errors import SaveError, UsageError
from fastft.train import checkpoint

# What the folders that fastft exports hold; a folder with anything else is not replaced.
_OURS = (".safetensors", ".json", ".jinja", ".model", ".txt", ".md", ".gguf", ".bin", ".tiktoken")
_OUR_NAMES = ("Modelfile", ".gitattributes")
_SPARE = 64 * 2**20  # tokenizer, configs, and what a file system wants for itself


@contextmanager
def new_folder(target: Path, size: int, sources: tuple[Path | None, ...] = ()) -> Iterator[Path]:
    """Give an empty folder beside `target`, which takes its place when the block ends well.

    `size` bytes must be free. A folder that is there is replaced only if it looks like an export, and never one of
    `sources`, which are being read. Raises `UsageError` for a wrong target and `SaveError` if it cannot be written;
    then, or if the process is killed, what was there is as it was.
    """
    check_target(target, sources)
    restore(target)
    check_space(target, size)
    with checkpoint.staged(target, "Nothing was written there.") as folder:
        yield folder
        _sync(folder)
    checkpoint.put_in_place(folder, target)


def check_target(target: Path, sources: tuple[Path | None, ...] = ()) -> None:
    """Raise `UsageError` if `target` is a file, a folder of something else, or one that is being read."""
    if any(source is not None and source.resolve() == target.resolve() for source in sources):
        raise UsageError(f"{target}: the weights are read from this folder; choose another one to write to")
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target}: this is a file; give the name of a folder")
    strange = [path.name for path in sorted(target.iterdir()) if not _is_ours(path)] if target.is_dir() else []
    if strange:
        raise UsageError(
            f"{target}: this folder holds more than an export ({', '.join(strange[:3])}{' ...' * (len(strange) > 3)}) "
            "and is not replaced; choose another one, or empty it"
        )


def _is_ours(path: Path) -> bool:
    return path.is_file() and (path.suffix in _OURS or path.name in _OUR_NAMES)


def check_space(target: Path, size: int) -> None:
    """Raise `SaveError` if the disk that `target` is to lie on has not `size` bytes free."""
    place = next(parent for parent in (target.absolute(), *target.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if free < size + _SPARE:
        raise SaveError(
            f"{target}: {(size + _SPARE) / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free on its disk; free "
            "some room or choose another folder. Nothing was written."
        )


def restore(target: Path) -> None:
    """Put back what a process that was killed at the last moment had moved aside."""
    old = target.with_name(f".{target.name}.old")
    if old.is_dir() and not target.exists():
        os.rename(old, target)


def _sync(folder: Path) -> None:
    """Wait until the folder's files are on the disk."""
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
