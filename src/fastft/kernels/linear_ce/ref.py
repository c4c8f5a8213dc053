"""Linear layer and cross entropy in plain torch, with all logits at once, differentiable by autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    num_items: Tensor | float | None = None,
) -> Tensor:
    """Return the loss of `fastft.kernels.linear_ce.op.linear_cross_entropy`, whose arguments these are."""
    logits = F.linear(
        hidden.reshape(-1, hidden.shape[-1]),
        weight.to(hidden.dtype),
        None if bias is None else bias.to(hidden.dtype),
    )
    if not (isinstance(logits, Tensor) and logits.dtype == torch.float64):
        logits = logits.float()
    logits = logits * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    labels = labels.reshape(-1)
    total = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum", label_smoothing=label_smoothing)
    return total / ((labels != ignore_index).sum() if num_items is None else num_items)
