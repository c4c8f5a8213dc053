#!/usr/bin/env python3
"""Write the pages of this folder from the code: `python docs/reference/generate.py`, after a change of the API."""

import dataclasses
import inspect
import os
import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import attrs

import fastft
from fastft.registry import chat_format, spec

HERE = Path(__file__).parent
# Headings of the API page -> full names; those of `fastft` itself come first under each.
API = {
    "Look up a model family": ("resolve", "register", "ModelSpec", "registry.convert.load_spec_file"),
    "Load and adapt": ("load", "model.load.describe", "add_lora", "add_tokens"),
    "Data": (
        "load_rows",
        "data.recognise.recognise",
        "data.recognise.Recognised",
        "data.recognise.canonical",
        "chat_dataset",
        "train_on_responses_only",
        "truncation_table",
        "data.truncation.TruncationTable",
        "preview",
        "data.preview.Preview",
        "text_dataset",
        "standardize_sharegpt",
        "standardize_data_formats",
        "to_sharegpt",
        "data.collate.collate",
    ),
    "Chat formats": (
        "chat_templates.get_chat_template",
        "registry.chat.chat_format",
        "registry.chat.chat_formats",
        "registry.chat.with_tokens",
        "data.known_format.recognise_format",
        "data.known_format.response_parts",
        "data.template.render",
        "data.template.Rendered",
        "data.template.without_generation_markers",
    ),
    "Compile": (
        "compile",
        "report",
        "graph.report.RewriteReport",
        "graph.report.GraphReport",
        "graph.report.Rewrite",
        "graph.compile.uncompile",
        "graph.compile.uncompiled",
    ),
    "Verify": ("verify", "train.verify.VerifyReport", "train.verify.Comparison"),
    "Train": (
        "sft",
        "train.sft.run.SftResult",
        "SFTTrainer",
        "SFTConfig",
        "grpo",
        "train.grpo.run.GrpoResult",
        "GRPOTrainer",
        "GRPOConfig",
        "preference",
        "train.preference.run.PreferenceResult",
        "DPOTrainer",
        "DPOConfig",
        "KTOTrainer",
        "KTOConfig",
        "ORPOTrainer",
        "ORPOConfig",
        "CPOTrainer",
        "CPOConfig",
    ),
    "Log-probabilities": ("train.logprobs.completion_logprobs", "train.logprobs.CompletionLogprobs"),
    "Rewards": (
        "rewards.matches",
        "rewards.number",
        "rewards.expression",
        "rewards.json_schema",
        "rewards.code",
        "rewards.length",
        "rewards.combine",
        "rewards.guard",
        "rewards.guarding.Guarded",
        "rewards.guarding.Call",
        "rewards.sandbox.Limits",
        "rewards.sandbox.run",
        "rewards.sandbox.missing",
        "rewards.sandbox.Outcome",
    ),
    "Generate": ("generate",),
    "Export": (
        "merge",
        "export.merge.MergeReport",
        "export.merge.Change",
        "save_adapter",
        "export_gguf",
        "export_lora_gguf",
        "verify_export",
        "export.verify.ExportReport",
        "export.verify.ArtefactReport",
        "export.compare.Distance",
        "export.compare.Limits",
        "write_modelfile",
        "export.modelfile.modelfile",
        "export.modelfile.create_ollama_model",
        "push",
        "export.hub.Pushed",
        "export.weights.weight_source",
        "export.weights.WeightSource",
        "export.weights.Weight",
    ),
    "Rollouts": (
        "rollout.make_engine",
        "rollout.base.Engine",
        "rollout.base.Sampling",
        "rollout.base.Completion",
        "rollout.hf.TransformersEngine",
        "rollout.vllm.VLLMEngine",
        "rollout.server.ServerEngine",
        "rollout.base_weights.write_base",
    ),
    "Sampling methods of FastLanguageModel's models": (
        "facade.inference.fast_generate",
        "facade.inference.save_lora",
        "facade.inference.load_lora",
        "facade.inference.SampledPrompt",
        "facade.inference.SampledText",
    ),
    "Saving methods of FastLanguageModel's models": (
        "facade.saving.save_pretrained_merged",
        "facade.saving.push_to_hub_merged",
        "facade.saving.save_pretrained_gguf",
        "facade.saving.push_to_hub_gguf",
        "facade.saving.save_pretrained_torchao",
    ),
    "Familiar names": (
        "FastLanguageModel",
        "FastModel",
        "FastVisionModel",
        "is_bfloat16_supported",
        "PatchFastRL",
        "PatchDPOTrainer",
        "PatchKTOTrainer",
        "vLLMSamplingParams",
    ),
    "Errors": (
        "errors.FastftError",
        "errors.UsageError",
        "errors.DataError",
        "errors.LoadError",
        "errors.SaveError",
        "errors.OutOfMemoryError",
        "errors.SpecError",
        "errors.RewardError",
        "errors.Problem",
    ),
}
TRAINERS = ("SFTTrainer", "DPOTrainer", "KTOTrainer", "ORPOTrainer", "CPOTrainer")
COMMANDS = ((), ("registry",), ("registry", "list"), ("registry", "show"), ("registry", "resolve"))
COMMANDS += (("registry", "check"), ("registry", "formats"), ("registry", "format"), ("env",), ("demo",), ("preview",))
COMMANDS += (("plan",),)
COMMANDS += (("export",), ("export", "merged"), ("export", "lora"), ("export", "gguf"), ("verify",))
RECORDS = (
    spec.ModelSpec,
    spec.NormPoint,
    spec.GluPoint,
    spec.AttentionPoint,
    spec.GgufPoint,
    spec.HeadPoint,
    spec.ConfigValue,
    spec.Variant,
    spec.Capability,
)
CHAT_RECORDS = (
    chat_format.ChatFormat,
    chat_format.Turn,
    chat_format.AnswerTurn,
    chat_format.Thinking,
    chat_format.Tools,
)


