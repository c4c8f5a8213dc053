"""The model card, made from a run's manifest."""

import os.path
from collections.abc import Mapping
from typing import Any

SHOWN = ("_loss", "_perplexity", "_mean_token_accuracy")  # ends of what is told of an evaluation


def model_card(record: Mapping[str, Any]) -> str:
    """Return the README.md of a run: metadata for a hub, then what was trained, on what, how fast, in which memory."""
    model = record.get("model", {})
    head = ["---", "library_name: peft" if model.get("lora") else "library_name: transformers"]
    if "/" in model.get("name", "") and not is_path(model["name"]):
        head.append(f"base_model: {model['name']}")
    head += ["tags:", "- fastft", f"- {record.get('method', 'sft')}", "---", ""]
    rows = [(label, value) for label, value in facts(record) if value not in (None, "")]
    table = ["| | |", "|---|---|", *(f"| {label} | {value} |" for label, value in rows)]
    title = f"# {short_name(model.get('name', '')) or 'A model'}, fine-tuned with fastft"
    picture = ["", f"![curves]({record['picture']})"] if "picture" in record else []
    versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items() if version)
    return "\n".join([*head, title, "", *table, *picture, "", f"Versions: {versions}.", ""])


def is_path(name: str) -> bool:
    """Say whether a model's name is that of a folder here, and no id of a hub."""
    return name.startswith((".", "~")) or os.path.isabs(name) or os.path.isdir(name)


def short_name(name: str) -> str:
    """Return a model's name for a title: of a path the last folder's."""
    return os.path.basename(os.path.abspath(name)) if name and is_path(name) else name


def facts(record: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return label and text of every line of the card's table."""
    model, data = record.get("model", {}), record.get("data", {})
    config, loss = record.get("config", {}), record.get("loss") or {}
    batch = f"{config.get('per_device_train_batch_size')} x {config.get('gradient_accumulation_steps')} accumulated"
    evaluation = ", ".join(
        f"{key.removeprefix('eval_')} {value:.4g}"
        for key, value in (record.get("evaluation") or {}).items()
        if isinstance(value, float) and key.endswith(SHOWN)  # of each data set
    )
    return [
        ("status", record.get("status")),
        ("notes", "; ".join(record.get("notes", ()))),
        ("base model", model.get("name")),
        ("weights", f"{model.get('quant') or model.get('dtype')}"),
        ("compute", _compute(record.get("rewrites"))),
        ("kept for the backward pass", _kept(record.get("rewrites"))),
        ("trained parameters", _grouped(model.get("trained_parameters"))),
        ("adapter", _adapter(model.get("lora"))),
        ("rows of data", _grouped(data.get("rows"))),
        ("data SHA-256", data.get("sha256")),
        ("tokens seen (loss-bearing)", _tokens(record.get("tokens"))),
        ("steps", record.get("steps")),
        ("batch", batch),
        ("learning rate", {**config, **record.get("held", {})}.get("learning_rate")),
        ("seed", record.get("seed")),
        ("rewards", ", ".join(record.get("rewards", ()))),
        ("engine", record.get("engine")),
        ("mean reward, first to last", _change(record.get("reward") or {})),
        # with rewards the loss is no measure of success: it may stay at 0 while the reward rises
        ("loss, first to last", None if "rewards" in record else _change(loss)),
        ("evaluation", evaluation),
        ("device", record.get("device", {}).get("name")),
        ("loss-bearing tokens/s", _rate(record.get("tokens_per_second_after_first_log"))),
        ("MFU", _percent(record.get("mfu"))),
        ("peak memory", _memory(record.get("memory"))),
        ("rewrites", _rewrites(record.get("rewrites"))),
    ]


def _compute(report: Mapping[str, Any] | None) -> str | None:
    """Say what did not compute in the model's own dtype; nothing where all did."""
    compute = (report or {}).get("compute", "exact")
    return None if compute == "exact" else f"{compute}: products with frozen weights had fp8 factors (not exact)"


def _kept(report: Mapping[str, Any] | None) -> str | None:
    """Say what was kept in fewer bits than it was computed in; nothing where all was as it is."""
    return "gate and up in 8 bits (not exact)" if "in 8 bits" in (report or {}).get("modes", "") else None


def _grouped(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"


def _tokens(tokens: Mapping[str, int] | None) -> str | None:
    return None if not tokens else f"{tokens['non_padding']:,} ({tokens['loss_bearing']:,})"


def _change(loss: Mapping[str, Any]) -> str | None:
    first, last = loss.get("first"), loss.get("last")
    return f"{first:.4f} to {last:.4f}" if isinstance(first, float) and isinstance(last, float) else None


def _rate(rates: Mapping[str, float] | None) -> str | None:
    return None if not rates else f"{rates['loss_bearing']:,.0f}"


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"


def _memory(memory: Mapping[str, Any] | None) -> str | None:
    return None if not memory else f"{memory['measured_peak_bytes'] / 2**30:.2f} GiB ({memory['kind']})"


def _adapter(lora: Mapping[str, Any] | None) -> str | None:
    if not lora:
        return None
    return "; ".join(
        f"{config['type'].rsplit('.')[-1]} r={config['r']} alpha={config['lora_alpha']}" for config in lora.values()
    )


def _rewrites(report: Mapping[str, Any] | None) -> str:
    if report is None:
        return "none: run as transformers wrote it"
    applied = ", ".join(f"{count} {rule}" for rule, count in report.get("applied", {}).items()) or "none"
    return f"{applied} in the captured layers; {len(report.get('refused', ()))} refused (run.json says why)"
