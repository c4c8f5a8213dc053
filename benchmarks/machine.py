"""What a number depends on: versions, the device, its clocks, the commit."""

import platform
import shutil
import statistics
import subprocess
import threading
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch", "triton", "transformers", "accelerate", "peft", "bitsandbytes", "trl", "liger-kernel",
    "cut_cross_entropy", "torchao", "unsloth", "unsloth_zoo",
)  # fmt: skip
_QUERY = {"sm_mhz": "clocks.sm", "memory_mhz": "clocks.mem", "watts": "power.draw", "celsius": "temperature.gpu"}


class Clocks:
    """Medians of the GPU's clocks, power and temperature between `start` and `stop`, sampled by nvidia-smi."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lines: list[str] = []
        self._reader: threading.Thread | None = None

    def start(self) -> None:
        """Begin to sample; without nvidia-smi nothing happens."""
        program = shutil.which("nvidia-smi")
        if program is None:
            return
        command = [program, f"--query-gpu={','.join(_QUERY.values())}", "--format=csv,noheader,nounits", "-i", "0"]
        self._process = subprocess.Popen([*command, "-lms", "200"], stdout=subprocess.PIPE, text=True)
        self._reader = threading.Thread(target=lambda: self._lines.extend(self._process.stdout), daemon=True)
        self._reader.start()

    def stop(self) -> dict[str, float] | None:
        """Return the medians by name, None if nothing was sampled."""
        if self._process is None:
            return None
        self._process.terminate()
        self._process.wait()
        self._reader.join(timeout=5)
        rows = [row for row in map(_numbers, self._lines) if row]
        return {name: statistics.median(column) for name, column in zip(_QUERY, zip(*rows))} if rows else None


def _numbers(line: str) -> list[float]:
    try:
        values = [float(part) for part in line.split(",")]
    except ValueError:
        return []
    return values if len(values) == len(_QUERY) else []


def versions() -> dict[str, str]:
    """Return the version of Python and of every package here that a number could depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def device() -> dict[str, Any]:
    """Return the device's name and its bytes of memory (None for a CPU). Imports torch, without making a context."""
    import torch

    if not torch.cuda.is_available():
        return {"name": f"{platform.machine()} CPU, {torch.get_num_threads()} threads", "memory": None}
    properties = torch.cuda.get_device_properties(0)
    return {"name": properties.name, "memory": properties.total_memory, "cuda": torch.version.cuda}


def commit(root: Path) -> str:
    """Return the commit of `root`, with "+" if files under git differ from it; "unknown" outside of git."""
    try:
        found = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "-uno", "--", "src", "benchmarks"],
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        return "unknown"
    return found.stdout.strip() + ("+" if changed.stdout.strip() else "") if found.returncode == 0 else "unknown"
