"""Packed batches filled up to one number of tokens, so that all of a run have one shape and are compiled for once.

Packed rows are seldom quite full, and each batch would be a few tokens shorter than the room there is. The tokens that
fill it up bear no loss, and no document sees them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from fastft.data.mask import IGNORE

# Packed rows that are less full than this are left as they are: filling them up would cost more than it gives.
LEAST_FILL = 15 / 16
FILLER = "filler"


@frozen
class Filling:
    """Of the batches of a run: how many tokens each is to have, and how many its longest document has at most."""

    tokens: int
    longest: int


def filling_of(statistics: Mapping[str, Any], rows: int) -> Filling | None:
    """Return what batches of `rows` packed rows are to be filled up to, None where they are not full enough for it.

    `statistics` are those of the packing.
    """
    if statistics["fill"] < LEAST_FILL:
        return None
    return Filling(rows * statistics["max_length"], statistics["longest"])


def filled(batch: Mapping[str, Any], filling: Filling, token: int) -> dict[str, Any]:
    """Return a packed batch, one row of documents end to end, with `token`s behind it up to `filling.tokens`.

    They are documents of their own, of `filling.longest` tokens at most. `filler`, an int64 scalar, says how many there
    are. A batch that has more tokens than that comes back as it is.
    """
    room = filling.tokens - batch["input_ids"].shape[1]
    if room < 0 or batch["max_length_q"] > filling.longest:
        return dict(batch)
    places = torch.arange(room) % filling.longest
    made = dict(batch)
    for name, behind in (
        ("input_ids", torch.full_like(places, token)),
        ("labels", torch.full_like(places, IGNORE)),
        ("position_ids", places),
    ):
        made[name] = torch.cat([batch[name], behind.to(batch[name])[None]], dim=1)
    ends = batch["cu_seq_lens_q"]
    more = torch.arange(0, room, filling.longest, dtype=ends.dtype)[1:] + ends[-1]
    offsets = torch.cat([ends, more, ends.new_full((1 if room else 0,), filling.tokens)])
    if "seq_idx" in batch:
        made["seq_idx"] = _numbers(offsets).to(batch["seq_idx"])
    return made | {
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets,
        "max_length_q": filling.longest,
        "max_length_k": filling.longest,
        FILLER: torch.tensor(room),
    }


def _numbers(offsets: Tensor) -> Tensor:
    """Return for each token the number of its document, [1, T]."""
    sizes = offsets.diff().long()
    return torch.repeat_interleave(torch.arange(len(sizes)), sizes)[None]
