"""How many floating-point operations a training step needs, counting what LoRA leaves out.

A linear layer costs 2 N per token forward and 2 N for the gradient of its input; only a trained one costs another 2 N
for the gradient of its weight. So frozen weights cost 4 N and trained ones 6 N. Attention costs 4 head_dim heads per
pair of tokens that see each other forward, twice that backward. Recomputation is no useful work and is not counted.
"""

from collections.abc import Mapping
from typing import Any

from attrs import frozen
from torch import Tensor, nn

from fastft.state import base_model

# Dense 16-bit tensor-core peaks in FLOP/s (data sheets); the first name that is part of the device's wins.
PEAKS = (
    ("B200", 2250e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("A6000", 155e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
    ("V100", 125e12),
    ("T4", 65e12),
)


@frozen
class Work:
    """Weights that take part in matrix products, and the attention's shape.

    `windows` holds, for every attention layer, how far back a token sees (None: to the start of its document).
    """

    frozen: int
    trained: int
    head: int
    head_trained: bool
    attention_width: int
    windows: tuple[int | None, ...]
    experts: bool = False


def work_of(model: Any) -> Work:
    """Count the weights of `model`'s linear layers (4-bit ones by their true shape) and read its attention's shape."""
    base = base_model(model)
    head = base.get_output_embeddings()
    inside_head = {id(module) for module in head.modules()} if head is not None else set()
    passive = {id(module) for wrapper in base.modules() for module in _passive(wrapper)}
    frozen_weights = trained = head_weights = 0
    head_trained = False
    for module in base.modules():
        if not isinstance(module, nn.Linear) or id(module) in passive:
            continue
        count, learns = module.in_features * module.out_features, module.weight.requires_grad
        if id(module) in inside_head and count >= head_weights:
            head_weights, head_trained = count, learns
        elif learns:
            trained += count
        else:
            frozen_weights += count
    config = base.config.get_text_config()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    experts = any(parameter.ndim == 3 for parameter in base.parameters())
    return Work(frozen_weights, trained, head_weights, head_trained, width, windows_of(config), experts)


def flops(work: Work, counts: Mapping[str, float]) -> float:
    """Return the operations for `counts`: `non_padding` and `loss_bearing` tokens, `pairs` of the full context, and
    `pairs_<w>` for every window w. The head is counted on loss-bearing tokens alone: no other needs logits.
    """
    layers = counts["non_padding"] * (4 * work.frozen + 6 * work.trained)
    head = counts["loss_bearing"] * work.head * (6 if work.head_trained else 4)
    pairs = sum(counts[pairs_name(window)] for window in work.windows)
    return layers + head + 12.0 * work.attention_width * pairs


def pairs_name(window: int | None) -> str:
    """Return the name under which the visible pairs of a window are counted."""
    return "pairs" if window is None else f"pairs_{window}"


def count_batch(batch: Mapping[str, Any], targets: Tensor, windows: set[int | None]) -> dict[str, Tensor]:
    """Count a batch's tokens without waiting for the device: scalars `all`, `non_padding`, `loss_bearing`, pairs.

    What fills a batch up (`filler`) is padding.
    """
    ids = batch["input_ids"]
    mask, positions, filler = (batch.get(name) for name in ("attention_mask", "position_ids", "filler"))
    real = ids.new_ones(ids.shape)
    if filler is not None:
        real = (real.flatten().cumsum(dim=0) <= ids.numel() - filler.to(ids.device).sum()).view_as(ids).to(ids.dtype)
    if positions is not None and positions.shape == ids.shape and mask is None:
        seen = (positions + 1) * real
    elif mask is not None and mask.ndim == 2:
        real = real * mask
        seen = real.cumsum(dim=-1) * real
    else:
        seen = real.cumsum(dim=-1) * real
    counts = {
        "all": ids.new_full((), ids.numel()),  # made on the device: the host would wait for a copy
        "non_padding": real.sum(),
        "loss_bearing": targets.ne(-100).sum(),
    }
    for window in windows | {None}:
        counts[pairs_name(window)] = (seen if window is None else seen.clamp(max=window)).sum()
    return counts


def peak_flops(device: Any, dtype: Any) -> float | None:
    """Return the device's dense 16-bit peak in FLOP/s, or None where it, or the dtype's, is not known."""
    import torch

    if torch.device(device).type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS if part in name), None)


def _passive(wrapper: nn.Module) -> list[nn.Module]:
    """Return the copy that PEFT keeps beside a module it trains as a whole: it takes no part in the forward pass."""
    original, saved = getattr(wrapper, "original_module", None), getattr(wrapper, "modules_to_save", None)
    return list(original.modules()) if isinstance(original, nn.Module) and saved else []


def windows_of(config: Any) -> tuple[int | None, ...]:
    """Return for every attention layer how many tokens a token sees, itself included; None: all before it."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return (window,) * config.num_hidden_layers
    return tuple(window if "sliding" in kind else None for kind in kinds)
