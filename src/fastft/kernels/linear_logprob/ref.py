"""Linear layer and log-probabilities in plain torch, with all logits at once, differentiable by autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
    temperature: float = 1.0,
    entropy: bool = False,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor | None]:
    """Return what `fastft.kernels.linear_logprob.op.linear_logprob` does, whose arguments these are."""
    logits = F.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
    if logits.dtype != torch.float64:
        logits = logits.float()
    logits = logits * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = torch.log_softmax(logits / temperature, dim=-1)
    ignored = targets == ignore_index
    logprobs = log_p.gather(-1, targets.masked_fill(ignored, 0)[..., None]).squeeze(-1).masked_fill(ignored, 0)
    if not entropy:
        return logprobs, None
    finite = log_p.masked_fill(log_p == -float("inf"), 0)  # a forbidden token adds 0, not 0 times infinity
    return logprobs, -(log_p.exp() * finite).sum(-1).masked_fill(ignored, 0)
