"""Which run a checkpoint is of, and what a run that goes on from it has changed: told by the record it carries.

`runs` in a record are the runs that led to it, each with its id and the step it began at. A checkpoint without a
record, of an earlier version of fastft or of another trainer, has none.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from fastft.train import checkpoint

RECORD = "run.json"
# Fields of a config that leave the curve as it is, by the start of their names, and those that say how far it goes.
ASIDE = (
    "output_dir", "run_name", "log", "save", "eval", "per_device_eval", "report", "push", "hub", "project", "trackio",
    "resume", "restore", "disable_tqdm", "do_", "dataloader", "include", "load_best", "metric_for", "greater",
    "early_stopping", "keep_completions", "max_steps", "num_train_epochs",
)  # fmt: skip
# Fields that the optimizer of a checkpoint brings with it.
HELD = ("learning_rate", "weight_decay", "adam_", "embedding_learning_rate", "loraplus_ratio")
# Schedules that are the same whatever number of steps a run takes.
WITHOUT_LENGTH = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau")


def record_of(folder: Path) -> dict[str, Any]:
    """Return the run.json in a folder, an empty record where there is none that can be read."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def runs_of(folder: Path) -> list[dict[str, Any]]:
    """Return the runs that led to what is in a folder, none where that is not known."""
    return record_of(folder).get("runs") or []


def runs_from(earlier: Sequence[Mapping[str, Any]], step: int) -> list[dict[str, Any]]:
    """Return the runs of one that begins now, at `step` of the last of the `earlier` ones."""
    return [*map(dict, earlier), {"id": uuid4().hex[:12], "from_step": step}]


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint: its state's, else that in its name."""
    step = _state_number(folder, "global_step")
    return int(folder.name.rpartition("-")[2]) if step is None else step


def _state_number(folder: Path, name: str) -> int | None:
    """Return a number of a checkpoint's state, None where that cannot be read."""
    try:
        return int(json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))[name])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def leads_to(folder: Path, runs: Sequence[Mapping[str, Any]]) -> bool:
    """Say whether a checkpoint lies on the way to the last of `runs`, and not on one that was left before it."""
    own = runs_of(folder)
    if own != list(runs[: len(own)]):
        return False
    return len(own) == len(runs) or step_of(folder) <= runs[len(own)]["from_step"]


def runs_in(folder: Path) -> list[dict[str, Any]]:
    """Return the runs that the work in a folder is of: where no run.json says it, those of the highest step."""
    found = checkpoint.checkpoints(folder)
    return runs_of(folder) or (runs_of(found[-1]) if found else [])


def own_and_others(folder: str | Path) -> tuple[list[Path], list[Path]]:
    """Return the checkpoints in `folder` of the run that its run.json is of, and those of others, oldest step first.

    Where no run.json says it, the run is that of the highest step.
    """
    found, runs = checkpoint.checkpoints(folder), runs_in(Path(folder))
    own = [path for path in found if leads_to(path, runs)]
    return own, [path for path in found if path not in own]


def changes(earlier: Mapping[str, Any], now: Mapping[str, Any], told: Collection[str] = ()) -> dict[str, Any]:
    """Return what of model and settings is not as it was, as name -> (there, now).

    Both are records; only what both say is compared. `told`: settings that are told elsewhere.
    """
    found = {}
    for part, names in (("model", ("name", "quant", "dtype", "lora")), ("config", None)):
        there, here = earlier.get(part) or {}, json.loads(checkpoint.to_json(now.get(part) or {}))
        for name in there.keys() & here.keys() if names is None else names:
            aside = names is None and (name.startswith(ASIDE) or name in told)
            if not aside and there.get(name) != here.get(name):
                found[name if names is None else f"model {name}"] = (there.get(name), here.get(name))
    return dict(sorted(found.items()))


def lines(begun: Path, now: Mapping[str, Any], steps: int, told: Collection[str] = ()) -> list[str]:
    """Return what to say of a run with the record `now` that goes on from the checkpoint `begun`, a sentence each.

    `steps`: how many the run takes in all, those of the checkpoint among them.
    """
    earlier, said = record_of(begun), []
    if earlier and (earlier.get("data") or {}).get("sha256") != now["data"]["sha256"]:
        said.append(f"the data are not those that {begun} was made with; the curve goes on with them.")
    other = changes(earlier, now, told)
    if other:
        listed = ", ".join(f"{name} is {here!r} (there {there!r})" for name, (there, here) in other.items())
        held = [name for name in other if name.startswith(HELD)]
        stay = f"; its optimizer brings {', '.join(held)} with it" if held else ""
        said.append(f"other settings than in {begun}: {listed}{stay}.")
    return [*said, *_other_length(begun, now, steps)]


def _other_length(begun: Path, now: Mapping[str, Any], steps: int) -> list[str]:
    """Return what to say where the checkpoint's run was to take another number of steps than this one."""
    there = _state_number(begun, "max_steps")
    if there is None or there == steps:
        return []
    config = now.get("config") or {}
    kind, warmup = config.get("lr_scheduler_type"), config.get("warmup_steps") or 0
    line = f"the run of {begun} was to take {there} steps, this one takes {steps}"
    if kind in WITHOUT_LENGTH and not 0 < warmup < 1:  # a share of all steps
        return [f"{line}."]
    # transformers makes the schedule anew; the optimizer's state brings the rate of the step that comes next
    rate = f"the learning rate is that of schedule {kind!r} over {steps} steps from the second step on"
    return [f"{line}; {rate}, in the first that of the checkpoint."]
