"""What adapters do to a weight: the arithmetic of merging, in fp32.

For a base weight W [out, in], A [r, in], B [out, r] and the adapter's scale s (alpha / r, or alpha / sqrt(r)):

* LoRA: W + s B A (Hu et al. 2021, arXiv 2106.09685).
* DoRA: m * (W + s B A) / ||W + s B A|| with the norm of each output's row (Liu et al. 2024, arXiv 2402.09353).

Several active adapters apply one after another, as PEFT's forward does: DoRA's norms are those of the untouched base.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastft.errors import UsageError

# What PEFT calls DoRA.
_DORA = ("DoraLinearVariant", "DoraEmbeddingVariant")


def adapters_at_work(layer: Any) -> list[str]:
    """Return the adapters that the layer's forward adds to its base weight, in order.

    Merged adapters are in the base weight already, and disabled ones do nothing.
    """
    if layer.merged or layer.disable_adapters:
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A or name in layer.lora_embedding_A]


def check_layer(name: str, layer: Any) -> None:
    """Raise `UsageError` for an adapter whose arithmetic is none of the two above."""
    kind = type(layer).__name__
    base = layer.get_base_layer()
    if not (isinstance(base, nn.Linear | nn.Embedding) or kind == "ParamWrapper" or type(base).__name__ == "Conv1D"):
        raise UsageError(f"{name}: an adapter on a {type(base).__name__} layer cannot be merged by fastft")
    for adapter in adapters_at_work(layer):
        variant = layer.lora_variant.get(adapter)
        if variant is not None and type(variant).__name__ not in _DORA:
            raise UsageError(
                f"{name}: adapter {adapter!r} is of the kind {type(variant).__name__.removesuffix('Variant')}, which "
                "cannot be merged by fastft; plain LoRA, rsLoRA and DoRA can"
            )


def delta(layer: Any, adapter: str) -> Tensor:
    """Return s B A of one adapter in fp32, in the orientation of the base weight."""
    scale = layer.scaling[adapter]
    if adapter in layer.lora_embedding_A:
        a, b = layer.lora_embedding_A[adapter].detach().float(), layer.lora_embedding_B[adapter].detach().float()
        return (b @ a).T * scale  # [vocabulary, hidden]
    a, b = layer.lora_A[adapter].weight.detach().float(), layer.lora_B[adapter].weight.detach().float()
    if type(layer).__name__ == "ParamWrapper":
        return _of_experts(layer, a, b) * scale
    product = b @ a
    return (product.T if getattr(layer, "fan_in_fan_out", False) else product) * scale


def _of_experts(layer: Any, a: Tensor, b: Tensor) -> Tensor:
    """Return B A for a parameter that stacks the weights of several experts [experts, ...]."""
    experts, swapped = layer.num_experts, layer._did_swap_in_out_features
    if experts == 1:
        return (b @ a).reshape(layer.get_param().shape)
    a = a.reshape(experts, -1, a.shape[-1])  # [experts, r, in]
    b = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)  # [experts, out, r]
    product = b @ a
    return product if swapped else product.transpose(1, 2)


def merged_weight(layer: Any, base: Tensor) -> Tensor:
    """Return the weight, shaped as `base` (fp32, left as it is), that does what the layer with its adapters does."""
    weight = base
    for adapter in adapters_at_work(layer):
        change = delta(layer, adapter).to(base.device)
        factor = _dora_factor(layer, adapter, base, change) if is_dora(layer, adapter) else None
        weight = change.add_(weight)  # in place: the change is a fresh tensor
        if factor is not None:
            weight *= factor
    return weight


def is_dora(layer: Any, adapter: str) -> bool:
    """Say whether one adapter of the layer is DoRA (of those that `check_layer` admits)."""
    return layer.lora_variant.get(adapter) is not None


def _dora_factor(layer: Any, adapter: str, base: Tensor, change: Tensor) -> Tensor:
    dora = layer.lora_magnitude_vector[adapter]
    # embeddings have a magnitude for each column
    across, shape = (0, (1, -1)) if dora.fan_in_fan_out else (1, (-1, 1))
    norm = torch.linalg.vector_norm(base + change, dim=across)
    return (dora.weight.detach().float().to(base.device).reshape(-1) / norm).reshape(shape)


def merged_bias(name: str, layer: Any, base: Tensor) -> Tensor:
    """Return the bias [out] of the layer with its adapters (B has a bias of its own where `lora_bias` was set)."""
    bias = base
    for adapter in adapters_at_work(layer):
        extra = _bias_of_b(layer, adapter)
        if extra is not None:
            if is_dora(layer, adapter):
                raise UsageError(f"{name}: adapter {adapter!r} has both DoRA and lora_bias, which cannot be merged")
            bias = bias + extra.detach().float().to(base.device) * layer.scaling[adapter]
    return bias


def has_extra_bias(layer: Any) -> bool:
    """Say whether an adapter at work brings a bias of its own."""
    return any(_bias_of_b(layer, adapter) is not None for adapter in adapters_at_work(layer))


def _bias_of_b(layer: Any, adapter: str) -> Tensor | None:
    return layer.lora_B[adapter].bias if adapter in layer.lora_B else None


def merged_rows(layer: Any, base: Tensor) -> Tensor:
    """Return an embedding or head [vocabulary, hidden] with the token rows that were trained on their own."""
    weight = base
    if layer.merged or layer.disable_adapters:
        return weight
    for adapter in layer.active_adapters:
        if adapter in layer.trainable_tokens_delta:
            rows = layer.trainable_tokens_delta[adapter].detach().float().to(base.device)
            index = torch.tensor(layer.token_indices[adapter], device=base.device)
            weight = weight.index_copy(0, index, rows)
    return weight
