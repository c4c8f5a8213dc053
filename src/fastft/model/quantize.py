"""Quantised loading: through bitsandbytes, or into fp8 (`fp8_linear`), with weights that stay as they were loaded."""

from collections.abc import Iterable
from copy import copy
from typing import Any

import torch
from torch import nn

from fastft.errors import LoadError, Problem, UsageError, did_you_mean
from fastft.registry.spec import ModelSpec

QUANTS = ("nf4", "int8", "fp8")
# What people call the same thing elsewhere.
_ALIASES = {
    "4bit": "nf4",
    "4-bit": "nf4",
    "int4": "nf4",
    "bnb-4bit": "nf4",
    "fp4": "nf4",
    "8bit": "int8",
    "8-bit": "int8",
    "float8": "fp8",
    "e4m3": "fp8",
}
# The attribute by which a bitsandbytes Linear4bit decides whether to repack its weight for AVX512-BF16 CPUs.
_REPACK = "support_avx512bf16_for_cpu"


def quant_problem(quant: object) -> Problem | None:
    """Return what is wrong with a `quant` argument, None if nothing is."""
    if quant is None or quant in QUANTS:
        return None
    alias = _ALIASES.get(str(quant).lower())
    hint = f"did you mean {alias!r}?" if alias else did_you_mean(str(quant), QUANTS)
    return Problem("quant", quant, "None, 'nf4', 'int8' or 'fp8'", hint)


def config_for(quant: str, dtype: torch.dtype, spec: ModelSpec | None) -> Any:
    """Return the `BitsAndBytesConfig` for "nf4" (double quantisation) or "int8", computing in `dtype`.

    The spec names the modules that stay in 16 bits; without a spec transformers finds the head by itself.
    """
    from transformers import BitsAndBytesConfig

    skip = sorted({*spec.keep_16bit, spec.head.module}) if spec else None
    if quant == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skip,
    )


def quant_of_checkpoint(quantization: dict[str, Any] | None) -> str | None:
    """Return what a config's `quantization_config` says: None, "nf4", "int8", or another method's name."""
    if not quantization:
        return None
    if quantization.get("load_in_8bit"):
        return "int8"
    if quantization.get("load_in_4bit"):
        return str(quantization.get("bnb_4bit_quant_type", "fp4"))
    return str(quantization.get("quant_method", "unknown"))


def settle_quant(quant: str | None, stored: str | None, full: bool, source: str) -> tuple[str | None, list[str]]:
    """Bring the quantisation asked for together with the one the checkpoint has; returns it and notes."""
    if stored is None:
        return quant, []
    if full:
        raise UsageError(
            f"full=True: {source!r} is stored quantised ({stored}), and quantised weights cannot be trained; "
            "load the 16-bit model, or use add_lora"
        )
    if quant not in (None, stored):
        raise UsageError(
            f"quant={quant!r}: {source!r} is stored as {stored} already; leave quant out, or load the 16-bit model"
        )
    return stored, [f"the checkpoint is stored quantised ({stored}) and was taken as it is"]


def linears_4bit(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Yield the name and module of each bitsandbytes 4-bit linear layer."""
    from bitsandbytes.nn import Linear4bit

    return ((name, module) for name, module in model.named_modules() if isinstance(module, Linear4bit))


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Let 4-bit layers compute in `dtype`: a checkpoint stored in 4 bits names one of its own, that of its maker."""
    for _, module in linears_4bit(model):
        module.compute_dtype = dtype


def dequantized_4bit(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """Return what 4-bit numbers stand for: bitsandbytes' `dequantize_4bit`, right for rows of any length.

    On some CPUs its own (0.50.2) is wrong where a row's length is no multiple of a block of weights. Blocks know of no
    rows, so it is given all weights as one.
    """
    from bitsandbytes.functional import dequantize_4bit

    flat = copy(state)
    flat.shape = torch.Size([state.shape.numel()])
    return dequantize_4bit(packed, flat).view(state.shape)


def miscomputed(model: nn.Module) -> list[str]:
    """Return a note on the 4-bit layers that bitsandbytes multiplies with other numbers than they hold, if any.

    That is asked of one layer of each size (see `dequantized_4bit`), on the CPU alone, where some are.
    """
    from bitsandbytes.functional import dequantize_4bit

    wrong: dict[tuple[object, ...], bool] = {}
    found = []
    for name, module in linears_4bit(model):
        weight, state = module.weight, getattr(module.weight, "quant_state", None)
        if state is None or weight.device.type != "cpu" or module.in_features % state.blocksize == 0:
            continue
        size = (*state.shape, state.blocksize, state.quant_type, state.nested)
        if size not in wrong:
            made = dequantize_4bit(weight.data, state)
            wrong[size] = not torch.equal(made.view(state.shape), dequantized_4bit(weight.data, state))
        if wrong[size]:
            found.append(name)
    if not found:
        return []
    named = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
    return [
        f"bitsandbytes multiplies {len(found)} of the 4-bit layers wrongly on this CPU ({named}): their rows are no "
        "multiple of a block of weights. Load the model on a GPU, or its 16-bit checkpoint with quant=None, where "
        "they are used."
    ]


def keep_weights_unpacked(model: nn.Module) -> int:
    """Stop bitsandbytes from repacking 4-bit weights on the CPU; returns how many layers that concerned.

    On a CPU with AVX512-BF16 the first eval-mode forward without gradients would repack `weight.data` in place for its
    inference kernel; the backward pass and `dequantize_4bit` would read the new layout as the old one and return
    wrong numbers. Each layer decides by an attribute of its own, which is set here, on these layers only.
    Raises `LoadError` if a layer is repacked already, or if this bitsandbytes no longer obeys the attribute.
    """
    count = 0
    for name, module in linears_4bit(model):
        state = getattr(module.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise LoadError(
                f"{name}: its 4-bit weight has been repacked for inference and cannot be trained; load the model anew"
            )
        setattr(module, _REPACK, False)
        count += 1
    if count:
        _check_attribute_obeyed()
    return count


def _check_attribute_obeyed() -> None:
    """Run one tiny layer the way that would repack it, and see that its bytes stay."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer = Linear4bit(64, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    weight = torch.linspace(-1, 1, 64 * 64).reshape(64, 64)
    layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer).to("cpu")
    setattr(layer, _REPACK, False)
    before = layer.weight.data.clone()
    with torch.no_grad():
        layer.eval()(torch.ones(1, 64, dtype=torch.bfloat16))
    if layer.weight.data.shape != before.shape or not torch.equal(layer.weight.data, before):
        raise LoadError(
            "this version of bitsandbytes repacks 4-bit weights during evaluation on this CPU, after which training "
            "would silently be wrong; install another version of bitsandbytes, or load with quant=None"
        )
