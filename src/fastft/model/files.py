"""Find a checkpoint's files, offline first, and say at once what is missing or broken in them."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastft.environment import hub_offline
from fastft.errors import LoadError, did_you_mean_path

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZER = "tokenizer.json"
TOKENIZER_FILES = (TOKENIZER, "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")
NO_TOKENIZER = f"no tokenizer ({' or '.join(TOKENIZER_FILES[:3])} ...); copy the tokenizer's files from the base model"
TOKENIZER_CONFIG = "tokenizer_config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")
# What is fetched of a hub repository; everything lies at its top, and consolidated* repeats the weights.
_WANTED = ("*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "*.txt", "*.tiktoken")
_UNWANTED = ("*/*", "consolidated*", "*.gguf", "*.onnx")
_FILES = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".json", ".zip")
SECONDS = 5.0  # that the hub has to answer: its client waits without end


def locate(
    source: str,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    code: bool = False,
    part: str = "model",
) -> Path:
    """Return the folder that holds `source`: a local folder, else the hub cache, else a download.

    The network is used only where the first two have no complete copy and the user has not switched the hub off.
    `code` also fetches the repository's Python files. `part` is what is needed: the whole "model", its "tokenizer" or
    its "config". Raises `LoadError` that says where was looked, at once for what can be no name of the hub, and within
    seconds where the hub does not answer.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.is_file():
        remedy = "pass the folder that holds config.json, the weights and the tokenizer"
        raise LoadError(f"model {source!r}: this is a file, not a folder; {remedy}")
    hint = did_you_mean_path(folder)
    if not _HUB_ID.fullmatch(source) or folder.suffix.lower() in _FILES:
        raise LoadError(
            f"model {source!r}: no such folder (looked at {folder.absolute()}), and it is no hub id of the form "
            f"'owner/name' either; {hint or 'check the path'}"
        )
    return _from_hub(source, revision, token, cache_dir, code, part, f" ({hint})" if hint else "")


def _from_hub(
    source: str, revision: str | None, token: str | None, cache_dir: str | None, code: bool, part: str, hint: str
) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,  # of whichever HTTP library the client is built on
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def fetch(patterns: tuple[str, ...], local: bool) -> Path:
        where = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local}
        return Path(snapshot_download(source, allow_patterns=list(patterns), ignore_patterns=list(_UNWANTED), **where))

    patterns, problems = _PARTS[part]
    wanted = (*patterns, "*.py") if code else patterns
    at = f"model {source!r}" + (f" at revision {revision!r}" if revision else "")
    looked = f"no folder {Path(source).absolute()}{hint}, not in the hub cache {cache_dir or constants.HF_HUB_CACHE}"
    try:
        folder = fetch(wanted, local=True)
        missing = problems(folder)
        if not missing:
            return folder
        looked = f"the copy in the hub cache is incomplete ({'; '.join(missing)})"
    except LocalEntryNotFoundError:
        pass
    except HFValidationError as error:
        raise LoadError(f"{at}: no such folder ({Path(source).absolute()}), and no hub id either: {error}") from error
    if hub_offline():
        raise LoadError(
            f"{at}: {looked}, and the model hub is switched off (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE); unset it, "
            "or give the path of a local folder"
        )
    try:
        HfApi(token=token).model_info(source, revision=revision, timeout=SECONDS)
        folder = fetch(wanted, local=False)
        if part == "model" and not list(folder.glob("*.safetensors")):
            folder = fetch((*PICKLED, "pytorch_model-*.bin"), local=False)
        return folder
    except GatedRepoError as error:
        raise LoadError(f"{at}: access is gated; accept its terms on its page, then pass token=...") from error
    except RevisionNotFoundError as error:
        raise LoadError(f"{at}: the hub has the model but not this revision; check revision=...") from error
    except RepositoryNotFoundError as error:
        raise LoadError(
            f"{at}: {looked}, and not on the hub; check the spelling, or pass token=... if it is private"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HTTPError, OSError) as error:
        raise LoadError(
            f"{at}: {looked}, and the hub could not be reached ({type(error).__name__}: {error}); check the network, "
            "or give the path of a local folder"
        ) from error


def read_json(path: Path) -> Any:
    """Read a JSON file; `LoadError` names the file and the place if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LoadError(f"{path}: not valid JSON ({error}); the file is damaged, fetch it again") from error
    except OSError as error:
        raise LoadError(f"{path}: cannot be read ({error.strerror})") from error


def is_adapter(folder: Path) -> bool:
    """Say whether `folder` holds an adapter rather than a whole model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / WEIGHTS).exists() and not (folder / INDEX).exists()


def base_of(folder: Path, stored: Mapping[str, Any]) -> str:
    """Return where the base of the adapter in `folder` is, as its config says or relative to it. Raises `LoadError`."""
    name = stored.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise LoadError(
            f"{folder / ADAPTER_CONFIG}: names no base model (base_model_name_or_path); write its path or id there"
        )
    if Path(name).expanduser().is_dir():
        return str(name)
    beside = (folder / name).resolve()
    if beside.is_dir():
        return str(beside)
    if Path(name).is_absolute():
        raise LoadError(
            f"{folder}: its base model is not at {name} any more; put it back, or write its new path or hub id as "
            f"base_model_name_or_path into {ADAPTER_CONFIG}"
        )
    return str(name)


