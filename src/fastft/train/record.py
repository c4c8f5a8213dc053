"""What a run leaves behind: metrics.jsonl, loss.png, run.json and a model card, each written whole or not at all."""

import hashlib
import json
import platform
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from fastft.environment import version_of
from fastft.errors import SaveError
from fastft.graph.head import find_spec
from fastft.memory.measure import host_peak
from fastft.state import get_state, quant_of
from fastft.train import card, checkpoint, flops, lineage, memory, plots, step
from fastft.train.spent import Spent, Tally, tells

VERSIONS = ("fastft", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes", "triton")


def curve(history: Sequence[Mapping[str, Any]], name: str) -> tuple[tuple[int, float], ...]:
    """Return (step, value) of a metric for every line of a trainer's `log_history` that has it."""
    return tuple((row["step"], row[name]) for row in history if row.get(name) is not None)


def last_evaluation(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return what the last evaluation in a trainer's `log_history` found, empty without one.

    Of several data sets that is the last of each; what is logged without the name of one is of the one behind.
    """
    last: dict[str, dict[str, float]] = {}
    for row in history:
        found = {name: value for name, value in row.items() if name.startswith("eval_")}
        if found:
            data = next((name for name in found if name.endswith("_runtime")), "")  # transformers': has the set's name
            last.pop(data, None)
            last[data] = found
    return {name: value for found in last.values() for name, value in found.items()}


def ends(curve: Sequence[tuple[int, float]]) -> str:
    """Return the first and the last (step, value) of a curve, which is what the repr of a result shows of it."""
    shown = dict.fromkeys(f"{value:.4f} (step {step})" for step, value in (*curve[:1], *curve[-1:]))
    return " to ".join(shown) or "none"


class RecordCallback(TrainerCallback):
    """Writes the record of one run while it trains.

    Every log step gives one line of `metrics.jsonl`, flushed; `run.json`, a picture and `README.md` are written at the
    start and at the end. A resumed run keeps the lines up to its checkpoint, if they are of its run, and goes on behind
    them. `picture` is the picture's file and what draws it; `measure` gives more for a line, of the seconds of training
    that it tells of; `told` are settings whose change in a resumed run is told elsewhere. `begun` is the checkpoint
    that the run goes on from, `kept_steps` up to which step an earlier run's lines are kept.
    """

    def __init__(
        self,
        folder: str | Path,
        tally: Tally,
        *,
        method: str = "sft",
        dataset: Any = None,
        reduce: Callable | None = None,
        picture: tuple[str, Callable[..., None]] = ("loss.png", plots.plot_run),
        measure: Callable[[float], Mapping[str, Any]] | None = None,
        told: Collection[str] = (),
    ) -> None:
        self.folder, self.method, self.dataset, self.picture = Path(folder), method, dataset, picture
        self.spent = Spent(tally, reduce or (lambda tensor: tensor))
        self.measure = measure or (lambda seconds: {})
        self.told, self.begun, self.kept_steps = told, None, 0
        self.rows, self.record, self.began = [], {}, 0.0
        self.predicted: dict[str, Any] = {"predicted_bytes": None}
        self.extra: dict[str, Any] = {}
        self.notes: dict[str, list[str]] = {}  # what is to be said at the end, by what it is of
        self.seen: dict[str, Any] | None = None  # what was measured for a line that is still to come
        self.ended = 0  # the last step whose end was seen

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Describe the run, keep what a resumed one has already logged, and start the clock."""
        work, self.began, self.seen, self.ended = flops.work_of(model), time.time(), None, state.global_step
        before = {} if self.begun is None else lineage.record_of(self.begun)
        self.spent.begin(work, before)
        untold = f"tokens, train_seconds and flops are counted from step {state.global_step} on, which is what "
        untold += f"{self.begun} has: it does not tell what came before"
        self.notes["plan"] = memory.notes(model)  # not those of an earlier run
        self.notes["spent"] = [] if self.begun is None or tells(before) else [untold]
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if state.is_world_process_zero:
            self.kept_steps = self._kept_steps(state.global_step)
            self.rows = kept_lines(self.folder / "metrics.jsonl", self.kept_steps)
            lines = "".join(json.dumps(row) + "\n" for row in self.rows)
            checkpoint.write_text(self.folder / "metrics.jsonl", lines)
            self.record = {"method": self.method, **describe_run(args, model, self.dataset, work)}
            self.record["runs"] = lineage.runs_from(before.get("runs") or [], state.global_step)
            if self.begun is not None:
                self.record["held"] = lineage.held(before, self.record)
                for line in lineage.lines(self.begun, self.record, state.max_steps, self.told):
                    print(f"fastft: {line}")
            self.write_record("running")
        self.spent.clock.start()

    def _kept_steps(self, global_step: int) -> int:
        """Return up to which step the lines in the folder are those of the checkpoint gone on from."""
        if self.begun is None:
            return 0
        there = lineage.runs_of(self.folder)
        if not there or lineage.leads_to(self.begun, there):
            return global_step
        print(
            f"fastft: {self.folder / lineage.RECORD} is of another run than {self.begun}: it and the other records "
            f"there are replaced, and the new ones begin after step {global_step}."
        )
        return 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that time goes by for a step that may not come to its end."""
        self.spent.clock.step_began()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that the step is whole, and when training stopped before what may follow it."""
        self.ended = state.global_step
        self.spent.tally.step_ended()
        self.spent.clock.step_ended()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the evaluation out of the speed."""
        self.spent.clock.leave_out()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the saving out of the speed."""
        self.spent.clock.leave_out()

    def send(self) -> None:
        """Measure what the line of the step that has just ended says, which comes while the next one runs."""
        self.seen = self._measured()
        self.spent.send()

    def _measured(self) -> dict[str, Any]:
        return {"peak_memory_bytes": peak_memory(), "wall_seconds": round(time.time() - self.began, 3)}

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Append a line for a training step or an evaluation."""
        logs = dict(logs or {})
        row = {"step": state.global_step, "epoch": state.epoch, **{key: logs[key] for key in logs if key != "epoch"}}
        if "loss" in logs:
            row |= self.spent.line()
            row |= self.measure(row["train_seconds"])
        elif not any(key.startswith("eval_") for key in logs):
            return
        row |= self._measured() if self.seen is None else self.seen
        self.seen = None
        if state.is_world_process_zero:
            self.rows.append(row)
            append_line(self.folder / "metrics.jsonl", row)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Count the steps behind the last line; write picture, manifest and card, unless an interruption has."""
        self.spent.count()
        if state.is_world_process_zero and self.record["status"] == "running":
            self.finish("stopped early" if state.global_step < state.max_steps else "finished", state, model)

    def finish(self, status: str, state: Any, model: Any, error: str | None = None) -> None:
        """Write the end of the record with its measurements."""
        self.record["rewrites"] = rewrites(model)
        self.predicted = memory.predicted(model)
        self.notes["plan"] = memory.notes(model)
        self.record |= self.measurements(state)
        name, plot = self.picture
        self.record["picture"] = name
        plot(self.rows, self.folder / name, card.short_name(self.record.get("model", {}).get("name", "")))
        self.write_record(status, error)

    def noted(self) -> list[str]:
        """Return all notes."""
        return [note for found in self.notes.values() for note in found]

    def write_record(self, status: str, error: str | None = None) -> None:
        """Write run.json and the card as they are now."""
        self.record |= {"status": status, **({"error": error} if error else {}), **self.extra, "notes": self.noted()}
        checkpoint.write_json(self.folder / "run.json", self.record)
        checkpoint.write_text(self.folder / "README.md", card.model_card(checkpoint.plain(self.record)))

    def measurements(self, state: Any) -> dict[str, Any]:
        """Return speed, memory and losses of the run so far."""
        losses = [row["loss"] for row in self.rows if "loss" in row]
        rewards = [row["reward"] for row in self.rows if row.get("reward") is not None]
        return {
            "steps": state.global_step,
            "epochs": state.epoch,
            "loss": {"first": losses[0] if losses else None, "last": losses[-1] if losses else None},
            **({"reward": {"first": rewards[0], "last": rewards[-1]}} if rewards else {}),
            "evaluation": last_evaluation(self.rows) or None,
            **self.spent.so_far(),
            **self.spent.speeds(self.record.get("device", {})),
            "memory": {**self.predicted, "measured_peak_bytes": peak_memory(), "kind": memory_kind()},
        }

    def at_checkpoint(self, state: Any) -> dict[str, Any]:
        """Return the record that goes into a checkpoint, with what was spent up to it. In all processes alike."""
        self.spent.count()
        return {**self.record, "steps": state.global_step, "epochs": state.epoch, **self.spent.so_far()}


def kept_lines(path: Path, global_step: int) -> list[dict[str, Any]]:
    """Return the lines of an earlier metrics.jsonl up to `global_step`; none for a run that starts anew."""
    if global_step == 0 or not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError:  # a run that was killed may leave half a line
            print(f"fastft: {path}, line {number} is damaged and left out of the record.")
    return [row for row in rows if row["step"] <= global_step]


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON line and flush it. Raises `SaveError`."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(checkpoint.plain(dict(row)), default=str) + "\n")
            file.flush()
    except OSError as error:
        raise SaveError(checkpoint.describe(path, error)) from error


def describe_run(args: Any, model: Any, dataset: Any, work: flops.Work) -> dict[str, Any]:
    """Return what is known of a run before its first step."""
    state, dtype = get_state(model), compute_dtype(args, model)
    device = next(model.parameters()).device
    check = step.head_check(model)
    return {
        "model": {
            "name": state.source or getattr(model.config, "_name_or_path", "") or type(model).__name__,
            "family": getattr(find_spec(step.base_model(model)), "name", None),
            "quant": quant_of(model),
            "dtype": str(dtype).removeprefix("torch."),
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "lora": adapters(model),
            "notes": list(state.notes),
        },
        "config": args.to_dict(),
        "seed": args.seed,
        "data": {"sha256": data_hash(dataset), "rows": len(dataset) if hasattr(dataset, "__len__") else None},
        "versions": {"python": platform.python_version(), **{name: version_of(name) for name in VERSIONS}},
        "device": {
            "name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() or device.type,
            "count": args.world_size,
            "peak_flops": flops.peak_flops(device, dtype),
        },
        "rewrites": rewrites(model),
        "loss_head": {"fused": check.fused, "reason": check.reason},
        "work": {"frozen": work.frozen, "trained": work.trained, "head": work.head},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def rewrites(model: Any) -> dict[str, Any] | None:
    """Return the rewrite report of a compiled model, None for one that runs as transformers wrote it."""
    if get_state(model).compiled is None:
        return None
    from fastft.graph.compile import report

    return report(model).to_dict()


def adapters(model: Any) -> dict[str, Any] | None:
    """Return rank, scaling and targets of every adapter."""
    configs = getattr(model, "peft_config", None)
    if not configs:
        return None
    names = ("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_rslora", "use_dora")
    return {
        key: {name: _sortable(getattr(config, name, None)) for name in names} | {"type": str(config.peft_type)}
        for key, config in configs.items()
    }


def compute_dtype(args: Any, model: Any) -> torch.dtype:
    """Return the dtype of the matrix products: autocast's, or that of the hidden states."""
    if args.bf16:
        return torch.bfloat16
    return torch.float16 if args.fp16 else model.get_input_embeddings().weight.dtype


def data_hash(dataset: Any) -> str | None:
    """Return the SHA-256 over every row in order, its token ids and labels or its text; None for a stream."""
    if dataset is None or not hasattr(dataset, "__len__"):
        return None
    digest = hashlib.sha256()
    if "input_ids" not in dataset.column_names:
        for row in dataset:
            digest.update(json.dumps(row, sort_keys=True, default=repr).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()
    names = [name for name in ("input_ids", "labels", "seq_lengths") if name in dataset.column_names]
    for batch in dataset.select_columns(names).with_format("arrow").iter(batch_size=1000):
        for name in names:
            column = batch[name].combine_chunks()
            digest.update(name.encode())
            digest.update(column.value_lengths().to_numpy(zero_copy_only=False).astype("int64").tobytes())
            digest.update(column.flatten().to_numpy(zero_copy_only=False).astype("int64").tobytes())
    return digest.hexdigest()


def peak_memory() -> int:
    """Return the most memory held so far in bytes: the GPU's allocated memory, or the process's on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return host_peak()


def memory_kind() -> str:
    """Say what `peak_memory` measures here."""
    return "cuda allocated" if torch.cuda.is_available() else "process resident"


def _sortable(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value
