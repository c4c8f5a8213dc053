"""What lies beside exported weights: config, generation config, tokenizer, index, and a record of the export."""

import shutil
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastft.errors import SaveError, UsageError
from fastft.export.folder import find_weights
from fastft.export.place import RECORD, new_folder
from fastft.export.weights import WeightSource
from fastft.model import files
from fastft.model.tokenizer import end_tokens, id_list, load_tokenizer
from fastft.state import get_state
from fastft.train.checkpoint import write_json


def read_from(source: WeightSource | None, model: Any) -> tuple[Path | None, ...]:
    """Return the folders that an export reads from, which it must not replace."""
    given = None if isinstance(model, nn.Module) else Path(model).expanduser()
    loaded = get_state(model).source if isinstance(model, nn.Module) else None
    return (source.folder if source else None, given, Path(loaded) if loaded else None)


def tokenizer_of(model: Any) -> Any:
    """Return the tokenizer that was loaded with a model, or None."""
    return get_state(model).tokenizer


def write_index(folder: Path, names: Mapping[str, list[str]], size: int) -> None:
    """Write which file holds which tensor."""
    where = {tensor: file for file, tensors in names.items() for tensor in tensors}
    write_json(folder / files.INDEX, {"metadata": {"total_size": size}, "weight_map": where})


def write_configs(
    folder: Path, source: WeightSource, dtype: torch.dtype, quantization: Mapping[str, Any] | None, tokenizer: Any
) -> list[str]:
    """Write config.json, with the dtype and the quantisation of the weights, and generation_config.json.

    Generation stops at the EOS of `tokenizer` too (None: it is not known); returns notes, one if it did not before.
    """
    source.config.save_pretrained(str(folder))
    config = files.read_json(folder / "config.json")
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    write_json(folder / "config.json", config)
    if source.generation_config is None:
        return []
    generation = deepcopy(source.generation_config)
    before, ends = id_list(generation.eos_token_id), end_tokens(tokenizer, generation, source.config)
    if set(ends) != set(before):
        generation.eos_token_id = ends if len(ends) > 1 else ends[0]
    generation.to_json_file(str(folder / "generation_config.json"))
    if set(ends) == set(before):
        return []
    return [f"generation_config.json stops at the tokens {ends}, of which that of the model named {before}"]


def settled_tokenizer(source: WeightSource, tokenizer: Any) -> Any:
    """Return `tokenizer`, by default that of the model or that beside its base's weights; None if there is none."""
    tokenizer = tokenizer if tokenizer is not None else source.tokenizer
    if tokenizer is None and source.folder is not None and files.has_tokenizer(source.folder):
        tokenizer = load_tokenizer(source.folder)
    return tokenizer


def write_tokenizer(folder: Path, base: Path | None, tokenizer: Any) -> list[str]:
    """Write a tokenizer with its chat template; returns notes, one if there is none to write.

    `base`: where the base's weights lie, and perhaps its SentencePiece file.
    """
    if tokenizer is None:
        return [
            "no tokenizer is known for this model and none was written; pass tokenizer=, or put its files beside them"
        ]
    tokenizer.save_pretrained(str(folder))
    if base is not None and (base / "tokenizer.model").is_file() and not (folder / "tokenizer.model").exists():
        shutil.copy2(base / "tokenizer.model", folder)  # tools outside transformers read SentencePiece's own file
    return []


def write_export_record(
    folder: Path, kind: str, source: WeightSource | None, report: Mapping[str, Any], model: Any
) -> None:
    """Write export.json: what was exported from which base; and run.json, if `model` is the folder of a run."""
    from fastft import __version__

    state = source.state if source is not None else get_state(model)
    origin = None if isinstance(model, nn.Module) else Path(model).expanduser()
    content = {"kind": kind, "fastft": __version__, "base_model": state.source, "quant": state.quant, **report}
    write_json(folder / RECORD, content)
    record = find_weights(origin).record if origin is not None else {}
    if record:
        write_json(folder / "run.json", record)


def copy_adapter(origin: Path, folder: Path, tokenizer: Any) -> Path:
    """Copy the adapter of an adapter's or run's folder, with its tokenizer and run.json, into `folder`."""
    found = find_weights(origin)
    if not found.adapter:
        raise UsageError(f"{origin}: this folder holds a whole model, not an adapter; fastft.merge exports those")
    names = (files.ADAPTER_CONFIG, *files.ADAPTER_WEIGHTS, *files.TOKENIZER_FILES)
    names += ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
    names += ("chat_template.jinja", "generation_config.json")
    present = [found.folder / name for name in names if (found.folder / name).is_file()]
    with new_folder(folder, sum(path.stat().st_size for path in present), (found.folder, origin)) as staged:
        for path in present:
            shutil.copy2(path, staged)
        _settle_base(staged, found.folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(staged))
        if found.record:
            write_json(staged / "run.json", found.record)
        base = files.read_json(staged / files.ADAPTER_CONFIG).get("base_model_name_or_path")
        write_json(staged / RECORD, {"kind": "adapter", "base_model": base})
    return folder


def _settle_base(staged: Path, origin: Path) -> None:
    """Write a base that was named relative to the adapter's old folder as the path that it is."""
    config = files.read_json(staged / files.ADAPTER_CONFIG)
    name = config.get("base_model_name_or_path")
    if not name:
        raise SaveError(f"{origin / files.ADAPTER_CONFIG}: names no base model (base_model_name_or_path)")
    if not Path(name).is_absolute() and (origin / name).is_dir() and not Path(name).is_dir():
        write_json(staged / files.ADAPTER_CONFIG, {**config, "base_model_name_or_path": str((origin / name).resolve())})
