"""The one place that reads environment variables and asks which devices and optional packages are here."""

import os
from importlib import metadata, util


def triton_interpreted() -> bool:
    """Say whether Triton kernels are to run in its interpreter (`TRITON_INTERPRET=1`), which needs no GPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def hub_offline() -> bool:
    """Say whether the user has switched the model hub off (`HF_HUB_OFFLINE` or `TRANSFORMERS_OFFLINE`)."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in names)


def local_rank() -> int:
    """Return this process's rank on its host as torchrun sets it, 0 without it."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def installed(package: str) -> bool:
    """Say whether `package` can be imported, without importing it."""
    return util.find_spec(package) is not None


def version_of(package: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
