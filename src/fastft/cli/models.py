"""The trained model that a command is given: a folder, or an id of a hub."""

from pathlib import Path

from fastft.errors import LoadError, UsageError


def folder_of(model: str) -> Path:
    """Return the folder of a model; a hub id is looked up as `fastft.load` does."""
    from fastft.model import files

    return Path(model).expanduser() if Path(model).expanduser().is_dir() else files.locate(model)


def check_weights(model: str) -> None:
    """Raise UsageError for a folder here that holds no weights; of an id that is not known before it is looked up."""
    from fastft.export.folder import find_weights

    folder = Path(model).expanduser()
    if not folder.is_dir():
        return
    try:
        find_weights(folder)
    except LoadError as error:
        raise UsageError(*error.problems) from error
