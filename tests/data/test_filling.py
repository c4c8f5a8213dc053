"""Packed batches filled up to one shape: the same documents, loss and gradients; and which runs do it."""

import pytest
import torch

from fastft.data.filling import LEAST_FILL, Filling, filled, filling_of
from fastft.data.packing import pack
from fastft.data.training_collator import CountingCollator
from fastft.graph.twin import tiny_model
from fastft.train import flops, step


def packed_rows(sizes, limit=16, seed=0):
    from datasets import Dataset

    made = torch.Generator().manual_seed(seed)
    rows = []
    for size in sizes:
        ids = torch.randint(3, 250, (size,), generator=made).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (size // 3) + ids[size // 3 :]})
    return pack(Dataset.from_list(rows), limit)


def batches(filling, *sizes):
    data, _ = packed_rows(sizes)
    rows = [data[index] for index in range(len(data))]
    made = (CountingCollator(pad_token_id=0, padding_free=True, filling=one) for one in (None, filling))
    return [collator(rows) for collator in made]


def test_what_fills_a_batch_up_is_documents_of_their_own_without_loss():
    plain, full = batches(Filling(40, 7), 7, 5, 4, 3)
    assert plain["input_ids"].shape == (1, 19) and full["input_ids"].shape == (1, 40)
    for name in ("input_ids", "labels", "position_ids", "seq_idx"):
        assert torch.equal(full[name][:, :19], plain[name]), name
    ends = plain["cu_seq_lens_q"].tolist()
    assert full["cu_seq_lens_q"].tolist() == [*ends, 26, 33, 40] and full["cu_seq_lens_q"].dtype == torch.int32
    assert full["position_ids"][0, 19:].tolist() == [*range(7)] * 3
    assert full["seq_idx"][0, 19:].tolist() == [len(ends) - 1 + place // 7 for place in range(21)]
    assert (full["labels"][0, 19:] == -100).all() and (full["input_ids"][0, 19:] == 0).all()
    assert full["max_length_q"] == full["max_length_k"] == 7 and int(full["filler"]) == 21
    assert full["valid_rows"] == plain["valid_rows"] == int(step.shifted_labels(full).ne(-100).sum())
    counts = [flops.count_batch(one, step.shifted_labels(one), {4}) for one in (plain, full)]
    assert int(counts[0].pop("all")) == 19 and int(counts[1].pop("all")) == 40
    assert counts[0] == counts[1] and int(counts[1]["non_padding"]) == 19


def test_a_batch_without_room_only_says_its_longest_document_as_all_do():
    plain, full = batches(Filling(16, 16), 9, 7)
    assert int(full["filler"]) == 0 and full["max_length_q"] == 16 and plain["max_length_q"] == 9
    assert torch.equal(full["cu_seq_lens_q"], plain["cu_seq_lens_q"])
    for filling in (Filling(15, 16), Filling(32, 8)):  # too many tokens, too long a document
        given, same = batches(filling, 9, 7)
        assert same.keys() == given.keys() and same["max_length_q"] == 9 and same["input_ids"].shape == (1, 16)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gemma3_text"])
def test_a_filled_batch_has_the_loss_and_the_gradients_of_the_batch(model_type):
    """In fp64, with sliding windows too; of a model that reads offsets and of one that reads positions."""
    plain, full = batches(Filling(60, 16), *(7, 16, 5, 4, 3, 9))
    for attention in ("eager", "fastft"):
        model = tiny_model(model_type, dtype=torch.float64).double().train()
        if attention == "fastft":
            from fastft.graph import attention as ours

            ours.register()
        model.set_attn_implementation(attention)
        losses, gradients = [], []
        for batch in (plain, full):
            model.zero_grad()
            loss = step.loss(model, batch)
            loss.backward()
            losses.append(loss.item())
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        assert losses[1] == pytest.approx(losses[0], rel=1e-9)
        assert (gradients[1] - gradients[0]).norm() <= 1e-8 * gradients[0].norm() > 0


def test_rows_that_are_not_full_are_left_as_they_are():
    """First-fit-decreasing of rows of more than half of the room leaves the rest of it empty."""
    _, told = packed_rows([15] * 20)
    assert told["fill"] == 15 / 16 == LEAST_FILL and told["longest"] == 15
    assert filling_of(told, 3) == Filling(48, 15)
    _, told = packed_rows([15] * 20 + [9])
    assert told["fill"] < LEAST_FILL and filling_of(told, 3) is None


def test_token_and_filling_are_those_that_were_given():
    plain, _ = batches(None, 7, 5)
    made = filled(plain, Filling(14, 9), 42)
    assert made["input_ids"][0, 12:].tolist() == [42, 42]
    assert "filler" not in step.without_labels(made)
