"""The precisions that merged weights are written in: what each makes of a weight, and what the config then says."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from fastft.errors import SaveError
from fastft.model.quantize import dequantized_4bit

DENSE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PRECISIONS = (*DENSE, "nf4", "fp8")
_FP8 = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(_FP8).max  # 448
_NF4_BLOCK, _NF4_BLOCK2 = 64, 256
Planned = dict[str, tuple[torch.dtype, tuple[int | None, ...]]]


@frozen
class Encoding:
    """A precision, with the dtype of what it does not quantise."""

    precision: str
    dtype: torch.dtype

    @property
    def quantises(self) -> bool:
        """Whether the matrices of linear layers become something else than plain numbers."""
        return self.precision not in DENSE

    def planned(self, name: str, shape: tuple[int, ...], quantise: bool) -> Planned:
        """Return the tensors that a weight becomes, with dtype and shape (None: a length known only later)."""
        if not quantise:
            return {name: (self.dtype, shape)}
        if self.precision == "fp8":
            return {name: (_FP8, shape), _scale_name(name): (torch.bfloat16, (shape[0], 1))}
        count = torch.Size(shape).numel()
        blocks = -(-count // _NF4_BLOCK)
        return {
            name: (torch.uint8, (-(-count // 2), 1)),
            f"{name}.absmax": (torch.uint8, (blocks,)),
            f"{name}.quant_map": (torch.float32, (16,)),
            f"{name}.nested_absmax": (torch.float32, (-(-blocks // _NF4_BLOCK2),)),
            f"{name}.nested_quant_map": (torch.float32, (256,)),
            f"{name}.quant_state.bitsandbytes__nf4": (torch.uint8, (None,)),
        }

    def encode(self, name: str, weight: Tensor, quantise: bool) -> dict[str, Tensor]:
        """Return the tensors that an fp32 weight becomes. Raises `SaveError` naming a weight that does not fit."""
        if not _finite(weight):
            raise SaveError(
                f"{name}: the merged weight holds NaN or infinity; training has diverged (look at loss and gradient "
                "norm), or the base weight has overflowed"
            )
        if not quantise:
            return {name: self._cast(name, weight)}
        return _to_fp8(name, weight) if self.precision == "fp8" else _to_nf4(name, weight, self.dtype)

    def _cast(self, name: str, weight: Tensor) -> Tensor:
        out = weight.to(self.dtype)
        if not _finite(out):
            limit = torch.finfo(self.dtype).max
            raise SaveError(
                f"{name}: its largest magnitude {weight.abs().max().item():.6g} does not fit into "
                f"{str(self.dtype).removeprefix('torch.')} (at most {limit:.6g}); merge with precision='bf16'"
            )
        return out

    def config(self, kept: Iterable[str]) -> dict[str, Any] | None:
        """Return the `quantization_config` for config.json, given the linear modules that are not quantised."""
        if self.precision == "fp8":
            return _fp8_config(list(kept))
        if self.precision == "nf4":
            from transformers import BitsAndBytesConfig

            return BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=self.dtype,
                llm_int8_skip_modules=list(kept),
            ).to_dict()
        return None


def planned_bytes(planned: Mapping[str, tuple[torch.dtype, tuple[int | None, ...]]]) -> int:
    """Return the bytes of planned tensors; a length not known yet counts 256."""
    return sum(
        torch.Size([256 if size is None else size for size in shape]).numel() * dtype.itemsize
        for dtype, shape in planned.values()
    )


def decode(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return as fp32 what `encode` wrote for a weight."""
    value = tensors[name]
    if value.dtype == _FP8:
        return value.float() * tensors[_scale_name(name)].float()
    if f"{name}.quant_map" not in tensors:
        return value.float()
    from bitsandbytes.functional import QuantState

    parts = {key.removeprefix(f"{name}."): part for key, part in tensors.items() if key.startswith(f"{name}.")}
    return dequantized_4bit(value, QuantState.from_dict(parts, device=value.device)).float()


def _finite(values: Tensor) -> bool:
    """Say whether every number is finite: a finite sum proves it at once, and any other is looked into."""
    return bool(torch.isfinite(values.sum(dtype=torch.float32))) or bool(torch.isfinite(values).all())


def _scale_name(name: str) -> str:
    return f"{name}_scale"


def _to_fp8(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Scale each row [out] to e4m3's range and round to nearest; the scale is held in bf16, as loaders hold it."""
    scale = weight.abs().amax(dim=1, keepdim=True) / _FP8_MAX
    # a bf16 number that is not below the scale: a product 1 + 2^-8 is more than rounding (2^-9) can take away
    rounded = (scale * (1 + 2**-8)).to(torch.bfloat16)
    rounded[rounded == 0] = 1.0
    return {name: (weight / rounded.float()).clamp_(-_FP8_MAX, _FP8_MAX).to(_FP8), _scale_name(name): rounded}


def _to_nf4(name: str, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Quantise with bitsandbytes: NF4 in blocks of 64, double quantisation; it dequantises to `dtype`."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight.contiguous(), blocksize=_NF4_BLOCK, compress_statistics=True, quant_type="nf4")
    state.dtype = dtype
    return {name: packed, **{f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}}


def _fp8_config(ignored: list[str]) -> dict[str, Any]:
    """Weights in e4m3 with a scale for each output, inputs quantised for each token when the model runs."""
    shared = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None, "block_structure": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**shared, "strategy": "channel", "dynamic": False},
                "input_activations": {**shared, "strategy": "token", "dynamic": True},
                "output_activations": None,
            }
        },
        "ignore": ignored,
        "kv_cache_scheme": None,
    }
