"""Batches of few kinds: rows filled up, one longest document for all; the same loss, gradients and counts."""

import pytest
import torch

from fastft.data.packing import pack
from fastft.data.training_collator import CountingCollator, lengths_vary, longest_document
from fastft.graph.twin import tiny_model
from fastft.train import flops, step

EXAMPLES = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}]


def data_of(sizes):
    from datasets import Dataset

    return Dataset.from_dict({name: [[5] * size for size in sizes] for name in ("input_ids", "labels")})


def test_padded_batches_have_as_many_rows_as_asked_for():
    plain, full = (CountingCollator(pad_token_id=0, rows=rows)([dict(one) for one in EXAMPLES]) for rows in (None, 4))
    assert full["input_ids"].tolist() == [*plain["input_ids"].tolist(), [8, 9, 0], [8, 9, 0]]
    assert (full["labels"][2:] == -100).all() and full["valid_rows"] == plain["valid_rows"] == 3
    assert int(full["filler"]) == 6 and full["right_padded"] is True and "filler" not in plain
    counts = [flops.count_batch(one, step.shifted_labels(one), {2}) for one in (plain, full)]
    assert int(counts[0].pop("all")) == 6 and int(counts[1].pop("all")) == 12
    assert counts[0] == counts[1] and int(counts[1]["non_padding"]) == 5
    enough = CountingCollator(pad_token_id=0, rows=1)(EXAMPLES)
    assert torch.equal(enough["input_ids"], plain["input_ids"]) and int(enough["filler"]) == 0
    assert "filler" not in step.without_labels(full)


def test_what_fills_up_documents_end_to_end_is_padding():
    plain, full = (
        CountingCollator(pad_token_id=0, padding_free=True, pad_to_multiple_of=multiple)(
            [dict(one) for one in EXAMPLES]
        )
        for multiple in (None, 8)
    )
    assert plain["input_ids"].shape == (1, 5) and full["input_ids"].shape == (1, 8) and int(full["filler"]) == 3
    counts = [flops.count_batch(one, step.shifted_labels(one), {2}) for one in (plain, full)]
    assert int(counts[0].pop("all")) == 5 and int(counts[1].pop("all")) == 8
    assert counts[0] == counts[1] and int(counts[1]["non_padding"]) == 5


@pytest.mark.parametrize("attention", ["eager", "sdpa", "fastft"])
def test_rows_that_fill_a_batch_up_change_neither_loss_nor_gradients(attention):
    """In fp64, also where the mask is made: no row is masked as a whole."""
    from fastft.graph import attention as ours

    ours.register()
    model = tiny_model("gemma2" if attention == "eager" else "llama", dtype=torch.float64).double().train()
    model.set_attn_implementation(attention)
    found = []
    for rows in (None, 5):
        model.zero_grad()
        batch = CountingCollator(pad_token_id=0, rows=rows)(EXAMPLES)
        loss = step.loss(model, batch)
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((loss.item(), gradients))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-9)
    assert (found[1][1] - found[0][1]).norm() <= 1e-9 * found[0][1].norm() > 0


def test_batches_of_documents_say_one_longest():
    data, _ = pack(data_of([7, 5, 4, 3, 2]), 8)
    assert longest_document(data) == 7 and longest_document(data_of([4, 9, 2])) == 9
    assert longest_document(data.to_iterable_dataset()) is None
    for longest, wanted in ((None, 5), (7, 7), (3, 5), (100, 8)):
        collator = CountingCollator(pad_token_id=0, padding_free=True, longest=longest)
        batch = collator([row for row in data if max(row["seq_lengths"]) == 5])
        assert batch["max_length_q"] == batch["max_length_k"] == wanted


@pytest.mark.parametrize(
    "sizes, multiple, vary",
    [
        ((5,) * 9, None, False), ((5, 6, 7), None, True), ((5, 6, 7), 8, False), ((5, 9, 16), 8, True),
        ((9, 16), 8, False), ((9,) * 99 + (5,), None, False), ((9,) * 4 + (5,) * 5, None, True),
    ],
)  # fmt: skip
def test_lengths_vary_where_many_batches_are_of_another_length(sizes, multiple, vary):
    """In batches of two: of rows padded to the longest of the batch, and end to end, where each row counts."""
    rows = data_of(sizes)
    assert lengths_vary(rows, CountingCollator(pad_token_id=0, pad_to_multiple_of=multiple), 2) is vary
    end_to_end = CountingCollator(pad_token_id=0, pad_to_multiple_of=multiple, padding_free=True)
    assert lengths_vary(rows, end_to_end, 2) is (len(set(sizes)) > 1 and len(sizes) < 99)
    assert lengths_vary(data_of((9,) * 99 + (5,)), end_to_end, 32)
    assert not lengths_vary(rows.to_iterable_dataset(), end_to_end, 2)
