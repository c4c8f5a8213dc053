"""Folders and files that are written whole or not at all, and what to say when the disk is full."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastft.errors import SaveError
from fastft.model.files import checkpoints as checkpoints

# What torch's own file writer says when the system refuses a write; it raises RuntimeError, not OSError.
WRITE_FAILED = re.compile(
    r"PytorchStreamWriter|unexpected pos|iostream|No space left|os error|I/O error|File too large", re.I
)

_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_IN_THE_WAY = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises `SaveError`."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON (NaN and infinities as strings, unknown objects as text) whole or not at all. Raises `SaveError`."""
    write_text(path, to_json(value) + "\n")


def to_json(value: Any) -> str:
    """Return JSON of anything: NaN and infinities as strings, unknown objects as text."""
    return json.dumps(plain(value), indent=2, default=str)


def plain(value: Any) -> Any:
    """Return `value` with numbers that JSON does not have ("nan", "inf") as strings."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place. Raises `SaveError`."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise SaveError(describe(path, error)) from error


@contextmanager
def staged(target: Path, untouched: str) -> Iterator[Path]:
    """Give an empty folder beside `target`; when the block ends well, nothing is moved: the caller does that.

    When writing fails inside the block, the folder is removed and a `SaveError` names `target`, the cause and
    `untouched` (what is still whole).
    """
    folder = staging_folder(target)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yield folder
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if not is_write_error(error):
            raise
        raise SaveError(f"{describe(target, error)} {untouched}") from error


def make_folder(folder: Path) -> None:
    """Make the folder of a run if it is not there. Raises `SaveError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(describe(folder, error)) from error


def staging_folder(target: Path) -> Path:
    """Return the folder beside `target` in which it is written before it is put in place."""
    return target.with_name(f".{target.name}.partial")


def put_in_place(folder: Path, target: Path) -> None:
    """Rename a whole folder to `target`; an older one there is moved aside first and removed last."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(folder, target)
    shutil.rmtree(old, ignore_errors=True)


def move_files(folder: Path, target: Path) -> None:
    """Move the files of a whole folder into `target`, each replacing its namesake at once."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.rglob("*")):
        place = target / path.relative_to(folder)
        if path.is_dir():
            place.mkdir(exist_ok=True)
        else:
            os.replace(path, place)
    shutil.rmtree(folder, ignore_errors=True)


def rotate(folder: str | Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints until `limit` are left, never the newest and never `best`.

    Oldest is what was written first: checkpoints of a way that was left may have higher numbers.
    """
    if not limit or limit <= 0:
        return
    present = sorted(checkpoints(folder), key=lambda path: path.stat().st_mtime_ns)
    kept = {present[-1]} if present else set()
    if best is not None:
        kept |= {path for path in present if path.resolve() == Path(best).resolve()}
    removable = [path for path in present if path not in kept]
    for path in removable[: max(0, len(present) - max(limit, len(kept)))]:
        shutil.rmtree(path)


def is_write_error(error: BaseException) -> bool:
    """Say whether `error` means that the system refused to write."""
    if isinstance(error, OSError):
        return not isinstance(error, SaveError)
    named = type(error).__name__ == "SafetensorError" or isinstance(error, RuntimeError)
    return named and WRITE_FAILED.search(str(error)) is not None


def describe(target: Path, error: BaseException) -> str:
    """Say what could not be written, why, and what to do: about room, about permissions, or about what is in the way.

    Of an error that does not say its reason (torch's and safetensors' own), the folder tells whether it is permission.
    """
    place = next((parent for parent in (target, *target.parents) if parent.exists()), Path("."))
    code = error.errno if isinstance(error, OSError) else None
    cause = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    other = "choose another output_dir"
    if code in _FORBIDDEN or (code is None and not os.access(place, os.W_OK)):
        told = f". It is a matter of permission, not of room: allow this user to write in {place}, or {other}."
    elif code is None or code in _NO_ROOM:
        free = shutil.disk_usage(place).free / 1e9
        told = f" ({free:.2f} GB free on its disk). Free some room or {other}."
    elif code in _IN_THE_WAY:
        told = f". {place} is in the way: move it, or {other}."
    else:
        told = f". {other.capitalize()}."
    return f"{target}: could not be written: {cause}{told}"
