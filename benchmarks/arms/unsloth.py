"""Unsloth, through its own loader. It replaces parts of other packages, so it is imported before any of them."""

import unsloth  # isort: skip
import os
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.arms import Trainee
from benchmarks.cells import Task
from benchmarks.weights import fill_adapter
from fastft.state import base_model

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# A folder of the run, and a list of tokenizers: no part of how it trains.
UNTOLD = ("UNSLOTH_COMPILE_LOCATION", "UNSLOTH_IGNORED_TOKENIZER_NAMES")


def prepare(task: Task, options: tuple[str, ...], device: str) -> Trainee:
    """Return the model loaded from the task's folder; "unsloth" in `options` is its offloaded checkpointing."""
    cell, checkpointing = task.cell, "unsloth" if "unsloth" in options else False
    longest = max(one.length for one in (cell, *task.longer))
    model, _ = unsloth.FastLanguageModel.from_pretrained(
        task.folder,
        max_seq_length=longest,
        dtype=torch.bfloat16,
        load_in_4bit=cell.mode == "nf4",
        full_finetuning=cell.mode == "full",
        use_gradient_checkpointing=checkpointing,
        use_exact_model_name=True,
    )
    if cell.mode != "full":
        model = unsloth.FastLanguageModel.get_peft_model(
            model,
            r=cell.rank,
            lora_alpha=cell.rank,
            lora_dropout=0,
            bias="none",
            target_modules=TARGETS,
            use_gradient_checkpointing=checkpointing,
            max_seq_length=longest,
        )
        fill_adapter(model)
    unsloth.FastLanguageModel.for_training(model, use_gradient_checkpointing=checkpointing)

    def loss(batch: Mapping[str, Any]) -> Any:
        return model(**batch).loss

    def facts() -> dict[str, Any]:
        switches = {key: value for key, value in os.environ.items() if key.startswith("UNSLOTH_") and key not in UNTOLD}
        return {"class": type(base_model(model)).__name__, "environment": switches}

    return Trainee(model, loss, facts)
