"""Importance matrices: how much each column of a weight counts, from what the layers' inputs hold on calibration text.

Rounding a weight changes a layer's output by the error times the input, so the mean square of an input column says how
much errors in that column of the weight cost. llama.cpp keeps the sums of squares and the number of tokens, by GGUF's
tensor names; fastft reads and writes its two file formats, and computes the same sums by its own forward pass.
"""

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import frozen
from torch import Tensor, nn

from fastft.errors import LoadError, Problem, UsageError
from fastft.export.gguf.file import FileWriter, Value, read_gguf, tensor_entry, text, u32
from fastft.train.checkpoint import write_file

_SUMS, _COUNTS = ".in_sum2", ".counts"
_CHUNK = 512  # tokens


@frozen(eq=False)
class Entry:
    """Of one weight: sums of squares, and how many tokens went into them."""

    sums: Tensor  # fp32 [matrices, columns], one matrix an expert
    counts: Tensor  # fp32 [matrices] or [1]

    def mean(self) -> Tensor:
        """Return the mean squares, fp32 [matrices, columns]; 1 in an expert that no token reached."""
        counts = self.counts[:, None]
        return torch.where(counts > 0, self.sums / counts, 1.0)


@frozen(eq=False)
class ImportanceMatrix:
    """The entries by GGUF's tensor names, how the text was cut, and where it came from."""

    entries: Mapping[str, Entry]
    chunks: int
    chunk_size: int
    datasets: tuple[str, ...] = ()

    def importance(self) -> dict[str, Tensor]:
        """Return what `export_gguf(..., importance=...)` takes: fp32 [columns], or [experts, columns], by tensor."""
        return {name: mean[0] if len(mean := entry.mean()) == 1 else mean for name, entry in self.entries.items()}


# -- computing ---------------------------------------------------------------------------------------------------------


def calibration_chunks(tokenizer: Any, texts: Iterable[str], length: int = _CHUNK) -> Iterator[Tensor]:
    """Yield int64 [1, length] pieces of the texts, tokenised and joined; an incomplete last piece is left out.

    Raises `UsageError` where the texts are too short for one piece.
    """
    held: list[int] = []
    pieces = 0
    for content in texts:
        held += tokenizer(content)["input_ids"]
        while len(held) >= length:
            yield torch.tensor([held[:length]])
            held, pieces = held[length:], pieces + 1
    if not pieces:
        raise UsageError(Problem("texts", f"{len(held)} tokens", f"at least {length} tokens of calibration text"))


@torch.no_grad()
def collect(
    model: nn.Module,
    chunks: Iterable[Tensor],
    names: Mapping[str, str] | None = None,
    datasets: Iterable[str] = (),
) -> ImportanceMatrix:
    """Run chunks of token ids, int64 [batch, length], through a model, and sum the squares of all linear inputs.

    names: GGUF's tensor name for every module whose input counts; found from the model's family if left out. The model
    is in eval mode while it runs, with the adapters it has active. Embeddings have no entry (llama.cpp's have none
    either), nor have experts whose weights are no linear layers. Raises `UsageError` for NaN or infinity in an input.
    """
    names = linear_names(model) if names is None else names
    modules = dict(model.named_modules())
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(names.values(), 0)
    handles = [modules[module].register_forward_pre_hook(_adding(name, sums, counts)) for module, name in names.items()]
    was_training, size, number = model.training, 0, 0
    device = next(model.parameters()).device
    try:
        model.eval()
        for chunk in chunks:
            model(input_ids=chunk.to(device), use_cache=False)
            size, number = chunk.shape[-1], number + chunk.shape[0]
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    if not number:
        raise UsageError(Problem("chunks", "none", "at least one chunk of token ids"))
    wrong = [name for name, total in sums.items() if not bool(total.isfinite().all())]
    if wrong:
        raise UsageError(*(f"{name}: its inputs hold NaN or infinity on this text" for name in wrong))
    entries = {
        name: Entry(total.float().cpu()[None], torch.tensor([float(counts[name])])) for name, total in sums.items()
    }
    return ImportanceMatrix(entries, number, size, tuple(datasets))


def _adding(name: str, sums: dict[str, Tensor], counts: dict[str, int]) -> Callable[..., None]:
    def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
        squares = x.float().square().sum(0).double()
        sums[name] = sums[name] + squares if name in sums else squares
        counts[name] += len(x)

    return add


def linear_names(model: nn.Module) -> dict[str, str]:
    """Return GGUF's tensor names of a model's linear layers by module name, adapters' own matrices left out.

    The output layer is among them only where it is not tied to the embedding. Raises `UsageError` for a model family
    without a spec.
    """
    from fastft.export.gguf.tensors import gguf_name
    from fastft.export.weights import weight_source
    from fastft.registry.resolve import find

    source = weight_source(model)
    spec = source.state.spec or find(source.config)
    if spec is None:
        raise UsageError(f"{source.config.model_type!r}: fastft has no spec for this family; give `names`")
    config = source.config.get_text_config()
    found = {}
    for path, module in model.named_modules():
        if not hasattr(module, "in_features") or ".lora_" in path:
            continue
        weight = path.removeprefix("base_model.model.").replace(".base_layer", "") + ".weight"
        name = gguf_name(config, spec, weight)
        if name and (name.startswith("blk.") or (name == "output.weight" and not config.tie_word_embeddings)):
            found[path] = name
    return _outermost(found)


