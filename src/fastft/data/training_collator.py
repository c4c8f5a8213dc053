"""The collator that trains, and the proof that another one leaves the labels as they are."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from fastft.data.filling import Filling, filled
from fastft.data.mask import IGNORE
from fastft.errors import DataError, Problem

PROBED = 8


@dataclasses.dataclass
class CountingCollator(DataCollatorForLanguageModeling):
    """TRL's collator, which also says what the loss would otherwise have to ask the device for.

    `valid_rows` is the number of targets; `right_padded` that no token stands behind padding. Padding is masked by the
    rows' lengths, never by its id, so that the pad token may be the stop token. Packed batches are filled up to
    `filling`, if there is one, and say by how many tokens (`filler`).
    """

    filling: Filling | None = None

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return TRL's batch with `valid_rows`, an int, and where there is a mask `right_padded`, a bool."""
        batch = super().torch_call(examples)
        if self.filling is not None and "cu_seq_lens_q" in batch:
            batch = filled(batch, self.filling, self.pad_token_id)
        mask = batch.get("attention_mask")
        if mask is not None:
            batch["right_padded"] = bool((mask[:, 1:] <= mask[:, :-1]).all())
        targets, positions = batch["labels"], batch.get("position_ids")
        if positions is not None:
            targets = targets.masked_fill(positions == 0, IGNORE)
        targets = targets[:, 1:]
        return {**batch, "valid_rows": int(targets.ne(IGNORE).sum())}


def training_collator(
    tokenizer: Any, *, packed: bool = False, pad_to_multiple_of: int | None = None
) -> CountingCollator:
    """Return the collator that `SFTTrainer` trains with; `packed`: with `packing` or `padding_free`."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return CountingCollator(pad_token_id=pad or 0, padding_free=packed, pad_to_multiple_of=pad_to_multiple_of)


def refuse_other_labels(
    collator: Callable[[list[Any]], Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], stops: Collection[int] = ()
) -> None:
    """Run `collator` on `rows`, and raise `DataError` if other tokens bear loss in the batch than the rows' labels say.

    So it is with collators that make the labels themselves, and with those that mask by the pad token's id where that
    is the stop token's, too. `stops` are the ids of the stop tokens.
    """
    rows = [{name: row[name] for name in ("input_ids", "labels", "seq_lengths") if name in row} for row in rows]
    if not rows or any("labels" not in row for row in rows):
        return
    kept: Counter[int] = Counter()
    for row in rows:  # one at a time: some collators cannot pad labels
        found = collator([dict(row)]).get("labels")
        if found is None:
            return
        kept.update(found[found != IGNORE].tolist())
    most = Counter(label for row in rows for label in row["labels"] if label != IGNORE)
    least = Counter(label for row in rows for label in _targets(row))  # a document's first token is never predicted
    if not (least - kept or kept - most):
        return
    count, left = sum(least[stop] for stop in stops), sum(kept[stop] for stop in stops)
    name = type(collator).__name__
    if left < count:
        remedy = (
            "It masks by the pad token's id, which is the stop token's: the model would never learn to stop. Leave "
            "data_collator out (fastft's masks by length), or give the tokenizer a pad token of its own."
        )
        where = f"data_collator {name}: loss-bearing stop tokens in {len(rows)} rows"
        raise DataError(Problem(where, left, f"{count}, as the labels of the rows say", remedy))
    where = f"data_collator {name}: loss-bearing tokens in {len(rows)} rows"
    remedy = "It makes labels of its own; leave data_collator out, or give one that pads the rows' labels with -100."
    raise DataError(Problem(where, kept.total(), f"{least.total()}, as the labels of the rows say", remedy))


def _targets(row: Mapping[str, Any]) -> list[int]:
    """Return the labels of a row without those of its documents' first tokens."""
    firsts, start = set(), 0
    for size in row.get("seq_lengths") or [len(row["input_ids"])]:
        firsts.add(start)
        start += size
    return [label for place, label in enumerate(row["labels"]) if label != IGNORE and place not in firsts]