def get(name: str) -> Any:
    """Return what `fastft.<name>` is."""
    module, _, last = name.rpartition(".")
    return getattr(__import__(f"fastft.{module}", fromlist=[last]) if module else fastft, last)


def annotation(kind: Any) -> str:
    """Return a type as it is written in code, without module names."""
    if kind is inspect.Parameter.empty:
        return ""
    if isinstance(kind, str):
        return kind
    if kind is None or kind is types.NoneType:
        return "None"
    if get_origin(kind) is Literal:
        return " | ".join(repr(value) for value in get_args(kind))
    if isinstance(kind, types.UnionType) or str(get_origin(kind)) == "typing.Union":
        return " | ".join(annotation(part) for part in get_args(kind))
    if get_args(kind):
        parts = ", ".join("..." if part is ... else annotation(part) for part in get_args(kind))
        return f"{getattr(get_origin(kind), '__name__', get_origin(kind))}[{parts}]"
    return getattr(kind, "__name__", str(kind).removeprefix("typing."))


def signature(name: str, function: Any) -> str:
    """Return the call of a function, an argument a line where it is long."""
    parts, seen_star = [], False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not seen_star:
            parts.append("*")
            seen_star = True
        seen_star = seen_star or parameter.kind is parameter.VAR_POSITIONAL
        mark = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        kind = annotation(parameter.annotation)
        text = mark + parameter.name + (f": {kind}" if kind else "")
        if parameter.default is not parameter.empty:
            text += (" = " if kind else "=") + (repr(parameter.default))
        parts.append(text)
    returns = annotation(inspect.signature(function).return_annotation)
    end = f") -> {returns}" if returns else ")"
    flat = f"{name}({', '.join(parts)}{end}"
    return flat if len(flat) <= 100 else f"{name}(\n    " + ",\n    ".join(parts) + f",\n{end}"


def entry(name: str) -> str:
    """Return the section of one public name."""
    thing, full = get(name), f"fastft.{name}"
    lines = [f"### {full}", ""]
    if not inspect.isclass(thing):
        return "\n".join([*lines, code(signature(full, thing)), "", inspect.getdoc(thing) or "", ""])
    lines += [inspect.getdoc(thing) or "", ""]
    if attrs.has(thing) and thing is not spec.ModelSpec:
        lines += [fields_table(thing), ""]
    if thing is spec.ModelSpec:
        return "\n".join([*lines, "Its fields and those of its parts: [spec](spec.md).", ""])
    if dataclasses.is_dataclass(thing):
        ours = [base for base in thing.__mro__ if base.__module__.startswith("fastft.")]
        own = {name for base in ours for name in vars(base).get("__annotations__", ())}
        mine = [f for f in dataclasses.fields(thing) if f.name in own]
        rows = [_row(f.name, annotation(f.type), f"`{f.default!r}`") for f in mine]
        lines += ["Its own fields, and those whose default differs:", "", *table("field", "type", "default", rows), ""]
        return "\n".join(lines)
    if name in TRAINERS:
        return "\n".join([*lines, f"Arguments: those of TRL's `{name}`, and `compile: bool = True`.", ""])
    for method, value in inspect.getmembers(thing, inspect.isfunction):
        if not method.startswith("_") and (method in vars(thing) or name == "FastLanguageModel"):
            call = f"{thing.__name__}.{method}"
            lines += [f"#### {call}", "", code(signature(call, value)), "", inspect.getdoc(value) or "", ""]
    return "\n".join(lines)


