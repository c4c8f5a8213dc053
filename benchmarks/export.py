"""`scripts/bench_export`: exports a random model to GGUF with the quantisers on the device, and judges what came out.

The checkpoint is made by a process of its own, so that the memory measured is the export's.
"""

import argparse
import json
import math
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from attrs import asdict, define

from benchmarks.machine import commit, device, versions
from benchmarks.shapes import SHAPES, shape_of
from fastft.memory.measure import host_peak

ROOT = Path(__file__).parents[1]
SHARD = 2 * 10**9  # bytes
WRITERS = 4  # threads, a shard each
# What is compared with the CPU's quantiser: rows of every tensor outside the layers, and of those of some layers.
SAMPLED_ROWS = 64
SAMPLED_LAYERS = 6
MODEL = "model"
OUTPUT = "gguf"


def main() -> int:
    """Make the checkpoint, export it, judge the file, print one JSON line. 0: all as it must be, 2: not."""
    args = arguments()
    with tempfile.TemporaryDirectory(prefix="bench-export-", dir=args.work) as work:
        folder = Path(work)
        made = _in_own_process(make_checkpoint, args.shape, args.layers, folder / MODEL)
        print(f"checkpoint: {json.dumps(made)}", file=sys.stderr, flush=True)
        result = measure(folder, args.quant, args.device, args.cold)
    told = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "shape": args.shape, "layers": args.layers,
        "quant": args.quant, "cold": args.cold, **result, "checkpoint": made,
        "machine": device() | {"processors": os.cpu_count()}, "versions": versions(),
        "commit": args.commit or commit(ROOT),
    }  # fmt: skip
    print(json.dumps(told), flush=True)
    return 0 if result["blocks_differing"] == 0 and result["no_16_bit_file"] else 2


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="scripts/bench_export", description=main.__doc__)
    parser.add_argument("--shape", default="llama-8b", choices=[name for name in SHAPES if name.startswith(("l", "t"))])
    parser.add_argument("--layers", type=int, default=0, help="instead of the shape's own")
    parser.add_argument("--quant", default="q4_k_m")
    parser.add_argument("--device", help="of the quantisers; by default a GPU if there is one")
    parser.add_argument("--work", help="folder for the checkpoint and the file, which are removed afterwards")
    parser.add_argument("--cold", action="store_true", help="take the checkpoint out of the system's file cache first")
    parser.add_argument("--commit", help="to be named in the result, where there is no git")
    return parser.parse_args()


def _in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


# The checkpoint -------------------------------------------------------------------------------------------------------


