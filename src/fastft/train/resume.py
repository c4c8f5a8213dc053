"""Which checkpoint to go on from; is it whole, and one of this model? Asked before anything of it is loaded."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastft.errors import Problem, UsageError
from fastft.model import files
from fastft.train import earlier, lineage

# What beside the weights is needed to go on with the same curve; torch writes each as a zip archive.
STATES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


def to_resume(resume: bool | str | None, args: Any) -> str | None:
    """Return the checkpoint to go on from, None for a run that begins.

    `resume` is a checkpoint's folder, or True for the highest step of the run that `run.json` in the output folder is
    of: a checkpoint of another run is not gone on with unless it is named. Raises `UsageError`.
    """
    if not resume:
        return None
    if resume is not True:
        if not (Path(resume) / "trainer_state.json").is_file():
            raise UsageError(Problem("resume", resume, "a checkpoint's folder (with trainer_state.json)"))
        return str(resume)
    own, others = lineage.own_and_others(args.output_dir)
    if not own:
        remedy = "There is none; start with resume=False."
        aside = earlier.last_checkpoint(Path(args.output_dir))
        if aside is not None:
            remedy = f"There is none; resume={str(aside)!r} goes on from an earlier run, resume=False starts anew."
        if others:
            remedy = (
                f"{others[-1]} is of another run than {args.output_dir}/{lineage.RECORD}: resume={str(others[-1])!r} "
                "goes on from it, resume=False starts anew."
            )
        raise UsageError(Problem("resume", True, f"a checkpoint of the run in {args.output_dir}", remedy))
    higher = [path for path in others if lineage.step_of(path) > lineage.step_of(own[-1])]
    if higher and args.process_index == 0:
        print(
            f"fastft: {higher[-1]} is of another run than {args.output_dir}/{lineage.RECORD}; resume=True goes on from "
            f"{own[-1].name}, resume={str(higher[-1])!r} would go on from the other."
        )
    return str(own[-1])


def check(resume: Any, args: Any, model: Any, method: str, own: Callable[[Path], list[Problem | str]]) -> Path | None:
    """Return the checkpoint that `resume` (as for `Trainer.train`) goes on from, None for a run that begins.

    Raises `UsageError` with all that keeps it from being gone on with.

    `resume` is as for `to_resume`, or None for what `args` say. Missing or damaged files, another `method`, an adapter
    of another shape, what the trainer's `own` finds in a whole checkpoint, and one that has reached `max_steps` are
    told together, with the last whole checkpoint. Checkpoints of several processes have other files: there only `own`
    looks.
    """
    resume = args.resume_from_checkpoint if resume is None else resume
    if not resume:
        if wrong := earlier.problems(Path(args.output_dir), model):
            raise UsageError(*wrong)
        return None
    folder = Path(to_resume(resume, args))
    aside = earlier.problems(Path(args.output_dir), model, folder)
    if args.world_size > 1:
        wrong = [*own(folder), *aside]
        if wrong:
            raise UsageError(*wrong)
        return folder
    problems: list[Problem | str] = [f"{folder}: {problem}" for problem in damages(folder)]
    if problems:
        others = [path for path in lineage.own_and_others(folder.parent)[0] if path.resolve() != folder.resolve()]
        whole = next((path for path in reversed(others) if not damages(path)), None)
        remedy = f"resume={str(whole)!r} goes on from the newest whole one" if whole else "there is no other whole one"
        raise UsageError(*problems, f"{folder} cannot be resumed: {remedy}, or start anew with resume=False")
    problems = [*_foreign(folder, model, method), *own(folder), *aside]
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    done, epochs = state.get("global_step", 0), state.get("epoch") or 0
    if args.max_steps <= 0 and done and epochs >= args.num_train_epochs:
        remedy = "Nothing is left to train: ask for more epochs, or start anew with resume=False."
        expected = f"more than the {epochs:g} epochs that {folder} has"
        problems.append(Problem(f"{type(args).__name__} num_train_epochs", args.num_train_epochs, expected, remedy))
    if 0 < args.max_steps <= done:
        remedy = "Nothing is left to train: ask for more steps, or start anew with resume=False."
        expected = f"more than the {done} steps that {folder} has"
        problems.append(Problem(f"{type(args).__name__} max_steps", args.max_steps, expected, remedy))
    if problems:
        raise UsageError(*problems)
    return folder


def damages(folder: Path) -> list[str]:
    """Return what is missing or damaged in a checkpoint of one process, a sentence each."""
    problems = files.weight_problems(folder)
    state = folder / "trainer_state.json"
    try:
        json.loads(state.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append("trainer_state.json is missing")
    except (OSError, ValueError) as error:
        problems.append(f"trainer_state.json is damaged ({error})")
    missing = [name for name in STATES if not (folder / name).is_file()]
    problems += [f"{name} is missing; without it the run would not go on as it was" for name in missing]
    for path in sorted([*folder.glob("*.pt"), *folder.glob("*.pth")]):
        if not zipfile.is_zipfile(path):
            problems.append(f"{path.name} is damaged ({path.stat().st_size:,} bytes on disk)")
    return problems


def _foreign(folder: Path, model: Any, method: str) -> list[Problem]:
    """Return where a whole checkpoint is of another method, or its weights are not those of `model`."""
    made = lineage.record_of(folder).get("method", method)
    if made != method:
        remedy = "It belongs to another run; start anew with resume=False."
        return [Problem(f"{folder} method", made, f"{method!r}, which is what is trained with", remedy)]
    kinds = {True: "an adapter", False: "a whole model"}
    adapted, stored = hasattr(model, "peft_config"), files.is_adapter(folder)
    if adapted != stored:
        remedy = "It belongs to another run; start anew with resume=False."
        return [Problem(f"{folder}", kinds[stored], f"{kinds[adapted]}, which is what is trained", remedy)]
    path = folder / files.ADAPTER_WEIGHTS[0]
    if not adapted or not path.is_file() or list(model.peft_config) != ["default"]:
        return []
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(path, framework="pt") as shard:
        shapes = {name: tuple(shard.get_slice(name).get_shape()) for name in shard.keys()}  # noqa: SIM118
    own = {name: tuple(t.shape) for name, t in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    # embeddings that have grown are stored beside the adapter's own tensors
    both = [*own, *(name for name in shapes if name not in own and "lora_" in name)]
    wrong = [name for name in both if shapes.get(name) != own.get(name)]
    if not wrong:
        return []
    if others := _other_settings(folder, model.peft_config["default"]):
        return others
    name, nothing = wrong[0], "no such tensor"
    remedy = f"{len(wrong)} tensors of the adapter differ: the checkpoint is of another run; start with resume=False."
    return [Problem(f"{path} {name}", shapes.get(name, nothing), f"{own.get(name, nothing)}", remedy)]


# What decides which tensors an adapter has, and their shapes: PEFT's name -> that of `add_lora`, and what stands there
# where nothing is asked for.
_SHAPING = {
    "r": ("r", None),
    "target_modules": ("targets", None),
    "layers_to_transform": ("layers", None),
    "modules_to_save": ("modules_to_save", None),
    "trainable_token_indices": ("train_tokens", None),
    "use_dora": ("dora", False),
    "bias": ("bias", "none"),
}


def _other_settings(folder: Path, config: Any) -> list[Problem]:
    """Return which settings of a checkpoint's adapter are others than those of the model's, which are in `config`."""
    stored = files.read_json(folder / files.ADAPTER_CONFIG)
    problems = []
    for theirs, (name, nothing) in _SHAPING.items():
        made, own = _plain(stored.get(theirs)), _plain(getattr(config, theirs, None))
        if made == own:
            continue
        said = nothing if made is None else made
        remedy = f"To go on, put such an adapter on the model: add_lora({name}={said!r}); or start with resume=False."
        problems.append(Problem(f"{folder} adapter, {name}", made, f"{own!r}, as in the model that is trained", remedy))
    return problems


def _plain(setting: Any) -> Any:
    """Return a setting as JSON has it, and what says nothing as None."""
    if isinstance(setting, list | tuple | set | frozenset):  # of modules by their whole paths the names
        setting = sorted({one.rpartition(".")[2] if isinstance(one, str) else one for one in setting}, key=str)
    if isinstance(setting, dict):
        setting = {name: _plain(value) for name, value in sorted(setting.items())}
    return None if setting is False or setting in ([], {}, "none") else setting
