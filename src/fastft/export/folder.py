"""Which weights a folder holds: a checkpoint, an adapter, or a run of fastft; and how they were held in training."""

from pathlib import Path
from typing import Any

import torch
from attrs import frozen

from fastft.errors import LoadError
from fastft.model import files
from fastft.model.config import DTYPES


@frozen
class Found:
    """The folder with the weights, whether it is an adapter or stored quantised, and what its run recorded."""

    folder: Path
    adapter: bool
    quantised: bool
    record: dict[str, Any]
    notes: tuple[str, ...] = ()

    def skeleton(self) -> tuple[Any, Any]:
        """Return the architecture's model without storage (on the meta device), and its generation config or None."""
        from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

        try:
            config = AutoConfig.from_pretrained(self.folder, local_files_only=True)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
        except (ValueError, KeyError, TypeError, OSError, ImportError) as error:
            raise LoadError(f"{self.folder / 'config.json'}: transformers cannot use it: {error}") from error
        stored = (self.folder / "generation_config.json").is_file()
        return model, GenerationConfig.from_pretrained(self.folder) if stored else model.generation_config


def find_weights(folder: Path) -> Found:
    """Return what is in a folder: of a run without weights of its own, its newest checkpoint. Raises `LoadError`."""
    from fastft.train.lineage import own_and_others

    if not folder.is_dir():
        folder = files.locate(str(folder))
    notes: tuple[str, ...] = ()
    whole = (files.WEIGHTS, files.INDEX, files.ADAPTER_CONFIG, *files.PICKLED)
    if not any((folder / name).exists() for name in whole):
        newest, others = own_and_others(folder)
        if not newest and others:
            raise LoadError(
                f"{folder}: no weights, and no checkpoint of the run that its run.json is of; {others[-1]} is of "
                "another run, give that folder to take it"
            )
        if not newest:
            raise LoadError(
                f"{folder}: no weights, no adapter and no checkpoint of a run is in it; give the folder of a model, of "
                "an adapter, or the output_dir of a run"
            )
        notes = (f"taken from {newest[-1].name}, the newest checkpoint of the run in {folder}",)
        folder = newest[-1]
    folder = folder.resolve()
    record = run_record(folder)
    if files.is_adapter(folder):
        return Found(folder, True, False, record, notes)
    if not (folder / "config.json").is_file():
        raise LoadError(f"{folder}: config.json is missing; a model folder needs it, copy it from the base model")
    quantised = bool(files.read_json(folder / "config.json").get("quantization_config"))
    return Found(folder, False, quantised, record, notes)


def run_record(folder: Path) -> dict[str, Any]:
    """Return the run.json in a folder, for a checkpoint that of its run beside it; else an empty record.

    A checkpoint's own is of the moment that it was saved; it counts where that beside it is of another run.
    """
    from fastft.train.lineage import leads_to, runs_of

    places = [folder]
    if files.CHECKPOINT.match(folder.name):
        places.insert(0 if leads_to(folder, runs_of(folder.parent)) else 1, folder.parent)
    for place in places:
        if (place / "run.json").is_file():
            return files.read_json(place / "run.json")
    return {}


def load_folder(found: Found, held: tuple[str | None, str] | None = None) -> Any:
    """Load the model in a folder, an adapter on its base as it was trained: quantised alike, in the same dtype.

    `held` are the quant and the dtype to load it in, where these are known otherwise. `assumptions` says what is taken
    for granted without it.
    """
    from fastft.model.load import load

    model = found.record.get("model", {})
    quant = model.get("quant") if found.adapter else None
    dtype = model.get("dtype") if found.adapter and model.get("dtype") in DTYPES else _stored_dtype(found)
    if held is not None:
        quant, dtype = held
    return load(str(found.folder), quant=None if _base_is_quantised(found) else quant, dtype=dtype)[0]


def assumptions(found: Found) -> tuple[str, ...]:
    """Return what a reader should know of how `load_folder` loads a folder."""
    if not found.adapter or found.record.get("model"):
        return found.notes
    return (
        *found.notes,
        f"no run.json tells how the base of {found.folder} was held in training; it was taken in 16 bits. Load the "
        "adapter with fastft.load(folder, quant=...) and pass the model if it was quantised",
    )


def base_folder(found: Found) -> Path:
    """Return the folder itself, or that of the base of the adapter in it. Raises `LoadError`."""
    if not found.adapter:
        return found.folder
    stored = files.read_json(found.folder / files.ADAPTER_CONFIG)
    return files.locate(files.base_of(found.folder, stored), stored.get("revision"))


def _base_is_quantised(found: Found) -> bool:
    return bool(files.read_json(base_folder(found) / "config.json").get("quantization_config"))


def _stored_dtype(found: Found) -> str | None:
    config = files.read_json(base_folder(found) / "config.json")
    name = config.get("dtype") or config.get("torch_dtype")
    return name if name in DTYPES else None
