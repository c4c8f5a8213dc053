"""One training step as all arms take it: bf16 autocast, forward, backward, AdamW."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.arms import Trainee


def optimizer_of(trainee: Trainee, rate: float, device: str) -> torch.optim.Optimizer:
    """Return AdamW over what is trained, fused on a GPU."""
    weights = [parameter for parameter in trainee.model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(weights, lr=rate, fused=device == "cuda")


def step(trainee: Trainee, optimizer: torch.optim.Optimizer, batch: Mapping[str, Tensor], device: str) -> Any:
    """Take a step and return its loss, from before the update. The gradients are left for who wants to see them."""
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = trainee.loss(batch)
    loss.backward()
    optimizer.step()
    return loss
