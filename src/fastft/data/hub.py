"""Data sets of the hub by name: from the cache of `datasets` if they are there, from the hub otherwise."""

from pathlib import Path
from typing import Any

from fastft.environment import hub_offline
from fastft.errors import DataError, Problem, did_you_mean_path

_LOCAL = "give the path of a file or folder"


def load_from_hub(name: str, config: str | None = None, stream: bool = False) -> dict[str, Any]:
    """Return the splits of a data set, by name. Raises one `DataError` that says what was tried."""
    import datasets
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        remedy = f"No such file or folder ({Path(name).absolute()}), and no name of the hub either: {error}"
        raise DataError(Problem("rows", name, "a file, a folder, or a name of the hub", remedy)) from error
    cache = datasets.config.HF_DATASETS_CACHE
    tried = f"Tried: no file or folder {Path(name).absolute()}{_near(Path(name))}; not in the cache {cache}"
    cached = _cached(name, config)
    if cached is not None:
        parts = cached.as_dataset()
        return {part: rows.to_iterable_dataset() for part, rows in parts.items()} if stream else dict(parts)
    if hub_offline():
        remedy = f"{tried}; the hub is switched off (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE). Unset it, or {_LOCAL}."
        raise DataError(Problem("rows", name, "a data set that can be found", remedy))
    _need_on_hub(name, tried)
    try:
        return dict(datasets.load_dataset(name, config, streaming=stream))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        remedy = f"The hub has it, but it cannot be loaded: {error}"
        raise DataError(Problem("rows", name, "a data set that `datasets` can load", remedy)) from error


def _near(path: Path) -> str:
    """Return the name in the path's folder that may be meant, in brackets."""
    hint = did_you_mean_path(path)
    return f" ({hint})" if hint else ""


def _cached(name: str, config: str | None) -> Any:
    """Return the builder of a data set that was loaded before, or None. Raises `DataError` for one of several."""
    from datasets import config as settings
    from datasets.naming import camelcase_to_snakecase
    from datasets.packaged_modules.cache.cache import Cache

    *owner, last = name.split("/")
    folder = Path(settings.HF_DATASETS_CACHE) / "___".join([*owner, camelcase_to_snakecase(last)])
    configs = sorted({path.parts[-4] for path in folder.glob("*/*/*/dataset_info.json")})
    if not configs or (config is not None and config not in configs):
        return None
    if config is None and len(configs) > 1:
        remedy = f"Choose one: {', '.join(f'config={found!r}' for found in configs)}."
        raise DataError(Problem(f"{name}, config", config, f"one of {configs}, which are in the cache", remedy))
    return Cache(dataset_name=last, repo_id=name, config_name=config or configs[0], version="auto", hash="auto")


def _need_on_hub(name: str, tried: str) -> None:
    """Ask the hub for the data set's card, which is one request. Raises `DataError` if it cannot be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    expected = "a data set that can be found"
    try:
        snapshot_download(name, repo_type="dataset", allow_patterns=["README.md"])
    except GatedRepoError as error:
        remedy = "Access is gated: accept its terms on its page, and log in (hf auth login)."
        raise DataError(Problem("rows", name, "a data set that may be read", remedy)) from error
    except RepositoryNotFoundError as error:
        remedy = f"{tried}; not on the hub. Check the spelling, or log in (hf auth login) if it is private."
        raise DataError(Problem("rows", name, expected, remedy)) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        remedy = f"{tried}; the hub could not be reached ({type(error).__name__}). Check the network, or {_LOCAL}."
        raise DataError(Problem("rows", name, expected, remedy)) from error
