"""LoftQ on an NF4 model: the adapter starts at what quantisation took away from the weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastft.errors import UsageError
from fastft.model import files
from fastft.model.quantize import dequantized_4bit


def start_from_residual(model: Any, source: str, revision: str | None, adapter: str = "default") -> int:
    """Set A and B of each 4-bit LoRA layer so that `scale * B A` is the best rank-r part of W - Q; returns how many.

    W [out, in] are the 16-bit weights in the files of `source`, Q what the model's NF4 weights dequantise to. With
    W - Q = U S V^T (singular value decomposition in fp32), B = U_r sqrt(S_r / scale), A = sqrt(S_r / scale) V_r^T.
    This is LoftQ (Li et al. 2023, arXiv 2310.08659, algorithm 1) with one step, whose Q is the plain quantisation: the
    adapter therefore fits any NF4 load of the same base. Raises `UsageError` if a weight is not in the files.
    """
    from peft.tuners.lora.bnb import Linear4bit

    tensors = _index(files.locate(source, revision))
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, Linear4bit) and adapter in m.lora_A]
    absent = [name for name, _ in layers if f"{name}.weight" not in tensors]
    if absent:
        raise UsageError(
            f"init='loftq': the 16-bit weight of {absent[0]} (and {len(absent) - 1} more) is not in the safetensors of "
            f"{source!r} under that name; take init=True, or 'olora'"
        )
    for name, layer in layers:
        weight = layer.get_base_layer().weight
        true = _read(tensors[f"{name}.weight"], f"{name}.weight").to(weight.device, torch.float32)
        if true.shape != weight.quant_state.shape:
            raise UsageError(
                f"init='loftq': {source!r} holds {name} quantised, and LoftQ needs the 16-bit weights; load the 16-bit "
                "checkpoint with quant='nf4', or take init=True"
            )
        residual = true - dequantized_4bit(weight.data, weight.quant_state).float()
        u, s, vh = torch.linalg.svd(residual, full_matrices=False)
        r, root = layer.r[adapter], (s[: layer.r[adapter]] / layer.scaling[adapter]).sqrt()
        with torch.no_grad():
            layer.lora_B[adapter].weight.copy_(u[:, :r] * root)
            layer.lora_A[adapter].weight.copy_(root[:, None] * vh[:r])
    return len(layers)


def _index(folder: Path) -> Mapping[str, Path]:
    """Return which file holds which tensor."""
    if (folder / files.INDEX).is_file():
        return {name: folder / shard for name, shard in files.read_json(folder / files.INDEX)["weight_map"].items()}
    if not (folder / files.WEIGHTS).is_file():
        return {}
    from safetensors import safe_open

    with safe_open(folder / files.WEIGHTS, framework="pt") as shard:
        return {name: folder / files.WEIGHTS for name in shard.keys()}  # noqa: SIM118, it is no dict


def _read(path: Path, name: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as shard:
        return shard.get_tensor(name)
