"""Merge: write a trained model as one plain checkpoint, or its adapter alone."""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import asdict, field, frozen
from torch import Tensor

from fastft.errors import Problem, SaveError, UsageError, did_you_mean
from fastft.export import companions
from fastft.export.encode import DENSE, PRECISIONS, Encoding, Planned, decode, planned_bytes
from fastft.export.place import check_target, new_folder
from fastft.export.tensorfile import TensorFile
from fastft.export.weights import Weight, WeightSource, weight_source
from fastft.given import refuse_export
from fastft.model import files

SHARD_BYTES = 5 * 10**9
_ALIASES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "4bit": "nf4", "int4": "nf4"}
_CHUNK = 2**18  # numbers that are compared at once


@frozen
class Change:
    """What adapters did to one weight: the largest and the mean magnitude of its change, and that relative to it.

    `relative` is the norm of the change over the norm of the base weight.
    """

    module: str
    largest: float
    mean: float
    relative: float


@frozen
class MergeReport:
    """What `merge` wrote. `rounding` is the largest relative error (norm) that the precision brought to a weight."""

    folder: Path
    precision: str
    base: str
    files: tuple[str, ...]
    bytes: int
    changes: tuple[Change, ...]
    rounding: float
    seconds: float
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return {**asdict(self), "folder": str(self.folder), "files": list(self.files), "notes": list(self.notes)}

    def __str__(self) -> str:
        lines = [
            f"{self.folder}: merged in {self.precision}, base {self.base}, {self.bytes / 1e9:.2f} GB in "
            f"{len(self.files)} file{'s' * (len(self.files) != 1)}, {self.seconds:.1f} s",
            f"  relative rounding error of a weight: at most {self.rounding:.1e}",
        ]
        if self.changes:
            most = max(self.changes, key=lambda change: change.largest)
            mean = sum(change.mean for change in self.changes) / len(self.changes)
            relative = max(change.relative for change in self.changes)
            lines.append(
                f"  changed by adapters: {len(self.changes)} weights, by {mean:.2e} in the mean, at most by "
                f"{most.largest:.2e} ({most.module}), relative change at most {relative:.1e}"
            )
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def merge(
    model: Any,
    folder: str | Path,
    precision: str = "bf16",
    base: str = "dequantised",
    tokenizer: Any = None,
    shard_bytes: int = SHARD_BYTES,
) -> MergeReport:
    """Write base and adapters of `model` (or of a folder) as one plain checkpoint into `folder`.

    * `precision`: "bf16", "fp16", "fp32"; "nf4" (bitsandbytes, double quantisation) or "fp8" (e4m3, compressed-tensors
      layout: a scale for each output of a linear layer, its inputs quantised while the model runs). Sums are taken in
      fp32 and rounded once. nf4 and fp8 leave head, embeddings and norms in 16 bits.
    * `base`: "dequantised" merges into the numbers that training saw; "original" into the 16-bit checkpoint from which
      an NF4 or int8 model was loaded (see `fastft.export.weights.weight_source`).
    * `tokenizer`: by default the one that was loaded with the model. It is written beside the weights, with the chat
      template and the generation config.

    The model itself is not changed. Tensors are read, merged and written one at a time, in files of `shard_bytes`. The
    folder appears when it is whole; an export that is there is replaced then. Raises `UsageError` and `SaveError`: too
    little room on the disk (told before anything is written), NaN or infinity, a number too large for fp16.
    """
    refuse_export(model, tokenizer, folder)
    precision = chosen_precision(precision)
    started = time.monotonic()
    folder = Path(folder).expanduser()
    check_target(folder, companions.read_from(None, model))  # before weights are loaded
    source = weight_source(model, base)
    encoding = Encoding(precision, DENSE.get(precision) or _half(source))
    if encoding.quantises and any(".experts." in name for name in source.names):
        remedy = "Merge with 'bf16' and quantise with the tool of the place of use."
        raise UsageError(Problem("precision", precision, "'bf16', 'fp16' or 'fp32' for a mixture of experts", remedy))
    chosen = quantised_names(source) if encoding.quantises else frozenset()
    plans = {n: encoding.planned(n, w.shape, n in chosen) for n, w in source.weights.items()}
    shards = _shards(plans, shard_bytes)
    size = sum(planned_bytes(plan) for plan in plans.values())
    notes = list(source.notes)
    if not any(weight.adapted for weight in source.weights.values()):
        notes.append("no adapter is at work in this model: the weights are its own")
    with new_folder(folder, size, companions.read_from(source, model)) as staged:
        outcome = [_write_shard(staged, encoding, source, chosen, shard, plans) for shard in _named(shards)]
        if len(shards) > 1:
            companions.write_index(staged, {name: tensors for name, tensors in _names_by_file(shards, plans)}, size)
        kept = kept_modules(source) | {w.module for n, w in source.weights.items() if w.linear and n not in chosen}
        tokenizer = companions.settled_tokenizer(source, tokenizer)
        notes += companions.write_configs(staged, source, encoding.dtype, encoding.config(sorted(kept)), tokenizer)
        notes += companions.write_tokenizer(staged, source.folder, tokenizer)
        report = MergeReport(
            folder,
            precision,
            source.base,
            tuple(name for name, _ in _named(shards)),
            sum(path.stat().st_size for path in staged.iterdir()),
            tuple(change for changes, _ in outcome for change in changes),
            max((rounding for _, rounding in outcome), default=0.0),
            time.monotonic() - started,
            tuple(notes),
        )
        companions.write_export_record(staged, "merged", source, report.to_dict(), model)
    return report


