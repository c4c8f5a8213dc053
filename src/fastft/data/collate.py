"""Rows of token ids to tensors: padded, or laid end to end without padding."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fastft.errors import DataError, Problem


def collate(
    rows: Sequence[Mapping[str, Any]],
    pad_token_id: int = 0,
    *,
    packed: bool = False,
    side: Literal["left", "right"] = "right",
) -> dict[str, Tensor]:
    """Make one batch of rows with `input_ids` and, if some tokens are not to be learnt, `labels` (-100 there).

    Padded: `input_ids`, `labels`, `attention_mask`, int64 `[B, T]` with T the longest row. Packed: one row `[1, sum of
    lengths]` with `position_ids` that start again at 0 in every document, its first label -100, and no padding.
    Raises `DataError` for an empty row or for labels of another length.
    """
    problems = [
        Problem(f"row {index}", len(row["input_ids"]), "at least one token, and as many labels as tokens")
        for index, row in enumerate(rows)
        if not len(row["input_ids"]) or len(row.get("labels", row["input_ids"])) != len(row["input_ids"])
    ]
    if problems or not rows:
        raise DataError(*(problems or [Problem("rows", 0, "at least one row")]))
    ids = [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows]
    labels = [torch.as_tensor(row.get("labels", row["input_ids"]), dtype=torch.long) for row in rows]
    if packed:
        positions = torch.cat([torch.arange(len(part)) for part in ids])[None]
        joined = torch.cat(labels)[None].masked_fill(positions == 0, -100)
        return {"input_ids": torch.cat(ids)[None], "labels": joined, "position_ids": positions}
    mask = [torch.ones_like(part) for part in ids]
    padded = {"input_ids": (ids, pad_token_id), "labels": (labels, -100), "attention_mask": (mask, 0)}
    return {
        name: torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value, padding_side=side)
        for name, (parts, value) in padded.items()
    }
