"""Which run a checkpoint is of, and what a run that goes on from it has changed: told by the record it carries.

`runs` in a record are the runs that led to it, each with its id and the step it began at. A checkpoint without a
record, of an earlier version of fastft or of another trainer, has none.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from fastft.train import checkpoint

RECORD = "run.json"
# Fields of a config that leave the curve as it is, by the start of their names, and those that say how far it goes.
ASIDE = (
    "output_dir", "run_name", "log", "save", "eval", "per_device_eval", "report", "push", "hub", "project", "trackio",
    "resume", "restore", "disable_tqdm", "do_", "dataloader", "include", "load_best", "metric_for", "greater",
    "early_stopping", "keep_completions", "max_steps", "num_train_epochs",
)  # fmt: skip
# The same of what fields hold that are tables (`accelerator_config`).
PARTS_ASIDE = ("non_blocking",)
# Fields that the optimizer of a checkpoint brings with it, and that are not used when a run goes on from it.
HELD = ("learning_rate", "weight_decay", "adam_", "embedding_learning_rate", "loraplus_ratio")
# Fields that say how the learning rate changes from step to step.
SCHEDULE = ("lr_scheduler", "warmup")
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
        there = {**(earlier.get(part) or {}), **((earlier.get("held") or {}) if part == "config" else {})}
        here = json.loads(checkpoint.to_json(now.get(part) or {}))
        for name in there.keys() & here.keys() if names is None else names:
            aside = names is None and (name.startswith(ASIDE) or name in told)
            if not aside and _of_the_curve(there.get(name)) != _of_the_curve(here.get(name)):
                found[name if names is None else f"model {name}"] = (there.get(name), here.get(name))
    return dict(sorted(found.items()))


def _of_the_curve(value: Any) -> Any:
    """Return a setting without what in it leaves the curve as it is."""
    return {name: part for name, part in value.items() if name not in PARTS_ASIDE} if isinstance(value, dict) else value


def held(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a checkpoint with the record `earlier` that go on instead of those of the run `now`."""
    return {name: there for name, (there, _) in changes(earlier, now).items() if name.startswith(HELD)}


def lines(begun: Path, now: Mapping[str, Any], steps: int, told: Collection[str] = ()) -> list[str]:
    """Return what to say of a run with the record `now` that goes on from the checkpoint `begun`, a sentence each.

    `steps`: how many the run takes in all, those of the checkpoint among them.
    """
    earlier, step = record_of(begun), step_of(begun) + 1
    said = [f"goes on from {begun}, at step {step} of {steps}."] if step <= steps else []
    if earlier and (earlier.get("data") or {}).get("sha256") != now["data"]["sha256"]:
        said.append(f"the data are not those that {begun} was made with; the curve goes on with them.")
    other = changes(earlier, now, told)
    stay = {name: other.pop(name) for name in list(other) if name.startswith(HELD)}
    if other:
        listed = ", ".join(f"{name} is {here!r} (there {there!r})" for name, (there, here) in other.items())
        said.append(f"other settings than in {begun}: {listed}.")
    before = _state_number(begun, "max_steps")
    longer = before is not None and before != steps
    if longer:
        said.append(f"the run of {begun} was to take {before} steps, this one takes {steps}.")
    rate = stay.pop("learning_rate", None)
    said += [
        f"{name}={here!r} is not used: the {there!r} of {begun} goes on, with its optimizer."
        for name, (there, here) in stay.items()
    ]
    config = {**(now.get("config") or {}), **(now.get("held") or {})}
    moved = any(name.startswith(SCHEDULE) for name in other) or (longer and _has_length(config))
    if rate is None and not moved:
        return said
    if rate is None:
        line = f"learning_rate={config.get('learning_rate')!r} goes on"
    else:
        line = f"learning_rate={rate[1]!r} is not used: the {rate[0]!r} of {begun} goes on"
    line += f", by schedule {config.get('lr_scheduler_type')!r}{f' over {steps} steps' if _has_length(config) else ''}"
    return [*said, f"{line}.{_first_step(begun) if moved else ''}"]


def _has_length(config: Mapping[str, Any]) -> bool:
    """Say whether the schedule of a config depends on how many steps a run takes."""
    share = 0 < (config.get("warmup_steps") or 0) < 1  # of all steps
    return share or config.get("lr_scheduler_type") not in WITHOUT_LENGTH


def _first_step(begun: Path) -> str:
    """Return what to say of the first new step's rate: the optimizer's state brings it, before a schedule is asked."""
    step, rate = step_of(begun) + 1, _rate_of(begun)
    if rate == 0:
        return f" Step {step} still has the rate that {begun} had come to, 0, and learns nothing."
    told = "" if rate is None else f", {rate:.4g}"
    return f" Step {step} still has the rate that {begun} had come to{told}."


def _rate_of(folder: Path) -> float | None:
    """Return the learning rate of the step that comes next after a checkpoint, None where it does not say it."""
    try:
        return float(torch.load(folder / "scheduler.pt", map_location="cpu", weights_only=True)["_last_lr"][0])
    except Exception:  # torch's reader fails in many ways; whether the file is whole was asked before
        return None
