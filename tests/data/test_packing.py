"""First-fit-decreasing exactly; nothing lost or doubled; positions anew in every document; the same loss."""

import time
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft.data import packing
from fastft.data.collate import collate
from fastft.data.packing import pack, pack_lengths, pack_stream
from fastft.data.training_collator import CountingCollator
from fastft.errors import DataError, UsageError
from fastft.graph.twin import tiny_model
from fastft.train import step


def plain_first_fit(lengths, room):
    packed, left = [], []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        place = next((place for place, free in enumerate(left) if free >= lengths[row]), None)
        if place is None:
            packed.append([])
            left.append(room)
            place = len(left) - 1
        packed[place].append(row)
        left[place] -= lengths[row]
    return packed


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_it_is_first_fit_decreasing(data):
    room = data.draw(st.integers(1, 40))
    lengths = data.draw(st.lists(st.integers(1, room), min_size=1, max_size=80))
    found = pack_lengths(lengths, room)
    assert [rows.tolist() for rows in found] == plain_first_fit(lengths, room)
    assert len(found) == len(plain_first_fit(lengths, room))
    told = found.statistics()
    assert told["fill"] == sum(lengths) / (len(found) * room)
    assert told["fill_padded"] == sum(lengths) / (len(lengths) * max(lengths))


def random_rows(count, seed=0, longest=30):
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        ids = generator.integers(3, 250, generator.integers(2, longest)).tolist()
        labels = [-100 if generator.random() < 0.4 else token for token in ids]
        rows.append({"input_ids": ids, "labels": labels[:-1] + ids[-1:]})
    return rows


@pytest.mark.parametrize("gathered", [40, 1_000_000])
def test_nothing_is_lost_or_doubled(gathered, monkeypatch, tmp_path):
    from datasets import Dataset

    monkeypatch.setattr(packing, "GATHERED", gathered)
    rows = random_rows(100)
    data = Dataset.from_list(rows)
    whole, told = pack(data, 64)
    shuffled, _ = pack(data.shuffle(seed=1), 64)
    for made in (whole, shuffled):
        documents = []
        for row in made:
            assert sum(row["seq_lengths"]) == len(row["input_ids"]) == len(row["labels"]) <= 64
            start = 0
            for size in row["seq_lengths"]:
                part = slice(start, start + size)
                documents.append({"input_ids": row["input_ids"][part], "labels": row["labels"][part]})
                start += size
        assert sorted(map(str, documents)) == sorted(map(str, rows))
    assert told["rows"] == 100 and told["packed_rows"] == len(whole) and 0.9 < told["fill"] <= 1
    monkeypatch.setattr(packing, "IN_MEMORY", 10)  # on disk
    kept, _ = pack(data, 64)
    assert kept[:] == whole[:] and kept.cache_files and pack(data, 64)[0].cache_files == kept.cache_files


def test_positions_begin_anew_in_every_document():
    from datasets import Dataset

    data, _ = pack(Dataset.from_list(random_rows(20)), 64)
    batch = CountingCollator(pad_token_id=0, padding_free=True)([data[0], data[1]])
    sizes = [*data[0]["seq_lengths"], *data[1]["seq_lengths"]]
    assert batch["position_ids"].tolist() == [[place for size in sizes for place in range(size)]]
    assert "attention_mask" not in batch
    firsts = batch["position_ids"] == 0
    assert (batch["labels"][firsts] == -100).all()
    assert batch["valid_rows"] == int(step.shifted_labels(batch).ne(-100).sum())


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_a_packed_batch_has_the_loss_of_its_rows_alone(model_type):
    """Summed over targets and divided by their number, in fp64; gradients as well."""
    from datasets import Dataset

    rows = random_rows(12, seed=3)
    data, _ = pack(Dataset.from_list(rows), 64)
    model = tiny_model(model_type, dtype=torch.float64).double().train()
    model.set_attn_implementation("eager")
    collator = CountingCollator(pad_token_id=0, padding_free=True)
    count = sum(int(step.shifted_labels(collate([row])).ne(-100).sum()) for row in rows)
    losses, gradients = [], []
    for batches in ([collator([row]) for row in data], [collate([row]) for row in rows]):
        model.zero_grad()
        total = sum(step.loss(model, batch, count) for batch in batches)
        total.backward()
        losses.append(total.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert losses[0] == pytest.approx(losses[1], rel=2e-6)
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm()
    joined = {**collator([data[0]])}
    joined["position_ids"] = torch.arange(joined["position_ids"].numel())[None]  # one long document: another loss
    assert abs(step.loss(model, joined).item() - step.loss(model, collator([data[0]])).item()) > 1e-4


def test_streams_are_packed_in_windows(monkeypatch):
    from datasets import Dataset

    monkeypatch.setattr(packing, "WINDOW", 7)
    rows = random_rows(20)
    made = list(pack_stream(Dataset.from_list(rows).to_iterable_dataset(), 64))
    for name in ("input_ids", "labels"):
        assert sorted(chain(*(row[name] for row in made))) == sorted(chain(*(row[name] for row in rows)))
    assert sum(len(row["seq_lengths"]) for row in made) == 20
    assert all(len(row["input_ids"]) == len(row["labels"]) == sum(row["seq_lengths"]) <= 64 for row in made)


def test_what_cannot_be_packed():
    with pytest.raises(DataError, match=r"row 1: expected 1 to max_length=8, got '9 tokens'.*\n?.*row 2"):
        pack_lengths([8, 9, 0], 8)
    with pytest.raises(UsageError, match="max_length"):
        pack_lengths([1], 0)
    assert len(pack_lengths([], 8)) == 0


def test_a_million_rows_take_seconds():
    lengths = np.random.default_rng(0).integers(1, 2049, 1_000_000)
    start = time.process_time()
    found = pack_lengths(lengths, 2048)
    assert time.process_time() - start < 20  # about one on an idle core
    assert found.statistics()["fill"] > 0.99
    assert (np.sort(found.order) == np.arange(len(lengths))).all()