def _outermost(found: dict[str, str]) -> dict[str, str]:
    """Keep one module for each tensor: of an adapter's layer and the layer inside, the one inside."""
    by_name = {name: path for path, name in sorted(found.items(), key=lambda item: len(item[0]))}
    return {path: name for name, path in by_name.items()}


# -- files -------------------------------------------------------------------------------------------------------------


def save_imatrix(matrix: ImportanceMatrix, path: str | Path) -> Path:
    """Write llama.cpp's file: the older format for a name that ends in ".dat", the GGUF-based one otherwise.

    Raises `SaveError`; then what stood under the name is untouched.
    """
    path = Path(path)
    if path.suffix == ".dat":
        return _save_dat(matrix, path)
    parts: dict[str, np.ndarray] = {}
    for name in sorted(matrix.entries):
        entry = matrix.entries[name]
        parts[name + _SUMS] = entry.sums.float().contiguous().numpy()
        parts[name + _COUNTS] = entry.counts.float().reshape(-1, 1).contiguous().numpy()
    metadata = {
        "general.type": text("imatrix"),
        "imatrix.datasets": Value("str", list(matrix.datasets)),
        "imatrix.chunk_count": u32(matrix.chunks),
        "imatrix.chunk_size": u32(matrix.chunk_size),
    }
    entries = [tensor_entry(name, data.shape, "f32") for name, data in parts.items()]
    with FileWriter(path, metadata, entries) as file:
        for name, data in parts.items():
            file.write(name, data)
        return file.finish()


def _save_dat(matrix: ImportanceMatrix, path: Path) -> Path:
    size = max(matrix.chunk_size, 1)
    parts = [struct.pack("<i", len(matrix.entries))]
    for name in sorted(matrix.entries):
        entry = matrix.entries[name]
        calls = -(-int(entry.counts.max()) // size)
        values = (entry.mean() * calls).float().contiguous().numpy().tobytes()
        label = name.encode()
        parts += [struct.pack("<i", len(label)), label, struct.pack("<ii", calls, len(values) // 4), values]
    dataset = (matrix.datasets[-1] if matrix.datasets else "").encode()
    parts.append(struct.pack("<ii", matrix.chunks, len(dataset)) + dataset)
    write_file(path, lambda temporary: temporary.write_bytes(b"".join(parts)))
    return path


def load_imatrix(path: str | Path) -> ImportanceMatrix:
    """Read an importance matrix in either of llama.cpp's formats.

    The older format holds means, so its counts are 1. Raises `LoadError` for a file that is missing, damaged, cut
    short, or no importance matrix, and for numbers that are negative, NaN or infinite.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(4)
        matrix = _load_gguf(path) if start == b"GGUF" else _load_dat(path, path.read_bytes())
    except LoadError:
        raise
    except OSError as error:
        raise LoadError(f"{path}: cannot be read ({error.strerror or error})") from error
    wrong = [name for name, entry in matrix.entries.items() if not _sound(entry.mean())]
    if wrong or not matrix.entries:
        why = f"{wrong[0]} holds negative, NaN or infinite numbers" if wrong else "it has no entries"
        raise LoadError(f"{path}: {why}; compute the importance matrix anew")
    return matrix


def _sound(mean: Tensor) -> bool:
    return bool((mean.isfinite() & (mean >= 0)).all())


def _load_gguf(path: Path) -> ImportanceMatrix:
    file = read_gguf(path)
    entries, lone = {}, set()
    for name in file.tensors:
        base = name.removesuffix(_SUMS).removesuffix(_COUNTS)
        pair = [file.tensors.get(base + end) for end in (_SUMS, _COUNTS)]
        if base == name or any(part is None or part.type != "f32" for part in pair):
            lone.add(name)
        elif name.endswith(_SUMS):
            counts = _floats(file.data(base + _COUNTS))
            entries[base] = Entry(_floats(file.data(name)).view(len(counts), -1), counts)
    if lone:
        raise LoadError(f"{path}: {min(lone)} has no sums and counts in f32 beside it; this is no importance matrix")
    meta = file.metadata
    numbers = (int(meta.get(f"imatrix.{key}", 0)) for key in ("chunk_count", "chunk_size"))
    return ImportanceMatrix(entries, *numbers, tuple(meta.get("imatrix.datasets", ())))


def _floats(data: Any) -> Tensor:
    return torch.from_numpy(np.frombuffer(data.tobytes(), dtype="<f4").copy())


def _load_dat(path: Path, data: bytes) -> ImportanceMatrix:
    place = 0

    def take(count: int) -> bytes:
        nonlocal place
        if count < 0 or place + count > len(data):
            raise LoadError(f"{path}: cut short, or no importance matrix ({count} bytes expected at byte {place})")
        place += count
        return data[place - count : place]

    def number() -> int:
        return struct.unpack("<i", take(4))[0]

    entries = {}
    for _ in range(number()):
        name = take(number()).decode("utf-8", "replace")
        calls, values = number(), number()
        sums = _floats(np.frombuffer(take(4 * values), dtype=np.uint8))
        entries[name] = Entry((sums / calls if calls > 0 else sums)[None], torch.ones(1))
    if place == len(data):  # written before the trailer existed
        return ImportanceMatrix(entries, 0, 0)
    chunks = number()
    dataset = take(number()).decode("utf-8", "replace")
    return ImportanceMatrix(entries, chunks, 0, (dataset,) if dataset else ())