def code(text: str) -> str:
    """Return text as a block of Python that is shown and not run."""
    return f"```py\n{text}\n```"


def table(*head_and_rows: Any) -> list[str]:
    """Return a Markdown table's lines: the head's cells, then a list of rows."""
    *head, rows = head_and_rows
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *rows]


def fields_table(record: type) -> str:
    """Return the fields of an attrs record with type and default."""
    rows = []
    for item in attrs.fields(record):
        if item.default is attrs.NOTHING:
            default = "required"
        elif isinstance(item.default, attrs.Factory):
            default = "`{}`"
        else:
            default = "`" + _written(item.default) + "`"
        rows.append(_row(item.name, annotation(item.type), default))
    return "\n".join(table("field", "type", "default", rows))


def _row(name: str, kind: str, default: str) -> str:
    return f"| `{name}` | `{kind.replace('|', chr(92) + '|')}` | {default} |"


def _written(value: Any) -> str:
    return f"{type(value).__name__}()" if attrs.has(type(value)) else repr(value)


def api() -> str:
    """Return the page of the Python API."""
    lines = ["# Python API", "", "Written from the code by `docs/reference/generate.py`."]
    lines += ["Names directly under `fastft` are loaded on first use.", ""]
    for heading, names in API.items():
        lines += [f"## {heading}", "", *(entry(name) for name in names)]
    lines += ["## Constants", "", f"`fastft.__version__`: the version, now {fastft.__version__!r}.", ""]
    lines += [
        "## Plain names of `sft`'s options",
        "",
        "Any field of `SFTConfig` is taken under its own name as well.",
        "",
    ]
    from fastft.train import arguments
    from fastft.train.grpo import config as grpo_config
    from fastft.train.preference import config as preference_settings

    def fields(config: str, plain: Mapping[str, str]) -> list[str]:
        return table("option", f"field of {config}", [f"| `{short}` | `{name}` |" for short, name in plain.items()])

    lines += fields("SFTConfig", arguments.PLAIN)
    lines += ["", "## Plain names of `grpo`'s options", ""]
    lines += ["Any field of `GRPOConfig` is taken under its own name as well.", ""]
    lines += fields("GRPOConfig", grpo_config.PLAIN)
    lines += ["", "## Plain names of `preference`'s options", ""]
    lines += ["Any field of the loss's config is taken under its own name as well.", ""]
    lines += fields("the config", preference_settings.PLAIN)
    return "\n".join(lines) + "\n"


def cli() -> str:
    """Return the page of the command line: the help of every command."""
    lines = ["# Command line", "", "Written from the code by `docs/reference/generate.py`.", ""]
    lines += [
        "`registry list`, `show` and `resolve` do not import torch. Exit codes: 0 done, 1 an error, 2 a check failed,"
    ]
    lines += ["3 wrong usage, 130 interrupted.", ""]
    for command in COMMANDS:
        run = [sys.executable, "-c", "from fastft.cli.main import run; run()", *command, "--help"]
        environment = {**os.environ, "COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1"}
        out = subprocess.run(run, capture_output=True, text=True, check=True, env=environment).stdout
        lines += [f"## fastft {' '.join(command)}".rstrip(), "", f"```text\n{out.rstrip()}\n```", ""]
    return "\n".join(lines).rstrip() + "\n"


def spec_page() -> str:
    """Return the page of the spec's records."""
    lines = [
        "# The fields of a spec",
        "",
        "Written from the code by `docs/reference/generate.py`. A spec is a `.toml` or `.json` file;",
    ]
    lines += ['`""` stands for none where a default has to be switched off. How to write one:']
    lines += ["[add a model family](../how-to/add-a-model-family.md).", ""]
    for record in RECORDS:
        lines += [f"## {record.__name__}", "", inspect.getdoc(record) or "", "", fields_table(record), ""]
    names = ", ".join(f"`{name}`" for name in get_args(spec.CapabilityName))
    lines += ["## Capability names", "", f"{names}. A capability is a status, or a table with `status` and `note`.", ""]
    return "\n".join(lines).rstrip() + "\n"


def chat_page() -> str:
    """Return the page of the chat format's records."""
    lines = [
        "# The fields of a chat format",
        "",
        "Written from the code by `docs/reference/generate.py`. The formats and how to choose one:",
        "[choose a chat format](../how-to/chat-formats.md).",
        "",
    ]
    for record in CHAT_RECORDS:
        lines += [f"## {record.__name__}", "", inspect.getdoc(record) or "", "", fields_table(record), ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    for page, text in (("api.md", api()), ("cli.md", cli()), ("spec.md", spec_page()), ("chat-format.md", chat_page())):
        (HERE / page).write_text("\n".join(line.rstrip() for line in text.split("\n")), encoding="utf-8")
