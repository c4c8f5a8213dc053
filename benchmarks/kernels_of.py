"""Where the time of a training step goes: GPU kernels by name and kind, and what the GPU waits for.

python -m benchmarks.kernels_of --shape llama-8b --mode nf4 --batch 4 --length 4096 --layers 8
"""

import argparse
import importlib
import json
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from benchmarks.arms import Trainee, find_arm
from benchmarks.batches import batch_of
from benchmarks.cells import Cell, Task
from benchmarks.stepping import optimizer_of, step

# The first kind whose word is in a kernel's name is the kernel's.
KINDS = (
    ("attention", ("flash", "fmha", "sdpa", "cudnn_generated", "attention")),
    ("NF4", ("nf4", "dequantize")),
    ("cross entropy", ("cross_entropy",)),
    ("LoRA and activation", ("lora_glu",)),
    ("fp8", ("fp8", "e4m3", "scaled_mm", "quantize_rows")),
    ("GEMM", ("gemm", "nvjet", "cutlass", "cublas", "splitk", "sm90_xmma")),
    ("optimizer", ("adam", "multi_tensor")),
    ("copy and fill", ("memcpy", "memset", "copy", "fill")),
    ("fused elementwise", ("triton_",)),
    ("elementwise", ("elementwise", "reduce", "cat", "index")),
)


def kind_of(name: str) -> str:
    """Return the kind of a kernel, "other" where its name tells none."""
    low = name.lower()
    return next((kind for kind, words in KINDS if any(word in low for word in words)), "other")


def profile(trainee: Trainee, cell: Cell, device: str, warmup: int, steps: int) -> dict[str, Any]:
    """Return kernels (name, calls and ms a step), kinds (ms a step), the step's wall ms and its unprofiled wall ms.

    And `gaps`, the ms a step in which no kernel ran, by the kernels before and after.
    """
    optimizer = optimizer_of(trainee, 1e-4, device)

    def run(index: int) -> None:
        step(trainee, optimizer, batch_of(cell, index, device), device)
        optimizer.zero_grad(set_to_none=True)

    for index in range(warmup):
        run(index)
    plain = _timed(run, range(warmup, warmup + steps))
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        seen = _timed(run, range(warmup, warmup + steps))
    spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    ran = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    for event in ran:
        spent[event.name][0] += 1 / steps
        spent[event.name][1] += event.device_time / 1e3 / steps
    kernels = sorted(((name, *values) for name, values in spent.items()), key=lambda row: -row[2])
    gaps = gaps_of([(event.name, event.time_range.start, event.time_range.end) for event in ran])
    return {
        "wall_ms": plain, "profiled_wall_ms": seen, "kinds": by_kind(kernels), "kernels": kernels,
        "gaps": [(name, calls / steps, spent / 1e3 / steps) for name, calls, spent in gaps],
    }  # fmt: skip


def gaps_of(kernels: Iterable[tuple[str, float, float]]) -> list[tuple[str, int, float]]:
    """Return the times in which none of the kernels (name, start, end) ran: the names around, how often, how long.

    Those that took most time in all come first. Copies to and from the host are not waited for here: they run beside.
    """
    found: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    before, until = None, 0.0
    for name, start, end in sorted(kernels, key=lambda kernel: kernel[1]):
        if "Memcpy" in name and "DtoD" not in name:
            continue
        if before is not None and start > until:
            place = f"{before[:60]} ... {name[:60]}"
            found[place][0] += 1
            found[place][1] += start - until
        if before is None or end > until:
            before, until = name, end
    return sorted(((name, *values) for name, values in found.items()), key=lambda row: -row[2])


def by_kind(kernels: Iterable[tuple[str, float, float]]) -> Mapping[str, float]:
    """Return the milliseconds of each kind, most first."""
    total: dict[str, float] = defaultdict(float)
    for name, _, spent in kernels:
        total[kind_of(name)] += spent
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def _timed(run: Any, indices: range) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    for index in indices:
        run(index)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / len(indices) * 1e3


def main() -> None:
    """Profile one arm on one cell and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arm", default="fastft")
    for name, default in (("shape", "llama-8b"), ("mode", "nf4")):
        parser.add_argument(f"--{name}", default=default)
    for name, default in (("batch", 4), ("length", 4096), ("layers", 0), ("warmup", 3), ("steps", 3), ("rows", 30)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", default="", help="also write everything to this file")
    given = parser.parse_args()
    cell = Cell(given.shape, given.mode, given.batch, given.length, layers=given.layers)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arm = find_arm(given.arm)

    trainee = importlib.import_module(arm.module).prepare(Task(given.arm, cell), arm.options, device)
    found = profile(trainee, cell, device, given.warmup, given.steps)
    print(f"{given.arm}, {cell.name}: {found['wall_ms']:.2f} ms a step, GPU busy {sum(found['kinds'].values()):.2f} ms")
    for kind, spent in found["kinds"].items():
        print(f"  {spent:9.3f} ms  {kind}")
    for name, calls, spent in found["kernels"][: given.rows]:
        print(f"  {spent:9.3f} ms {calls:8.1f} x {spent / calls * 1e3:9.1f} us  {name[:110]}")
    print(f"  {sum(spent for *_, spent in found['gaps']):9.3f} ms  no kernel ran")
    for name, calls, spent in found["gaps"][: given.rows]:
        print(f"  {spent:9.3f} ms {calls:8.1f} x {spent / calls * 1e3:9.1f} us  {name}")
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump({"cell": cell.name, "arm": given.arm, **found}, file)


if __name__ == "__main__":
    main()
