"""The process of one arm: prepares it, runs its steps, and writes what it measured as one JSON object.

python -m benchmarks.measure TASK.json RESULT.json
"""

import importlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

from attrs import define, evolve, field

from benchmarks.arms import FOLDER, REFERENCE, Trainee, find_arm
from benchmarks.cells import Cell, Task, task_from
from benchmarks.machine import Clocks, versions
from fastft.memory.measure import host_peak

BUCKETS = 4096
PIECE = 2**24
# Its value decides how memory is divided into blocks, and some arms set it themselves.
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@define
class Steps:
    """What the loop saw: seconds and loss of every step, and the gradient of the first: norm and sketch."""

    seconds: list[float] = field(factory=list)
    losses: list[float] = field(factory=list)
    norm: float = math.nan
    sketch: list[float] = field(factory=list)
    graphs_first: int = 0


def main() -> None:
    """Run the task in the file named first and write its result to the file named second."""
    task, target = task_from(json.loads(Path(sys.argv[1]).read_text("utf-8"))), Path(sys.argv[2])
    for result in results(task):
        whole = target.with_suffix(".part")
        whole.write_text(json.dumps(result), encoding="utf-8")
        whole.replace(target)


def run(task: Task) -> dict[str, Any]:
    """Return the arm's whole result."""
    return list(results(task))[-1]


def results(task: Task) -> Iterator[dict[str, Any]]:
    """Yield the arm's result: `status` "ok" with all metrics; with each of the `longer` cells anew, those in a list.

    The arm `FOLDER` writes the model's folder instead.
    """
    if task.arm == FOLDER:
        yield write_folder(task)
        return
    arm = find_arm(task.arm)
    began = time.perf_counter()
    prepare = importlib.import_module(arm.module).prepare
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    trainee = prepare(task, arm.options, device)
    release(device)
    base = allocated(device)
    built = time.perf_counter() - began
    if task.arm == REFERENCE:
        yield judge(task, trainee, device)
        return
    facts = {"base_gb": base, "build_s": round(built, 2), "versions": versions()}
    trained = [weight for weight in trainee.model.parameters() if weight.requires_grad and task.longer]
    first = [(weight, weight.detach().to("cpu", copy=True)) for weight in trained]
    result = {**measured(task, trainee, device), **facts}
    yield result
    longer: list[dict[str, Any]] = []
    for one in measured_longer(task, trainee, first, device):
        longer.append(one)
        yield {**result, "longer": longer}


def measured_longer(task: Task, trainee: Trainee, first: Sequence[Any], device: str) -> Iterator[dict[str, Any]]:
    """Yield what is measured of the cells of `longer`, each from the weights of `first`, pairs of weight and value.

    The first that runs out of memory is the last to run.
    """
    import torch

    spent = None
    for cell in task.longer:
        with torch.no_grad():
            for weight, value in first:
                weight.copy_(value)
        try:
            yield spent or measured(evolve(task, cell=cell), trainee, device)
        except torch.OutOfMemoryError as error:
            spent = {"status": "out of memory", "reason": str(error).splitlines()[0]}
            trainee.model.zero_grad(set_to_none=True)
            yield spent


def measured(task: Task, trainee: Trainee, device: str) -> dict[str, Any]:
    """Return all that is measured in the steps of one cell."""
    import torch

    steps, clocks = train(task, trainee, device)
    memory = {
        "peak_gb": gigabytes(torch.cuda.max_memory_allocated()) if device == "cuda" else None,
        "reserved_gb": gigabytes(torch.cuda.max_memory_reserved()) if device == "cuda" else None,
        "host_peak_gb": gigabytes(host_peak()),
        "allocator": next((os.environ[name] for name in ALLOCATOR if name in os.environ), ""),
    }
    return {
        "status": "ok", **figures(task, trainee, steps, device), **memory, "clocks": clocks, "facts": trainee.facts(),
    }  # fmt: skip


def write_folder(task: Task) -> dict[str, Any]:
    """Write the cell's model as a folder in 16 bits."""
    import torch

    from benchmarks.weights import save

    save(task.cell, "cuda" if torch.cuda.is_available() else "cpu", Path(task.folder))
    return {"status": "ok"}


def judge(task: Task, trainee: Trainee, device: str) -> dict[str, Any]:
    """Return loss, gradient norm and sketch of the first batch in fp32, and under `eager` those under bf16 autocast.

    Under `eager_fp8`, where the task wants them, those with fp8 factors besides. Those of `longer` are a list there.
    """
    import torch

    from benchmarks.batches import batch_of
    from benchmarks.truth import no_tf32, widen, with_fp8_factors

    def seen(cell: Cell) -> dict[str, Any]:
        loss = trainee.loss(batch_of(cell, 0, device)).item()
        norm, sketch = gradient_norm(trainee.model), gradient_sketch(trainee.model)
        trainee.model.zero_grad(set_to_none=True)
        return {"loss0": loss, "grad_norm0": norm, "sketch": sketch}

    no_tf32()
    cells = (task.cell, *task.longer)
    with torch.autocast(device, dtype=torch.bfloat16):
        found = [{"eager": seen(cell)} for cell in cells]
        if task.fp8:
            with with_fp8_factors(trainee.model):
                found = [{**before, "eager_fp8": seen(cell)} for before, cell in zip(found, cells)]
    widen(trainee.model)
    judged, *longer = ({"status": "ok", **seen(cell), **rounded} for cell, rounded in zip(cells, found))
    return {**judged, **({"longer": longer} if longer else {})}


