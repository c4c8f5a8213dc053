"""Where an export goes: what may be replaced, whether it fits on the disk, and that it appears whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastft.errors import SaveError, UsageError
from fastft.model import files
from fastft.train import checkpoint

RECORD = "export.json"
MARK = "exported with fastft"  # in the model cards that fastft writes
_SPARE = 64 * 2**20  # tokenizer, configs, and what a file system wants for itself


@contextmanager
def new_folder(target: Path, size: int, sources: tuple[Path | None, ...] = ()) -> Iterator[Path]:
    """Give an empty folder beside `target`, which takes its place when the block ends well.

    `size` bytes must be free. A folder that is there is replaced only if it is an export (its export.json names the
    files that were written, with their bytes, and there are no others), and never one of `sources`, which are being
    read. Raises `UsageError` for a wrong target and `SaveError` if it cannot be written; then, or if the process is
    killed, what was there is as it was.
    """
    check_target(target, sources)
    restore(target)
    check_space(target, size)
    with checkpoint.staged(target, "Nothing was written there.") as folder:
        yield folder
        record = files.read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
        contents = {name: _bytes(path) for name, path in sorted(_contents(folder).items()) if name != RECORD}
        checkpoint.write_json(folder / RECORD, {**record, "contents": contents})
        _sync(folder)
    checkpoint.put_in_place(folder, target)


def check_target(target: Path, sources: tuple[Path | None, ...] = ()) -> None:
    """Raise `UsageError` if `target` is a file, a folder of something else, or one that is being read."""
    if any(source is not None and source.resolve() == target.resolve() for source in sources):
        raise UsageError(f"{target}: the weights are read from this folder; choose another one to write to")
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target}: this is a file; give the name of a folder")
    strange = _not_ours(target) if target.is_dir() else []
    if strange:
        raise UsageError(
            f"{target}: this folder holds more than an export, or what has changed since ({', '.join(strange[:3])}"
            f"{' ...' * (len(strange) > 3)}), and is not replaced; choose another one, or empty it"
        )


def _not_ours(target: Path) -> list[str]:
    """Return what lies in a folder beside an export: files that its record does not name or of another size, but for
    GGUF files, their Modelfiles and cards that fastft made.
    """
    record = files.read_json(target / RECORD) if (target / RECORD).is_file() else {}
    written = record.get("contents", {})
    sizes = {RECORD: None, **(written if isinstance(written, dict) else dict.fromkeys(written))}  # once names alone
    others = {
        name: path
        for name, path in sorted(_contents(target).items())
        if name not in sizes or sizes[name] not in (None, _bytes(path))
    }
    return [name for name, path in others.items() if not (record and _is_made_beside(path))]


def _contents(folder: Path) -> dict[str, Path]:
    """Return all files and folders below `folder` by their names in it."""
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}


def _bytes(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _is_made_beside(path: Path) -> bool:
    if path.name == "README.md":
        return MARK in path.read_text("utf-8", errors="replace")
    return path.suffix == ".gguf" or path.name == "Modelfile" or path.name.startswith("Modelfile.")


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
    for path in (path for path in folder.rglob("*") if path.is_file()):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
