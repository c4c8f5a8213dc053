"""`fastft env`: what this machine has, and which kernels it can run."""

import platform
import shutil
import subprocess
import sys
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import typer

from fastft.cli.output import JsonOption, print_fields, print_json
from fastft.environment import installed, triton_interpreted, version_of

app = typer.Typer(add_completion=False, rich_markup_mode=None)

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "trl",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "gguf",
    "vllm",
)
GIB = 2**30


@app.command()
def env(json: JsonOption = False) -> None:
    """Show versions, GPUs, memory and usable kernels."""
    found = collect()
    if json:
        print_json(found)
        return
    packages = {name: version or "not installed" for name, version in found["packages"].items()}
    kernels = {name: f"{item['runs']} ({item['why']})" for name, item in found["kernels"].items()}
    gpus = [{**gpu, "free": _gib(gpu["free"]), "memory": _gib(gpu["memory"])} for gpu in found["gpus"]]
    memory = {name: _gib(amount) for name, amount in found["memory"].items()}
    found |= {"packages": packages, "memory": memory, "gpus": gpus or found["no_gpu"], "kernels": kernels}
    print_fields({name: value for name, value in found.items() if name != "no_gpu"})


def collect() -> dict[str, Any]:
    """Return what `fastft env --json` prints. Memory is in bytes, `None` where it cannot be told."""
    torch, broken = _torch()
    gpus, no_gpu = _gpus(torch, broken)
    return {
        "fastft": version_of("fastft") or _own_version(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "packages": {name: version_of(name) for name in PACKAGES},
        "cuda": getattr(torch.version, "cuda", None) if torch else None,
        "driver": _driver(),
        "memory": _memory(),
        "gpus": gpus,
        "no_gpu": no_gpu,
        "kernels": _kernels(gpus, no_gpu),
    }


def _own_version() -> str:
    from fastft import __version__

    return __version__


def _torch() -> tuple[Any, str]:
    """Return the torch module, or None and the reason why there is none."""
    if not installed("torch"):
        return None, "torch is not installed"
    try:
        import torch
    except (ImportError, OSError) as error:
        return None, f"torch cannot be imported: {error}"
    return torch, ""


def _gpus(torch: Any, broken: str) -> tuple[list[dict[str, Any]], str]:
    if torch is None:
        return [], broken
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return [], "no CUDA device is visible" if built else "this torch is built for CPUs only"
    found = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        free, memory = torch.cuda.mem_get_info(index)
        found.append(
            {
                "name": device.name,
                "capability": f"{device.major}.{device.minor}",
                "memory": memory,
                "free": free,
                "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
            }
        )
    return found, ""


def _driver() -> str | None:
    """Return the version of the NVIDIA driver, or None where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        out = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return out[0] if out else None


def _memory() -> dict[str, int | None]:
    """Return total and available main memory in bytes, as Linux tells it."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return {"total": None, "available": None}
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
    return {"total": sizes.get("MemTotal"), "available": sizes.get("MemAvailable")}


def _kernels(gpus: list[dict[str, Any]], no_gpu: str) -> dict[str, dict[str, str]]:
    """Return for each op what runs it here, `triton`, `interpreter`, `reference` or `nothing`, and why."""
    import fastft.kernels

    runs, why = _runner(gpus, no_gpu)
    ops = sorted(module.name for module in iter_modules(fastft.kernels.__path__) if module.ispkg)
    return {name: {"runs": runs, "why": why} for name in ops}


def _runner(gpus: list[dict[str, Any]], no_gpu: str) -> tuple[str, str]:
    if not installed("torch"):
        return "nothing", no_gpu
    if not installed("triton"):
        return "reference", "triton is not installed"
    if gpus:
        return "triton", f"on {gpus[0]['name']}"
    if triton_interpreted() and not no_gpu.startswith("torch"):
        return "interpreter", "TRITON_INTERPRET=1"
    return ("nothing" if no_gpu.startswith("torch") else "reference"), no_gpu


def _gib(amount: int | None) -> str:
    return "unknown" if amount is None else f"{amount / GIB:.1f} GiB"
