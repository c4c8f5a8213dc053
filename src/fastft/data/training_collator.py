"""The collator that trains, and the proof that another one leaves the labels as they are."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import pyarrow.compute
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from fastft.data import columns
from fastft.data.mask import IGNORE
from fastft.errors import DataError, Problem

PROBED = 8
# In a batch: how many of its tokens fill it up, int64 [1]; they are the last ones, row after row.
FILLER = "filler"
# Share of a run's batches that may be of another length than most without lengths being said to vary.
FEW = 1 / 16


@dataclasses.dataclass
class CountingCollator(DataCollatorForLanguageModeling):
    """TRL's collator, which also says what the loss would otherwise have to ask the device for.

    `valid_rows` is the number of targets; `right_padded` that no token stands behind padding. Padding is masked by the
    rows' lengths, never by its id, so that the pad token may be the stop token.

    So that all batches of a run are compiled for once: with `rows` a padded batch has that many, the last of an epoch
    too. It is filled up with its last row without loss, and `filler` [1] says how many tokens these are; or how many
    fill up documents end to end to a multiple of a length. With `longest` a batch of documents end to end has the
    length of its longest rounded up to a power of two, to `longest` at most.
    """

    rows: int | None = None
    longest: int | None = None

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return TRL's batch with `valid_rows`, an int, and where there is a mask `right_padded`, a bool."""
        missing = 0 if self.rows is None else max(0, self.rows - len(examples))
        without_loss = {**examples[-1], "labels": [IGNORE] * len(examples[-1]["input_ids"])}
        batch = super().torch_call([*examples, *[without_loss] * missing])
        if self.rows is not None:
            batch[FILLER] = torch.tensor([missing * batch["input_ids"].shape[1]])
        elif self.padding_free and self.pad_to_multiple_of:
            held = sum(len(example["input_ids"]) for example in examples)
            batch[FILLER] = torch.tensor([batch["input_ids"].numel() - held])
        if self.longest is not None and "max_length_q" in batch:
            own = batch["max_length_q"]
            rounded = max(own, min(self.longest, 1 << (own - 1).bit_length()))
            batch["max_length_q"] = batch["max_length_k"] = rounded
        mask = batch.get("attention_mask")
        if mask is not None:
            batch["right_padded"] = bool((mask[:, 1:] <= mask[:, :-1]).all())
        targets, positions = batch["labels"], batch.get("position_ids")
        if positions is not None:
            targets = targets.masked_fill(positions == 0, IGNORE)
        targets = targets[:, 1:]
        return {**batch, "valid_rows": int(targets.ne(IGNORE).sum())}


def lengths_vary(dataset: Any, collator: CountingCollator, rows: int) -> bool:
    """Say whether many batches of `rows` of a data set of token ids have other lengths than most, as they are collated.

    Of a stream that is not known, and not said.
    """
    if not hasattr(dataset, "__len__") or "input_ids" not in dataset.column_names or not len(dataset):
        return False
    multiple = 1 if collator.padding_free else collator.pad_to_multiple_of or 1
    padded = -(-columns.lengths(dataset) // multiple)
    longest = float((padded == padded.max()).mean())  # the share of rows that are
    alike = longest**rows if collator.padding_free else 1 - (1 - longest) ** rows
    return 1 - alike > FEW


def longest_document(dataset: Any) -> int | None:
    """Return the length of the longest document of a data set of token ids, packed or not; None if it is a stream."""
    if not hasattr(dataset, "__len__") or "input_ids" not in dataset.column_names:
        return None
    if "seq_lengths" not in dataset.column_names:
        return int(columns.lengths(dataset).max(initial=0))
    parts = dataset.select_columns(["seq_lengths"]).with_format("arrow").iter(1000)
    return max(
        (pyarrow.compute.max(part["seq_lengths"].combine_chunks().flatten()).as_py() for part in parts), default=0
    )


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
