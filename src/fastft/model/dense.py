"""What the numbers of a quantised layer are, as fp32."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastft.errors import UsageError
from fastft.model.fp8_linear import Fp8Linear
from fastft.model.quantize import dequantized_4bit

Reading = tuple[tuple[int, ...], torch.dtype | None, Callable[[], Tensor]]


def dense_weight(module: nn.Module, name: str) -> bool:
    """Say whether the module's tensor `name` is held quantised (bitsandbytes 4-bit or int8, or fp8)."""
    if isinstance(module, Fp8Linear):
        return name == "weight"
    return name == "weight" and type(module).__name__ in ("Linear4bit", "Linear8bitLt") and not _is_dense(module)


def _is_dense(module: Any) -> bool:
    weight = module.weight
    return getattr(weight, "quant_state", None) is None and weight.dtype != torch.int8


def dense_like(full: str, name: str, module: Any, value: Tensor) -> Reading:
    """Return shape, dtype and a function that reads the tensor `name` of a module as fp32, dequantised if need be.

    4-bit numbers are those that the layer multiplies with: dequantised to the dtype it was quantised from. An int8 or
    fp8 layer has no such dtype (None). Raises `UsageError` for quantised weights that cannot be dequantised, and, when
    it is read, for a weight that is not in memory.
    """
    if value.is_meta:
        return tuple(value.shape), value.dtype, partial(_absent, full)
    if isinstance(module, Fp8Linear) and name == "weight":
        return tuple(value.shape), None, partial(module.dequantized, torch.float32)
    if dense_weight(module, name):
        if type(module).__name__ == "Linear8bitLt":
            return tuple(value.shape), None, partial(_from_int8, module)
        state = value.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            raise UsageError(
                f"{full}: its 4-bit weight has been repacked for inference on this CPU and cannot be dequantised; load "
                "the model with fastft.load, which prevents that"
            )
        return tuple(state.shape), state.dtype, partial(_from_4bit, module)
    if not value.is_floating_point() or value.element_size() < 2:
        raise UsageError(
            f"{full}: a {type(module).__name__} in {str(value.dtype).removeprefix('torch.')} cannot be dequantised by "
            "fastft; bitsandbytes' NF4, FP4 and int8 can. Load the 16-bit checkpoint"
        )
    return tuple(value.shape), value.dtype, partial(_to_float, value)


def _absent(name: str) -> Tensor:
    raise UsageError(f"{name}: this weight is not in memory (offloaded); load the model onto one device and try again")


def _to_float(value: Tensor) -> Tensor:
    return value.detach().float()


def _from_4bit(module: Any) -> Tensor:
    with torch.no_grad():
        return dequantized_4bit(module.weight.data, module.weight.quant_state).float()


def _from_int8(module: Any) -> Tensor:
    """Each row of the int8 matrix has the scale (largest magnitude) / 127."""
    weight, state = module.weight, module.state
    scale = state.SCB if state.SCB is not None else weight.SCB
    data = state.CB if state.CB is not None else weight.data
    return data.detach().float() * (scale.detach().float() / 127).to(data.device).reshape(-1, 1)
