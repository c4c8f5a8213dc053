"""The one place that reads environment variables and asks which devices and optional packages are here."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata, util

# What vLLM is to find in the environment while an engine starts in this process -> why.
_FOR_VLLM = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine shares this process, so weights need not be sent
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it cannot say the log-probabilities of what it sampled from
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # on a CPU, training goes on using the threads
    "VLLM_NO_USAGE_STATS": "1",  # nothing is sent anywhere
    "VLLM_LOGGING_LEVEL": "ERROR",  # it warns of what is as it should be here, tracebacks included
}
# Of these the user's own value is kept.
_USERS_CHOICE = {"VLLM_LOGGING_LEVEL", "VLLM_CPU_OMP_THREADS_BIND"}


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


@contextmanager
def vllm_environment() -> Iterator[None]:
    """Set the variables by which vLLM is told how to run in this process, while an engine starts.

    They are the only variables that fastft ever sets. Afterwards they are as they were before; vLLM reads them while
    it starts. A logging level and a binding of threads that the user has set are kept.
    """
    before = {name: os.environ.get(name) for name in _FOR_VLLM}
    wanted = {n: v for n, v in _FOR_VLLM.items() if before[n] is None or n not in _USERS_CHOICE}
    try:
        for name, value in wanted.items():
            os.environ[name] = value
        yield
    finally:
        for name in wanted:
            if before[name] is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = before[name]
