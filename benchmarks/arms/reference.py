"""The judge of all arms: eager transformers and PEFT, attention with scores and softmax in fp32, one row at a time.

It runs twice: under bf16 autocast as the arms do, and widened to fp32 (`benchmarks.truth`), which is the truth.

Rows go through the model one by one, without their padding, and their gradients are summed; layers are checkpointed.
Both change only the order of sums, and let the reference run in less memory than the arms that it judges.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from benchmarks.arms import Trainee
from benchmarks.cells import Task
from benchmarks.weights import build

NAME = "fp32-softmax"
QUERIES = 512


def prepare(task: Task, options: tuple[str, ...], device: str) -> Trainee:
    """Return the model with the reference attention; its loss function goes backward row by row by itself."""
    AttentionInterface.register(NAME, attention)
    model = build(task.cell, device)
    base = model.get_base_model() if task.cell.mode != "full" else model
    base.set_attn_implementation(NAME)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if task.cell.mode != "full":
        model.enable_input_require_grads()
    return Trainee(model, lambda batch: by_rows(model, batch))


def by_rows(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the batch's loss after adding every row's share of it to the gradients."""
    items = batch["labels"][:, 1:].ne(-100).sum().item()
    total = torch.zeros((), device=batch["input_ids"].device)
    mask = batch.get("attention_mask")
    for index, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
        real = ids.numel() if mask is None else int(mask[index].sum())
        loss = model(
            input_ids=ids[None, :real], labels=labels[None, :real], use_cache=False, num_items_in_batch=items
        ).loss
        loss.backward()
        total += loss.detach()
    return total


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of query [1, H, T, D] over key and value [1, Hk, T, D] -> ([1, T, H, D], None).

    Blocks of queries, each computed again in the backward pass. Raises ValueError for what is not part of it.
    """
    if attention_mask is not None or kwargs.get("softcap") or kwargs.get("dropout"):
        raise ValueError("the reference attention is causal, without a mask, a soft cap or dropout")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    repeat = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(repeat, dim=1) for tensor in (key, value))
    blocks = [
        checkpoint(_block, query, key, value, start, scale, sliding_window, use_reentrant=False)
        for start in range(0, query.shape[2], QUERIES)
    ]
    return torch.cat(blocks, dim=2).transpose(1, 2).contiguous(), None


def _block(query: Tensor, key: Tensor, value: Tensor, start: int, scale: float, window: int | None) -> Tensor:
    end = min(start + QUERIES, query.shape[2])
    first = 0 if window is None else max(0, start - window + 1)
    rows = torch.arange(start, end, device=query.device)[:, None]
    columns = torch.arange(first, end, device=query.device)
    seen = columns <= rows if window is None else (columns <= rows) & (columns > rows - window)
    with torch.autocast(query.device.type, enabled=False):
        scores = query[:, :, start:end].float() @ key[:, :, first:end].float().transpose(-1, -2) * scale
        weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
        return (weights @ value[:, :, first:end].float()).to(value.dtype)