def train(task: Task, trainee: Trainee, device: str) -> tuple[Steps, dict[str, float] | None]:
    """Run warm-up and timed steps. Clocks are those of the timed ones, peak memory that of all steps but the first.

    The first compiles; a later one may record what the others replay, and that memory stays taken.
    """
    from benchmarks.batches import batch_of
    from benchmarks.stepping import optimizer_of, step

    optimizer = optimizer_of(trainee, 1e-5 if task.cell.mode == "full" else 1e-4, device)
    steps, clocks = Steps(), Clocks()
    for index in range(task.warmup + task.steps):
        batch = batch_of(task.cell, index, device)
        if index == min(1, task.warmup - 1):
            release(device)  # the pool is filled anew, without what compiling needed
        if index == task.warmup:
            clocks.start()
        synchronize(device)
        began = time.perf_counter()
        loss = step(trainee, optimizer, batch, device)
        synchronize(device)
        steps.seconds.append(time.perf_counter() - began)
        if index == 0:
            steps.norm, steps.sketch = gradient_norm(trainee.model), gradient_sketch(trainee.model)
        optimizer.zero_grad(set_to_none=True)
        steps.losses.append(loss.item())
        del loss  # with its autograd graph, as a trainer lets go of it
        if index == 0:
            steps.graphs_first = graphs()
    return steps, clocks.stop()


def figures(task: Task, trainee: Trainee, steps: Steps, device: str) -> dict[str, Any]:
    """Return speed, first step, recompilations, and what parity is judged by."""
    import torch

    from fastft.train.flops import peak_flops

    timed = sorted(steps.seconds[task.warmup :])
    median = statistics.median(timed)
    counts, work = mean_counts(task, trainee)
    peak = peak_flops(device, torch.bfloat16)
    return {
        "tokens_per_second": round(task.cell.tokens / median, 1),
        "non_padding_per_second": round(counts["non_padding"] / median, 1),
        "loss_bearing_per_second": round(counts["loss_bearing"] / median, 1),
        "step_ms": round(median * 1e3, 3),
        "step_p95_ms": round(timed[math.ceil(0.95 * len(timed)) - 1] * 1e3, 3),
        "mfu": round(work / median / peak, 4) if peak else None,
        "tflop_per_step": round(work / 1e12, 6),
        "first_step_s": round(steps.seconds[0], 2),
        "graphs": graphs(),
        "recompilations": graphs() - steps.graphs_first,
        "loss0": steps.losses[0],
        "grad_norm0": steps.norm,
        "sketch": steps.sketch,
        "last_loss": steps.losses[-1],
        "losses": [float(f"{loss:.7g}") for loss in steps.losses],
    }


def mean_counts(task: Task, trainee: Trainee) -> tuple[Mapping[str, float], float]:
    """Return a timed batch's mean counts of tokens, and the operations that a step of them needs."""
    from benchmarks.batches import batch_of
    from fastft.train.flops import count_batch, flops, work_of
    from fastft.train.step import shifted_labels

    work = work_of(trainee.model)
    totals: dict[str, float] = {}
    for index in range(task.warmup, task.warmup + task.steps):
        batch = batch_of(task.cell, index, "cpu")
        for name, count in count_batch(batch, shifted_labels(batch), set(work.windows)).items():
            totals[name] = totals.get(name, 0.0) + float(count) / task.steps
    return totals, flops(work, totals)


def gradient_norm(model: Any) -> float:
    """Return the norm of all gradients; the squares of each piece are summed in fp32, the pieces in fp64."""
    import torch

    norms = [torch.linalg.vector_norm(piece.float()) for _, gradient in gradients(model) for piece in gradient]
    return torch.stack(norms).double().square().sum().sqrt().item()


def gradients(model: Any) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield each gradient, flat and in pieces of `PIECE` elements, under a name that is the same in every arm."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            place = name[name.find("layers.") :] if "layers." in name else name.split("model.")[-1]
            yield place, parameter.grad.detach().flatten().split(PIECE)


def gradient_sketch(model: Any) -> list[float]:
    """Return the gradient's count sketch: every element, with a random sign, added to one of `BUCKETS` at random.

    The relative L2 difference of two sketches is that of the gradients, to within a few per cent of itself (Charikar,
    Chen, Farach-Colton 2002). Signs and buckets follow from the parameters' names, so they are the same in every arm.
    """
    import torch

    total = None
    for place, pieces in gradients(model):
        generator = torch.Generator(pieces[0].device).manual_seed(crc32(place.encode()))
        for piece in pieces:
            codes = torch.randint(0, 2 * BUCKETS, piece.shape, generator=generator, device=piece.device)
            total = torch.zeros(BUCKETS, device=piece.device, dtype=torch.float64) if total is None else total
            total.index_add_(0, codes // 2, piece.double() * (1 - 2 * (codes % 2)))
    return [] if total is None else [float(f"{value:.6g}") for value in total.tolist()]


def graphs() -> int:
    """Return how many graphs Dynamo has compiled in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def release(device: str) -> None:
    """Give the allocator's unused blocks back and count its peaks from here."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def allocated(device: str) -> float | None:
    """Return the GB (10^9 bytes) allocated on the device, None on a CPU."""
    import torch

    return gigabytes(torch.cuda.memory_allocated()) if device == "cuda" else None


def gigabytes(count: int) -> float:
    """Return bytes as GB, 10^9 bytes, to a thousandth."""
    return round(count / 1e9, 3)


def synchronize(device: str) -> None:
    """Wait for the device."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
