"""Random batches, the same for every arm."""

import torch
from torch import Tensor

from benchmarks.cells import Cell
from benchmarks.shapes import shape_of


def batch_of(cell: Cell, index: int, device: str) -> dict[str, Tensor]:
    """Return batch number `index`: `input_ids` and `labels` int64 [B, T], and `attention_mask` where there is padding.

    Rows are padded on the right. Labels are the ids; -100 stands at padding and before the completion.
    """
    generator = torch.Generator().manual_seed(cell.seed * 100_003 + index)
    ids = torch.randint(0, shape_of(cell.shape).vocabulary, (cell.batch, cell.length), generator=generator)
    shares = torch.rand(cell.batch, 1, generator=generator) * cell.padding
    real = (cell.length * (1 - shares)).long().clamp(min=2)
    start = (real * (1 - cell.completion)).long()
    places = torch.arange(cell.length)
    made = {"input_ids": ids, "labels": ids.masked_fill((places >= real) | (places < start), -100)}
    if cell.padding:
        made["attention_mask"] = (places < real).long()
    return {name: tensor.to(device) for name, tensor in made.items()}
