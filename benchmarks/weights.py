"""Random models: the same weights for every arm, drawn by each weight's own name, made layer by layer on the device."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn

from benchmarks.cells import Cell
from benchmarks.shapes import shape_of

SPREAD = 0.02
NORM_SPREAD = 0.1
ADAPTER_SPREAD = 0.01
# Those of the tokenizer that goes into a folder.
SPECIAL_TOKENS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 3}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def build(cell: Cell, device: str, before_adapter: Callable[[Any], None] | None = None) -> Any:
    """Return the cell's model in training mode: NF4 or bf16 weights, and the adapter unless every weight is trained.

    `before_adapter` may change the transformers model before PEFT wraps it.
    """
    model = transformer(cell, device, quantised=cell.mode == "nf4")
    if before_adapter:
        before_adapter(model)
    if cell.mode == "full":
        return model.requires_grad_(True).train()
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=cell.rank, lora_alpha=cell.rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model.requires_grad_(False), lora)
    fill_adapter(model)
    return model.train()


def transformer(cell: Cell, device: str, quantised: bool) -> Any:
    """Return the transformers model with its random weights. At no time are there more 16-bit weights than one layer's
    beside the finished ones.
    """
    shape = shape_of(cell.shape, cell.layers)
    config = getattr(transformers, shape.config_class)(**shape.fields, **SPECIAL_TOKENS)
    with init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    for prefix, module in list(model.named_modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            full = f"{prefix}.{name}"
            if full == "lm_head.weight" and full != head:
                continue
            mean, spread = (shape.norm, NORM_SPREAD) if parameter.ndim == 1 else (0.0, SPREAD)
            spread *= cell.head_scale if full == head else 1.0
            values = draw(full, parameter.shape, device, spread, mean).to(torch.bfloat16)
            if quantised and isinstance(module, nn.Linear) and full != head:
                parent, _, child = prefix.rpartition(".")
                setattr(model.get_submodule(parent), child, _in_four_bits(module, values, device))
            else:
                setattr(module, name, nn.Parameter(values))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
    model.tie_weights()
    if quantised:
        from fastft.model.quantize import keep_weights_unpacked

        model.is_loaded_in_4bit = True  # as loading does; PEFT chooses its 4-bit layer by it
        keep_weights_unpacked(model)
    return model


def draw(name: str, shape: Any, device: str, spread: float, mean: float = 0.0) -> Tensor:
    """Return normal fp32 values on `device` that depend on nothing but the name, the shape and the kind of device."""
    generator = torch.Generator(device).manual_seed(crc32(name.encode()))
    return torch.randn(tuple(shape), generator=generator, device=device).mul_(spread).add_(mean)


def _in_four_bits(linear: nn.Linear, values: Tensor, device: str) -> nn.Module:
    """Return a 4-bit linear layer with `values`, quantised as loading with bitsandbytes does it."""
    import bitsandbytes as bnb

    with torch.device("meta"):
        made = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
    made.weight = bnb.nn.Params4bit(values, requires_grad=False, quant_type="nf4", module=made)
    return made.to(device)


def fill_adapter(model: Any) -> None:
    """Give A and B of every adapter values of their own: B at PEFT's zeros would leave A without a gradient.

    The names from `layers.` on are those of PEFT in every arm. Raises ValueError if there is no adapter.
    """
    found = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            place = re.search(r"layers\..*lora_[AB]", name)
            if place is None:
                continue
            spread = ADAPTER_SPREAD if place[0].endswith("B") else (3 * parameter.shape[1]) ** -0.5
            parameter.copy_(draw(place[0], parameter.shape, "cpu", spread))
            found += 1
    if not found:
        raise ValueError(f"{type(model).__name__} has no parameters named layers.*.lora_A or lora_B")


def save(cell: Cell, device: str, folder: Path) -> None:
    """Write the model in bf16, with a tokenizer, as a folder that any loader takes."""
    from fastft.demo import MODEL_FOLDER

    transformer(cell, device, quantised=False).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (Path(MODEL_FOLDER) / name).exists():
            shutil.copy(Path(MODEL_FOLDER) / name, folder / name)