def has_tokenizer(folder: Path) -> bool:
    """Say whether `folder` holds a tokenizer's files."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def check(folder: Path) -> None:
    """Raise one `LoadError` that lists everything missing or damaged in a model or adapter folder."""
    found = problems_of(folder)
    if found:
        raise LoadError(*(f"{folder}: {problem}" for problem in _of_another_kind(folder) or found))


def checkpoints(folder: str | Path) -> list[Path]:
    """Return the whole checkpoints in `folder`, oldest step first."""
    folder = Path(folder)
    found = (
        [path for path in folder.iterdir() if CHECKPOINT.match(path.name) and path.is_dir()] if folder.is_dir() else []
    )
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def _of_another_kind(folder: Path) -> list[str]:
    """Return what a folder is that no model was ever saved in, if that can be told; else nothing."""
    if (folder / "config.json").exists():
        return []
    if found := checkpoints(folder):
        newest = str(found[-1])
        return [f"it holds checkpoints of a run that did not end, and no model; the newest to load is {newest!r}"]
    if any(folder.glob("*.gguf")):
        return ["it holds GGUF files, which are exports; load the model that they were made of"]
    return []


def problems_of(folder: Path) -> list[str]:
    """Return what is missing or damaged in a model or adapter folder, a sentence each; headers only are read."""
    if is_adapter(folder):
        return weight_problems(folder)
    problems = []
    if not (folder / "config.json").is_file():
        problems.append("config.json is missing; a model folder needs it, copy it from where the weights came from")
    if not has_tokenizer(folder):
        problems.append(NO_TOKENIZER)
    return problems + weight_problems(folder)


def _tokenizer_problems(folder: Path) -> list[str]:
    """A lone tokenizer.json is what other libraries fetch; the special tokens and the chat template lie elsewhere.

    Beside any other of a tokenizer's files it was fetched with all of them: some repositories have no such config.
    """
    if not has_tokenizer(folder):
        return ["no tokenizer"]
    others = (name for name in (*TOKENIZER_FILES, TOKENIZER_CONFIG) if name != TOKENIZER)
    return [] if any((folder / name).is_file() for name in others) else [f"{TOKENIZER} alone, no {TOKENIZER_CONFIG}"]


def _copy_problems(folder: Path) -> list[str]:
    """What is missing of a whole model in the hub cache; a folder of the user's own may have a lone tokenizer.json."""
    return problems_of(folder) + (_tokenizer_problems(folder) if has_tokenizer(folder) else [])


def _config_problems(folder: Path) -> list[str]:
    return [] if any((folder / name).is_file() for name in _PARTS["config"][0]) else ["no config.json"]


# What is needed of a model -> the files of it that are fetched, and what says whether they are all there.
_PARTS = {
    "model": (_WANTED, _copy_problems),
    "tokenizer": (tuple(pattern for pattern in _WANTED if pattern != "*.safetensors"), _tokenizer_problems),
    "config": (("config.json", ADAPTER_CONFIG), _config_problems),
}


def weight_problems(folder: Path) -> list[str]:
    """Return what is missing or damaged in the weights of a model or adapter folder; headers only are read."""
    return _adapter_problems(folder) if is_adapter(folder) else _model_problems(folder)


def _adapter_problems(folder: Path) -> list[str]:
    present = [name for name in ADAPTER_WEIGHTS if (folder / name).is_file()]
    if not present:
        return [f"{ADAPTER_WEIGHTS[0]} is missing beside {ADAPTER_CONFIG}; the adapter was not saved completely"]
    return _shard_problems(folder / present[0], None) if present[0].endswith(".safetensors") else []


def _model_problems(folder: Path) -> list[str]:
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        shards: dict[str, list[str]] = {}
        for tensor, shard in index.get("weight_map", {}).items():
            shards.setdefault(shard, []).append(tensor)
        if not shards:
            return [f"{INDEX} names no tensor (no weight_map); fetch it again"]
        problems = []
        for shard, tensors in sorted(shards.items()):
            if (folder / shard).is_file():
                problems += _shard_problems(folder / shard, tensors)
            else:
                problems.append(f"{shard} is missing, which {INDEX} names for {len(tensors)} tensors; fetch it again")
        return problems
    if (folder / WEIGHTS).is_file():
        return _shard_problems(folder / WEIGHTS, None)
    if any((folder / name).is_file() for name in PICKLED):
        return []
    shards_without_index = sorted(path.name for path in folder.glob("model-*-of-*.safetensors"))
    if shards_without_index:
        return [f"{INDEX} is missing beside {shards_without_index[0]} and its kin; fetch it again"]
    return [f"no weights: neither {WEIGHTS} nor {INDEX}; give the folder of a whole model or of an adapter"]


def _shard_problems(path: Path, tensors: list[str] | None) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as shard:
            absent = sorted(set(tensors or ()) - set(shard.keys()))
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        return [f"{path.name} is damaged ({error}; {size:,} bytes on disk); fetch it again"]
    if absent:
        return [
            f"{path.name} lacks {len(absent)} tensors that {INDEX} places there, such as {absent[0]}; fetch it again"
        ]
    return []
