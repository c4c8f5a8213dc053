"""Is a checkpoint whole, and is it one of this model? Asked before anything of it is loaded."""

import json
import zipfile
from pathlib import Path
from typing import Any

from fastft.errors import Problem, UsageError
from fastft.model import files
from fastft.train import checkpoint

# What beside the weights is needed to go on with the same curve; torch writes each as a zip archive.
STATES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


def check(resume: Any, args: Any, model: Any) -> None:
    """Raise `UsageError` with all that keeps `resume` (as for `Trainer.train`) from being gone on with.

    `resume` is a checkpoint's folder, True for the newest in the output folder, or None for what `args` say. Missing or
    damaged files, an adapter of another shape, and a checkpoint that has reached `max_steps` are told together, with
    the newest whole checkpoint. Checkpoints of several processes have other files and are not looked into.
    """
    resume = args.resume_from_checkpoint if resume is None else resume
    if not resume:
        earlier = checkpoint.checkpoints(args.output_dir)
        if earlier:
            print(f"fastft: {earlier[-1]} is of an earlier run, and stays; resume=True would go on from there.")
        return
    if args.world_size > 1:
        return
    folder = Path(checkpoint.to_resume(resume, Path(args.output_dir)))
    problems: list[Problem | str] = [f"{folder}: {problem}" for problem in damages(folder)]
    if problems:
        others = [path for path in checkpoint.checkpoints(folder.parent) if path.resolve() != folder.resolve()]
        whole = next((path for path in reversed(others) if not damages(path)), None)
        remedy = f"resume={str(whole)!r} goes on from the newest whole one" if whole else "there is no other whole one"
        raise UsageError(*problems, f"{folder} cannot be resumed: {remedy}, or start anew with resume=False")
    problems = list(_foreign(folder, model))
    done = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8")).get("global_step", 0)
    if 0 < args.max_steps <= done:
        remedy = "Nothing is left to train: ask for more steps, or start anew with resume=False."
        problems.append(Problem("max_steps", args.max_steps, f"more than the {done} steps that {folder} has", remedy))
    if problems:
        raise UsageError(*problems)


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
    for name in STATES:
        if not (folder / name).is_file():
            problems.append(f"{name} is missing; without it the run would not go on as it was")
        elif not zipfile.is_zipfile(folder / name):
            problems.append(f"{name} is damaged ({(folder / name).stat().st_size:,} bytes on disk)")
    return problems


def _foreign(folder: Path, model: Any) -> list[Problem]:
    """Return where the weights of a whole checkpoint are not those of `model`."""
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
    name, nothing = wrong[0], "no such tensor"
    remedy = f"{len(wrong)} tensors of the adapter differ: the checkpoint is of another run; start with resume=False."
    return [Problem(f"{path} {name}", shapes.get(name, nothing), f"{own.get(name, nothing)}", remedy)]
