"""What an earlier run has left in the folder of a new one, kept in a folder of its own there before the new one begins.

Kept is what a run writes, by name; whatever else lies in the folder stays where it is.
"""

import contextlib
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from fastft.errors import Problem, SaveError
from fastft.model import files
from fastft.state import base_model, get_state
from fastft.train import checkpoint, lineage

# Within the run's folder: a folder beside it may be on another disk. transformers pushes nothing that begins with _.
KEPT = re.compile(r"^_earlier-(\d+)$")
WEIGHTS = ("adapter_model*", "model*.safetensors", files.INDEX, "pytorch_model*.bin", "pytorch_model.bin.index.json")
OTHERS = (
    lineage.RECORD, "metrics.jsonl", "completions.jsonl", "loss.png", "reward.png", "README.md", "training_args.bin",
    files.ADAPTER_CONFIG, "config.json", "generation_config.json", files.TOKENIZER_CONFIG, *files.TOKENIZER_FILES,
    "special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja", "additional_chat_templates",
)  # fmt: skip


def goes_aside(folder: Path, begun: Path | None) -> bool:
    """Say whether the run in `folder` is another than the one that begins, or goes on from the checkpoint `begun`."""
    return begun is None or not lineage.leads_to(begun, lineage.runs_in(folder))


def problems(folder: Path, model: Any, begun: Path | None = None) -> list[Problem]:
    """Return why an earlier run cannot be put aside: it is the base of the adapter that is to be trained."""
    parts = _parts(folder, begun)
    if not parts or not hasattr(model, "peft_config"):
        return []
    for source in _sources(model):
        place = Path(source).expanduser().resolve()
        whole = place == folder.resolve() and folder / "config.json" in parts
        if whole or any(part.resolve() in (place, *place.parents) for part in parts):
            remedy = f"{source} would be put aside with the run that it is of."
            return [
                Problem("output_dir", str(folder), "another folder than that of the base model of the adapter", remedy)
            ]
    return []


def put_aside(folder: Path, begun: Path | None = None) -> str | None:
    """Move what an earlier run left in `folder` into a folder of its own; return what to say, None if there is none.

    `begun` is as for `goes_aside`. Raises `SaveError`, and has moved nothing then.
    """
    parts = _parts(folder, begun)
    if not parts:
        record = folder / lineage.RECORD
        lost = begun is None and record.is_file()
        return f"{record} is of an earlier run that left no weights; it is replaced." if lost else None
    record, (own, others) = lineage.record_of(folder), lineage.own_and_others(folder)
    place = folder / f"_earlier-{max((_number(path) for path in kept(folder)), default=0) + 1}"
    size = sum(path.stat().st_size for part in parts for path in (part, *part.rglob("*")) if path.is_file())
    _move(parts, place)
    told = f"{record.get('status', 'of an unknown end')}, {record.get('steps', 'unknown')} steps"
    newest = [path for path in (own or others) if path in parts][-1:]
    more = f"; resume={str(place / newest[0].name)!r} goes on from it" if newest else ""
    return f"{folder} holds an earlier run ({told}): it is kept in {place} ({size / 1e6:,.1f} MB){more}."


class PutsAside(TrainerCallback):
    """Keeps another run of the folder from being replaced by the one that begins; hung up before all other callbacks.

    As the run begins, not before: what is wrong with it has been found by then, and an earlier one stays where it is.
    """

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.pending, self.begun = False, None

    def expect(self, begun: Path | None) -> None:
        """Expect a run that begins, or goes on from the checkpoint `begun`."""
        self.pending, self.begun = True, begun

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put it aside once all processes have looked at it; not again where transformers begins again.

        What goes wrong is raised in every process: the others would wait for ever for the one that it went wrong in.
        """
        if not self.pending:
            return
        self.pending = False
        self.accelerator.wait_for_everyone()
        told: list[str | None] = [None, None]  # what to say, and what went wrong
        if state.is_world_process_zero:
            try:
                told[0] = put_aside(Path(args.output_dir), self.begun)
            except OSError as error:
                told[1] = str(error)
        line, wrong = broadcast_object_list(told)
        if wrong is not None:
            raise SaveError(wrong)
        if line is not None and state.is_world_process_zero:
            print(f"fastft: {line}")


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


def _parts(folder: Path, begun: Path | None) -> list[Path]:
    """Return what is to be put aside: all that an earlier run left, but not the checkpoints of the one gone on with."""
    if not goes_aside(folder, begun):
        return []
    found = checkpoint.checkpoints(folder)
    if begun is not None:
        runs, there = lineage.runs_of(begun), begun.resolve()
        found = [path for path in found if path.resolve() != there and not lineage.leads_to(path, runs)]
    weights = [path for name in WEIGHTS for path in folder.glob(name)]
    if not found and not (weights and (folder / lineage.RECORD).is_file()):
        return []
    return [*weights, *(path for name in OTHERS for path in folder.glob(name)), *found]


def _sources(model: Any) -> list[str]:
    """Return where the base of an adapted model was loaded from, as far as it is known."""
    adapters = [config.base_model_name_or_path for config in model.peft_config.values()]
    named = (get_state(model).source, getattr(base_model(model).config, "_name_or_path", None), *adapters)
    return [name for name in dict.fromkeys(named) if name]


def _move(parts: Sequence[Path], place: Path) -> None:
    """Move `parts` into the new folder `place` beside them, all or none. Raises `SaveError`."""
    moved: list[tuple[Path, str | None]] = []
    try:
        place.mkdir()
        for part in parts:
            link = _link(part, {path.name for path in parts})
            moved.append((part, link))
            if link is None:
                os.rename(part, place / part.name)
            else:
                os.symlink(Path(os.pardir, link), place / part.name)
                part.unlink()
    except BaseException as error:
        for part, link in reversed(moved):
            _move_back(place / part.name, part, link)
        with contextlib.suppress(OSError):
            place.rmdir()
        if not isinstance(error, OSError):
            raise
        raise SaveError(checkpoint.describe(place, error)) from error


def _link(part: Path, moved: Collection[str]) -> str | None:
    """Return what a link is to that has to be written anew where it is moved: to a relative place that stays."""
    link = os.readlink(part) if part.is_symlink() else ""
    stays = link and not os.path.isabs(link) and Path(link).parts[:1] not in [(name,) for name in moved]
    return link if stays else None


def _move_back(there: Path, part: Path, link: str | None) -> None:
    """Undo one move, as far as it was made; what cannot be moved back stays where it is."""
    with contextlib.suppress(OSError):
        if link is None:
            if os.path.lexists(there):
                os.rename(there, part)
            return
        if not os.path.lexists(part):
            os.symlink(link, part)
        there.unlink(missing_ok=True)
