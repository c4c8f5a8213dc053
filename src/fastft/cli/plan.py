"""`fastft plan`: what a training step will take on a GPU, from config.json alone, before any weights are there."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastft.cli.output import CheckFailed, JsonOption, checking_arguments, print_fields, print_json, print_table
from fastft.errors import LoadError, Problem, UsageError, did_you_mean

if TYPE_CHECKING:
    from fastft.memory.devices import Device

app = typer.Typer(add_completion=False, rich_markup_mode=None)

GB = 10**9
QUANTS = ("nf4", "int8", "fp8", "none")
# transformers' names of optimizers -> ours for those that hold as much. The paged one with 32 bits is not among them:
# of weights in bf16 it holds twice what adamw_torch does.
OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw_8bit": "adamw_8bit",
}


@app.command()
def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder of a model, an adapter or a run, config.json, or hub id.")
    ],
    gpu: Annotated[str, typer.Option(help="Its memory (24GB, 80GiB) or name (H100, RTX 4090).")],
    length: Annotated[int, typer.Option(help="Tokens in a row.", min=1)] = 4096,
    batch: Annotated[int, typer.Option(help="Rows in a micro-batch.", min=1)] = 1,
    quant: Annotated[str, typer.Option(help="nf4, int8, fp8 or none.")] = "nf4",
    rank: Annotated[int | None, typer.Option(help="LoRA's rank, on all linears; 16 if left out.", min=1)] = None,
    full: Annotated[bool, typer.Option("--full", help="Train every weight; with --quant none.")] = False,
    optimizer: Annotated[
        str, typer.Option(help="adamw or adamw_8bit, or what transformers calls them: adamw_torch, adamw_bnb_8bit ...")
    ] = "adamw",
    compute: Annotated[str, typer.Option(help="exact, fp8 or fp8+head, as fastft.compile takes it.")] = "exact",
    plan: Annotated[
        str,
        typer.Option(
            "--plan",
            help="auto, fast, keep, min, offload, or a budget such as 20GB; keep+8bit keeps gate and up in 8 bits.",
        ),
    ] = "auto",
    json: JsonOption = False,
) -> None:
    """Predict memory and time of a training step from the model's config; no weights are read or downloaded.

    Exit code 2 means that it does not fit; what would be enough is then listed.
    """
    found = collect(model, gpu, length, batch, quant, rank, full, optimizer, plan, compute)
    if json:
        print_json(found)
    else:
        _print(found)
    if not found["fits"]:
        needed = f"{found['peak_bytes'] / GB:.2f} GB"
        raise CheckFailed(f"{model} needs {needed} with this plan; there are {_budget(found)}")


def collect(
    model: str,
    gpu: str,
    length: int,
    batch: int,
    quant: str,
    rank: int | None,
    full: bool,
    optimizer: str,
    plan: str,
    compute: str = "exact",
) -> dict[str, Any]:
    """Return what `fastft plan --json` prints. Raises UsageError, SpecError and LoadError."""
    from attrs import evolve

    from fastft.memory import plan as plans
    from fastft.memory.estimate import setup_of
    from fastft.memory.shape import positions_of, shape_of
    from fastft.registry.resolve import resolve

    optimizer = OPTIMIZERS.get(optimizer, optimizer)
    with checking_arguments():
        device = _check_arguments(gpu, quant, rank, full, optimizer, plan, compute)
    rank = 16 if rank is None else rank
    config, base = _config_and_base(model)
    spec = resolve(config)
    weights = None if quant == "none" else quant
    shape = shape_of(config, spec)
    setup = setup_of(shape, batch, length, quant=weights, rank=rank, full=full, optimizer=optimizer, compute=compute)
    setup = evolve(setup, eight_bits=None if full else plans.named_part(plan)[1])
    usable, asked = plans.usable(device.memory), plans.budget_of(plan)
    limit = usable if asked is None else min(usable, asked)
    made = plans.planned(setup, plan, limit, device)
    positions = positions_of(config)
    notes = (
        f"{model} is an adapter: the step is that of its base model {base}{'' if full else ' with a new one'}"
        if base
        else "",
        plans.fast_is_keep(plan, made.modes, plans.NO_NF4),
        plans.not_in_eight_bits(plan, "without adapters the rewrite that does so is not taken" if full else ""),
        _too_long(length, positions),
    )
    return {
        "model": model,
        "family": spec.name,
        "gpu": {"name": device.name, "memory_bytes": device.memory},
        "step": {"rows": batch, "length": length, "quant": weights, "rank": setup.rank, "compute": compute},
        "plan": plan,
        "budget_bytes": limit,
        "budget_of": "gpu" if limit == usable else "plan",
        "fits": made.fits,
        **_told(made, bool(setup.eight_bits), setup.fp8),
        "notes": [note for note in notes if note],
        **_lengths(plans.longest(setup, plan, limit, device), positions),
        **_what_is_enough(made, setup, plan, device),
    }


def _check_arguments(
    gpu: str, quant: str, rank: int | None, full: bool, optimizer: str, plan: str, compute: str
) -> "Device":
    """Return the device that `gpu` means. Raises UsageError with everything that is wrong."""
    from fastft.memory.devices import device_of
    from fastft.memory.estimate import COMPUTE, OPTIMIZER_BYTES
    from fastft.memory.plan import budget_of, plan_problem, usable

    device = None
    problems = [problem for problem in (plan_problem(plan),) if problem]
    try:
        device = device_of(gpu)
    except UsageError as error:
        problems += error.problems
    if device is not None and (budget_of(plan) or 0) > device.memory:
        has = f"{device.memory / GB:.2f} GB, and {usable(device.memory) / GB:.2f} GB for a step"
        problems.append(Problem("--plan", plan, f"no more than the GPU has: {device.name} has {has}"))
    if full and rank is not None:
        remedy = "Every weight is trained: there is no adapter."
        problems.append(Problem("--rank", rank, "to be left out with --full", remedy))
    if quant not in QUANTS:
        problems.append(Problem("--quant", quant, f"one of {', '.join(QUANTS)}", did_you_mean(quant, QUANTS)))
    elif full and quant != "none":
        problems.append(Problem("--full", full, "--quant none beside it", "Quantised weights cannot be trained."))
    if compute not in COMPUTE:
        problems.append(Problem("--compute", compute, f"one of {', '.join(COMPUTE)}", did_you_mean(compute, COMPUTE)))
    elif full and compute != "exact":
        remedy = "Products with trained weights are exact."
        problems.append(Problem("--compute", compute, "exact with --full", remedy))
    elif compute != "exact" and device is not None:
        problems += _without_fp8(device, compute)
    if optimizer not in OPTIMIZER_BYTES:
        known = (*OPTIMIZER_BYTES, *OPTIMIZERS)
        problems.append(Problem("--optimizer", optimizer, f"one of {', '.join(known)}", did_you_mean(optimizer, known)))
    if problems:
        raise UsageError(*problems)
    return device


def _what_is_enough(made: Any, setup: Any, plan: str, device: "Device") -> dict[str, Any]:
    """Return as plain values the changes that are enough, alone or else together, and a GPU that is."""
    from fastft.memory.devices import DEVICES
    from fastft.memory.enough import Asked, enough_alone, enough_together, smallest

    if made.fits:
        return {"remedies": [], "remedies_together": None, "smallest_gpu": None}
    asked = Asked(setup, plan, device.memory, device)
    alone = enough_alone(asked)
    together = None
    if all(found.drastic for found in alone):
        together = enough_together(asked, drastic=False) or enough_together(asked)
        together = None if together in alone else together
    gpus = [known for known in DEVICES if setup.compute == "exact" or not _without_fp8(known, setup.compute)]
    gpu = smallest(asked, gpus)
    return {
        "remedies": [{"name": found.names[0], "peak_bytes": found.peak} for found in alone],
        "remedies_together": together and {"names": list(together.names), "peak_bytes": together.peak},
        "smallest_gpu": gpu and {"name": gpu.name, "memory_bytes": gpu.memory},
    }


def _without_fp8(device: "Device", compute: str) -> list[Problem]:
    """Return what is wrong with computing in fp8 on a GPU; of one given by its memory alone that is not known."""
    from fastft.kernels.capability import FP8, fp8_obstacle
    from fastft.memory.devices import DEVICES

    why = fp8_obstacle(device.name, device.capability) if device.capability else ""
    names = ", ".join(known.name for known in DEVICES if known.capability >= FP8)
    remedy = f"Leave --compute out, or name a GPU that has them: {names}."
    return [Problem("--compute", compute, f"exact here: {why}", remedy)] if why else []


def _lengths(room: int, positions: int | None) -> dict[str, int | None]:
    """Return the longest length, and the two that bound it: that of the memory and, where known, that of the model."""
    return {
        "longest_length": room if positions is None else min(room, positions),
        "longest_length_in_memory": room,
        "longest_length_of_model": positions,
    }


def _too_long(length: int, positions: int | None) -> str:
    """Return what to say where the step's rows are longer than the model's positions serve, "" elsewhere."""
    if positions is None or length <= positions:
        return ""
    remedy = f"fastft.load with max_length={length} stretches its positions"
    return f"the model goes to {positions} tokens (max_position_embeddings), fewer than {length}: {remedy}"


def _told(made: Any, eight_bits: bool, fp8: bool) -> dict[str, Any]:
    """Return a plan and its prediction as plain values."""
    from attrs import asdict

    from fastft.memory.plan import describe_modes

    return {
        "parts": [{"name": part.name, "bytes": part.bytes} for part in made.estimate.parts],
        "peak_bytes": made.estimate.peak,
        "host_bytes": made.estimate.host,
        "layers": describe_modes(made.modes, eight_bits, fp8),
        "modes": [asdict(mode) for mode in made.modes],
        "step_seconds": made.estimate.seconds,
        "time_relative_to_keep": made.estimate.relative,
    }


def read_config(model: str) -> dict[str, Any]:
    """Return the config.json of a folder, a file or a hub id as a mapping; of a hub id that file alone is fetched.

    Of an adapter it is that of its base. Raises LoadError.
    """
    return _config_and_base(model)[0]


def _config_and_base(model: str) -> tuple[dict[str, Any], str]:
    """Return what `read_config` does, and where the base of an adapter is, "" for a whole model."""
    from fastft.model import files

    path, base = Path(model).expanduser(), ""
    if path.is_file() and path.name != files.ADAPTER_CONFIG:
        return _read_object(path), base
    folder = path.parent if path.name in ("config.json", files.ADAPTER_CONFIG) else path
    if not folder.is_dir():
        folder = files.locate(model, part="config")
    if not (folder / "config.json").is_file() and files.is_adapter(folder):
        stored = _read_object(folder / files.ADAPTER_CONFIG)
        base = files.base_of(folder, stored)
        folder = files.locate(base, stored.get("revision"), part="config")
    if not (folder / "config.json").is_file():
        raise LoadError(_no_config(folder, model if base else ""))
    return _read_object(folder / "config.json"), base


def _no_config(folder: Path, adapter: str) -> str:
    """Return what to say of a folder that does not tell its model; `adapter` is the one that it is the base of."""
    from fastft.model import files

    if adapter:
        return f"{folder}: no config.json in this folder, which {adapter} names as the base model of its adapter"
    expected = "give the folder of a whole model, of an adapter, or of a run that has ended"
    if found := files.checkpoints(folder):
        expected = f"its newest checkpoint is {str(found[-1])!r}"
    return f"{folder}: no config.json and no {files.ADAPTER_CONFIG} in this folder; {expected}"


def _read_object(path: Path) -> dict[str, Any]:
    from json import loads

    try:
        config = loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise LoadError(f"{path}: holds no JSON object; give a model's config.json")
    return config


def _print(found: dict[str, Any]) -> None:
    step = found["step"]
    what = f"{step['rows']} x {step['length']} tokens"
    weights = step["quant"] or "16 bits"
    how = f"LoRA rank {step['rank']}" if step["rank"] else "every weight trained"
    fp8 = "" if step["compute"] == "exact" else f", compute {step['compute']} (not exact)"
    print_fields({"model": found["model"], "family": found["family"], "step": f"{what}, {weights}, {how}{fp8}"})
    rows = [(part["name"], f"{part['bytes'] / GB:.2f}") for part in found["parts"]]
    print_table(("memory", "GB"), [*rows, ("peak", f"{found['peak_bytes'] / GB:.2f}")])
    seconds, relative = found["step_seconds"], found["time_relative_to_keep"]
    speed = f"{relative:.2f} times as long as with everything kept and exact"
    if seconds:
        speed = f"{seconds:.3f} s, {step['rows'] * step['length'] / seconds:,.0f} tokens/s; {speed}"
    fields = {
        "layers": found["layers"],
        "step time": speed,
        "CPU memory": f"{found['host_bytes'] / GB:.2f} GB",
        "of": _budget(found),
        "longest length": _longest(found),
    }
    print_fields(fields | ({"note": "; ".join(found["notes"])} if found["notes"] else {}))
    if not found["fits"]:
        _print_what_is_enough(found)


def _print_what_is_enough(found: dict[str, Any]) -> None:
    if found["remedies"]:
        rows = [(remedy["name"], f"{remedy['peak_bytes'] / GB:.2f}") for remedy in found["remedies"]]
        print_table(("what is enough by itself", "peak GB"), rows)
    gpu, together = found["smallest_gpu"], found["remedies_together"]
    fields = {"smallest known GPU": f"{gpu['name']} ({gpu['memory_bytes'] / GB:.1f} GB)" if gpu else "none fits"}
    names = together and f"{', '.join(together['names'])} (peak {together['peak_bytes'] / GB:.2f} GB)"
    if not found["remedies"]:
        fields = {"enough by itself": "nothing", "enough together": names or "nothing", **fields}
    elif names:
        fields = {"enough together": names, **fields}
    print_fields(fields)


def _budget(found: dict[str, Any]) -> str:
    """Return in words how much memory there is for the step, and whose limit that is."""
    amount = f"{found['budget_bytes'] / GB:.2f} GB"
    if found["budget_of"] == "plan":
        return f"{amount}, the budget of plan {found['plan']}"
    return f"{amount} that {found['gpu']['name']} has for it"


def _longest(found: dict[str, Any]) -> str:
    """Return in words the longest length, and what bounds it: the memory, or the model's positions."""
    room, positions = found["longest_length_in_memory"], found["longest_length_of_model"]
    if not room:
        return "none fits"
    if positions is None:
        return f"about {room}, by memory"
    if room < positions:
        return f"about {room}, by memory; the model goes to {positions}"
    return f"{positions}, by the model (max_position_embeddings); memory goes to about {room}"
