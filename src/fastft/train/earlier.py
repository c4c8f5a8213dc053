"""What an earlier run has left in the folder of a new one, kept in a folder of its own there before the new one begins.

Kept is what a run writes, by name; whatever else lies in the folder stays where it is.
"""

import os
import re
from pathlib import Path
from typing import Any

from fastft.errors import Problem, SaveError
from fastft.model import files
from fastft.state import get_state
from fastft.train import checkpoint, lineage

# Within the run's folder: a folder beside it may be on another disk. transformers pushes nothing that begins with _.
KEPT = re.compile(r"^_earlier-(\d+)$")
WEIGHTS = ("adapter_model*", "model*.safetensors", files.INDEX, "pytorch_model*.bin", "pytorch_model.bin.index.json")
OTHERS = (
    lineage.RECORD, "metrics.jsonl", "completions.jsonl", "loss.png", "reward.png", "README.md", "training_args.bin",
    files.ADAPTER_CONFIG, "config.json", "generation_config.json", files.TOKENIZER_CONFIG, *files.TOKENIZER_FILES,
    "special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja", "additional_chat_templates",
)  # fmt: skip


def problems(folder: Path, model: Any) -> list[Problem]:
    """Return why an earlier run cannot be put aside: its weights are the base of the adapter that is to be trained."""
    source = get_state(model).source
    if not _work(folder) or source is None or not hasattr(model, "peft_config"):
        return []
    if not (folder / "config.json").is_file() or Path(source).expanduser().resolve() != folder.resolve():
        return []
    return [Problem("output_dir", str(folder), "another folder than that of the base model, which the adapter needs")]


def put_aside(folder: Path) -> str | None:
    """Move what an earlier run left in `folder` into a folder of its own; return what to say, None if there is none.

    Raises `SaveError`.
    """
    if not _work(folder):
        record = folder / lineage.RECORD
        return f"{record} is of an earlier run that left no weights; it is replaced." if record.is_file() else None
    record, (own, others) = lineage.record_of(folder), lineage.own_and_others(folder)
    place = folder / f"_earlier-{max((_number(path) for path in kept(folder)), default=0) + 1}"
    parts = [*(path for name in (*WEIGHTS, *OTHERS) for path in folder.glob(name)), *checkpoint.checkpoints(folder)]
    size = sum(path.stat().st_size for part in parts for path in (part, *part.rglob("*")) if path.is_file())
    try:
        place.mkdir()
        for part in parts:
            os.rename(part, place / part.name)
    except OSError as error:
        raise SaveError(checkpoint.describe(place, error)) from error
    told = f"{record.get('status', 'of an unknown end')}, {record.get('steps', 'unknown')} steps"
    newest = (own or others)[-1:]
    more = f"; resume={str(place / newest[0].name)!r} goes on from it" if newest else ""
    return f"{folder} holds an earlier run ({told}): it is kept in {place} ({size / 1e6:,.1f} MB){more}."


def kept(folder: Path) -> list[Path]:
    """Return the folders in `folder` of the runs that were put aside, the earliest first."""
    found = [path for path in folder.iterdir() if KEPT.match(path.name)] if folder.is_dir() else []
    return sorted(found, key=_number)


def last_checkpoint(folder: Path) -> Path | None:
    """Return the last checkpoint of the run that was put aside last, None where there is none."""
    found = [checkpoint.checkpoints(path)[-1:] for path in kept(folder)]
    return next((path for (path,) in reversed([one for one in found if one])), None)


def _number(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _work(folder: Path) -> bool:
    """Say whether a run has left checkpoints in a folder, or weights with its record."""
    recorded = (folder / lineage.RECORD).is_file() and any(any(folder.glob(name)) for name in WEIGHTS)
    return recorded or bool(checkpoint.checkpoints(folder))