def make_checkpoint(shape_name: str, layers: int, folder: Path) -> dict[str, Any]:
    """Write a bf16 model with normal weights (0.02; norms about 1) and a tokenizer; returns bytes, seconds, shards."""
    import torch
    import transformers
    from accelerate import init_empty_weights

    from benchmarks.weights import SPECIAL_TOKENS, TOKENIZER_FILES
    from fastft.demo import MODEL_FOLDER

    began = time.perf_counter()
    shape = shape_of(shape_name, layers)
    config = getattr(transformers, shape.config_class)(**shape.fields, **SPECIAL_TOKENS, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    with init_empty_weights():
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}  # tied ones once
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (Path(MODEL_FOLDER) / name).exists():
            shutil.copy(Path(MODEL_FOLDER) / name, folder / name)
    shards = list(_shards(shapes))
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    place = "cuda" if torch.cuda.is_available() else "cpu"
    torch.zeros(1, device=place)
    started = time.perf_counter()
    with ThreadPoolExecutor(WRITERS) as pool:
        sizes = list(pool.map(_write_shard, (folder / name for name in names), shards, [place] * len(shards)))
    index = {name: file for file, part in zip(names, shards) for name in part}
    text = json.dumps({"metadata": {"total_size": sum(sizes)}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    ended = time.perf_counter()
    seconds = {"seconds": round(ended - began, 2), "of_writing": round(ended - started, 2)}
    return {"bytes": sum(sizes), "shards": len(shards)} | seconds


def _shards(shapes: Mapping[str, Sequence[int]]) -> Iterator[dict[str, Sequence[int]]]:
    part: dict[str, Sequence[int]] = {}
    size = 0
    for name, shape in shapes.items():
        part[name] = shape
        size += _bytes_of(shape)
        if size >= SHARD:
            yield part
            part, size = {}, 0
    if part:
        yield part


def _bytes_of(shape: Sequence[int]) -> int:
    return 2 * math.prod(shape)


def _write_shard(path: Path, shapes: Mapping[str, Sequence[int]], place: str) -> int:
    import torch

    from benchmarks.weights import NORM_SPREAD, SPREAD, draw
    from fastft.export.tensorfile import TensorFile

    with TensorFile(path, {name: (torch.bfloat16, shape) for name, shape in shapes.items()}) as file:
        for name, shape in shapes.items():
            mean, spread = (1.0, NORM_SPREAD) if len(shape) == 1 else (0.0, SPREAD)
            file.add(name, draw(name, shape, place, spread, mean).to(torch.bfloat16))
    return sum(map(_bytes_of, shapes.values()))


# The export -----------------------------------------------------------------------------------------------------------


def measure(work: Path, quant: str, place: str | None, cold: bool) -> dict[str, Any]:
    """Return what the export of the checkpoint in `work` took, and how many sampled blocks differ from the CPU's."""
    import torch

    import fastft

    reading = _reading_speed(work / MODEL)
    if cold:
        for path in (work / MODEL).iterdir():
            _forget(path)
    cuda = torch.cuda.is_available() and place != "cpu"
    if cuda:
        torch.zeros(1, device="cuda")
        torch.cuda.reset_peak_memory_stats()
    with watched(work) as seen:
        began, processor = time.perf_counter(), time.process_time()
        report = fastft.export_gguf(work / MODEL, folder=work / OUTPUT, quants=[quant], device=place, progress=False)
        wall, processor = time.perf_counter() - began, time.process_time() - processor
    file = report.files[0]
    found = sorted(path.relative_to(work).as_posix() for path in (work / OUTPUT).iterdir())
    judging = time.perf_counter()
    compared, differing = compare(work / MODEL, file.path)
    return {
        "wall_s": round(wall, 2),
        "processor_s": round(processor, 2),
        "phases_s": {name: round(seconds, 2) for name, seconds in asdict(report.phases).items()},
        "file_bytes": file.size,
        "types": dict(file.types),
        "gpu_peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3) if cuda else None,
        "host_peak_anonymous_gb": round(seen.anonymous / 1e9, 3),
        "host_peak_resident_gb": round(seen.resident / 1e9, 3),
        "host_before_gb": round(seen.before / 1e9, 3),
        "files": found,
        "folder_grew_at_most_bytes": seen.folder,
        "disk_grew_at_most_bytes": seen.disk,
        "no_16_bit_file": found == [f"{OUTPUT}/{file.path.name}"] and seen.folder <= file.size,
        "blocks_compared": compared,
        "blocks_differing": differing,
        "comparing_s": round(time.perf_counter() - judging, 2),
        "process_peak_gb": round(host_peak() / 1e9, 3),
        "reading_gb_s": reading,
    }


def _forget(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _reading_speed(folder: Path) -> dict[str, float | None]:
    """Return GB/s of reading the start of the last shard plainly, and of a large tensor from the first onto the GPU."""
    import torch
    from safetensors import safe_open

    path = sorted(folder.glob("*.safetensors"))[-1]
    began = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        data = file.read(2**30)
    plain = len(data) / (time.perf_counter() - began) / 1e9
    if not torch.cuda.is_available():
        return {"plain": round(plain, 2), "mapped_to_gpu": None}
    torch.zeros(1, device="cuda")
    path = sorted(folder.glob("*.safetensors"))[0]
    with safe_open(path, framework="pt", device="cuda") as shard:
        name = max(shard.keys(), key=lambda key: _bytes_of(shard.get_slice(key).get_shape()))
        began = time.perf_counter()
        tensor = shard.get_tensor(name)
        torch.cuda.synchronize()
    mapped = tensor.numel() * 2 / (time.perf_counter() - began) / 1e9
    return {"plain": round(plain, 2), "mapped_to_gpu": round(mapped, 2)}


@define
class Seen:
    """The most bytes seen while something ran: memory of this process, growth of a folder and of the disk's use."""

    before: int
    resident: int = 0
    anonymous: int = 0
    folder: int = 0
    disk: int = 0


@contextmanager
def watched(folder: Path) -> Iterator[Seen]:
    """Watch this process, `folder` and its disk every 20 ms."""
    free, size = shutil.disk_usage(folder).free, _size(folder)
    seen, done = Seen(_memory()["RssAnon"]), threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            now = _memory()
            seen.resident = max(seen.resident, now["VmRSS"])
            seen.anonymous = max(seen.anonymous, now["RssAnon"])
            seen.folder = max(seen.folder, _size(folder) - size)
            seen.disk = max(seen.disk, free - shutil.disk_usage(folder).free)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def _size(folder: Path) -> int:
    """Return the bytes of the files below `folder`; one that is renamed meanwhile may be missed."""
    size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                size += os.stat(os.path.join(place, name)).st_size
    return size


def _memory() -> dict[str, int]:
    """Return this process's resident bytes: VmRSS with mapped files, RssAnon without (0 where it is not told)."""
    rows = (line.split() for line in Path("/proc/self/status").read_text("ascii").splitlines())
    told = {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if row and row[0] in ("VmRSS:", "RssAnon:")}
    return {"VmRSS": 0, "RssAnon": 0} | told


def compare(model: Path, path: Path) -> tuple[int, int]:
    """Return how many blocks of the file were compared with the CPU's quantiser, and how many differ.

    Some rows of a tensor: the first, the last, and others evenly between; of the layers likewise.
    """
    import torch

    from fastft.export.gguf.export import _plan, family
    from fastft.export.gguf.file import read_gguf
    from fastft.export.gguf.quants import gguf_type, quantize
    from fastft.export.weights import weight_source

    source, stored = weight_source(model), read_gguf(path)
    layers = source.config.num_hidden_layers
    some = torch.linspace(0, layers - 1, min(SAMPLED_LAYERS, layers)).round().int().tolist()
    compared = differing = 0
    for tensor in _plan(source, family(model))[1]:
        layer = re.match(r"blk\.(\d+)\.", tensor.name)
        if layer and int(layer[1]) not in some:
            continue
        entry = stored.tensors[tensor.name]
        kind = gguf_type(entry.type)
        values = tensor.read()
        values = values.reshape(-1, values.shape[-1])
        rows = torch.linspace(0, len(values) - 1, min(SAMPLED_ROWS, len(values))).round().long()
        held = torch.from_numpy(stored.data(tensor.name)).view(len(values), -1)[rows]
        expected = quantize(values[rows], kind)
        wrong = (held != expected).view(-1, kind.type_size).any(1)
        compared, differing = compared + wrong.numel(), differing + int(wrong.sum())
    return compared, differing


if __name__ == "__main__":
    sys.exit(main())