def chosen_precision(precision: object) -> str:
    """Return the name of a precision. Raises `UsageError` for what is none."""
    if precision in PRECISIONS:
        return str(precision)
    alias = _ALIASES.get(str(precision).removeprefix("torch.").lower())
    hint = f"did you mean {alias!r}?" if alias else did_you_mean(str(precision), PRECISIONS)
    raise UsageError(Problem("precision", precision, "'bf16', 'fp16', 'fp32', 'nf4' or 'fp8'", hint))


def _half(source: WeightSource) -> torch.dtype:
    """Return the 16-bit dtype of the base, bf16 if it has none."""
    dtypes = {weight.dtype for weight in source.weights.values()}
    return torch.float16 if torch.float16 in dtypes and torch.bfloat16 not in dtypes else torch.bfloat16


def quantised_names(source: WeightSource) -> frozenset[str]:
    """Return the weights that nf4 and fp8 quantise: matrices of linear layers, but for those of `kept_modules`."""
    keep = kept_modules(source)
    return frozenset(n for n, w in source.weights.items() if w.linear and not _matches(w.module, keep))


def kept_modules(source: WeightSource) -> set[str]:
    """Return the names of the linear modules that are never quantised: the head (tied or not), and the spec's."""
    from fastft.registry.resolve import find

    spec = source.state.spec or find(source.config)
    return {spec.head.module, *spec.keep_16bit} if spec else {"lm_head"}


def _matches(module: str, names: set[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _shards(plans: Mapping[str, Planned], limit: int) -> list[list[str]]:
    """Deal the weights out in order, a new file when `limit` bytes would be exceeded."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, plan in plans.items():
        size = planned_bytes(plan)
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _named(shards: list[list[str]]) -> list[tuple[str, list[str]]]:
    if len(shards) == 1:
        return [(files.WEIGHTS, shards[0])]
    return [(f"model-{i:05d}-of-{len(shards):05d}.safetensors", shard) for i, shard in enumerate(shards, 1)]


def _names_by_file(shards: list[list[str]], plans: Mapping[str, Planned]) -> Iterator[tuple[str, list[str]]]:
    for file, weights in _named(shards):
        yield file, [tensor for weight in weights for tensor in plans[weight]]


def _write_shard(
    folder: Path,
    encoding: Encoding,
    source: WeightSource,
    chosen: frozenset[str],
    shard: tuple[str, list[str]],
    plans: Mapping[str, Planned],
) -> tuple[list[Change], float]:
    """Write one file; returns the changes and the largest relative rounding error in it."""
    from tqdm.auto import tqdm

    file, names = shard
    changes, rounding = [], 0.0
    planned = {tensor: form for name in names for tensor, form in plans[name].items()}
    with TensorFile(folder / file, planned) as out, torch.no_grad():
        for name in tqdm(names, desc=file, unit="tensor", disable=None, leave=False):
            weight = source.weights[name]
            merged = weight.read()
            if weight.adapted:
                changes.append(_change(weight, merged))
            written = encoding.encode(name, merged, name in chosen)
            rounding = max(rounding, _rounding(merged, decode(name, written)))
            for tensor, value in written.items():
                out.add(tensor, value)
    return changes, rounding


def _change(weight: Weight, merged: Tensor) -> Change:
    base = weight.read_base()
    largest = total = squares = norm = 0.0
    for new, old in zip(merged.reshape(-1).split(_CHUNK), base.reshape(-1).split(_CHUNK)):
        difference = (new - old).abs_()
        largest = max(largest, difference.max().item())
        total += difference.sum(dtype=torch.float64).item()
        squares += _square(difference)
        norm += _square(old)
    relative = (squares / (norm or 1.0)) ** 0.5
    return Change(weight.name.removesuffix(".weight"), largest, total / merged.numel(), relative)


def _rounding(merged: Tensor, written: Tensor) -> float:
    squares = norm = 0.0
    for new, old in zip(written.reshape(-1).split(_CHUNK), merged.reshape(-1).split(_CHUNK)):
        squares += _square(new - old)
        norm += _square(old)
    return (squares / (norm or 1.0)) ** 0.5


def _square(chunk: Tensor) -> float:
    """Return the sum of squares, taken in fp64."""
    return torch.linalg.vector_norm(chunk, dtype=torch.float64).item() ** 2


def save_adapter(model: Any, folder: str | Path, tokenizer: Any = None) -> Path:
    """Write the adapter of `model` alone (or of an adapter's or run's folder), with its tokenizer; returns the folder.

    It is PEFT's format: `fastft.load(folder)` and `PeftModel.from_pretrained` put it on its base again. The folder
    appears when it is whole. Raises `UsageError` for a model without an adapter and `SaveError`.
    """
    refuse_export(model, tokenizer, folder)
    folder = Path(folder).expanduser()
    if isinstance(model, str | Path):
        return companions.copy_adapter(Path(model).expanduser(), folder, tokenizer)
    if not getattr(model, "peft_config", None):
        raise UsageError("save_adapter: this model carries no adapter; fastft.merge writes whole models")
    size = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if p.requires_grad)
    with new_folder(folder, size, companions.read_from(None, model)) as staged:
        model.save_pretrained(str(staged))
        nested = [path.name for path in staged.iterdir() if path.is_dir()]
        if nested:
            raise SaveError(
                f"{folder}: the model carries several adapters ({', '.join(sorted(model.peft_config))}), which cannot "
                "be saved into one folder; keep one (model.delete_adapter), or merge them"
            )
        companions.write_tokenizer(staged, None, tokenizer or companions.tokenizer_of(model))
        companions.write_export_record(staged, "adapter", None, {"adapters": sorted(model.peft_config)}, model)
    return folder
