"""The trainer's data: what it refuses, what it packs, and labels that reach the loss as they are."""

import json
from pathlib import Path

import pytest
import trl
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling

from fastft.data.responses import train_on_responses_only
from fastft.errors import DataError
from fastft.train.sft.config import SFTConfig
from fastft.train.sft.run import sft
from fastft.train.sft.trainer import SFTTrainer

CHATS = [
    {
        "messages": [
            {"role": "user", "content": " ".join(f"w{(n * place) % 80}" for place in range(1, 4 + n % 5))},
            {"role": "assistant", "content": f"w{n}"},
        ]
    }
    for n in range(12)
]


def make(kind, build_model, tokenizer, data, settings, config=SFTConfig, **more):
    options = {} if kind is trl.SFTTrainer else {"compile": False}
    return kind(build_model(), config(**settings), train_dataset=data, processing_class=tokenizer, **options, **more)


def decoded(trainer, tokenizer):
    batch = next(iter(trainer.get_train_dataloader()))
    return {tokenizer.decode(row[row != -100]) for row in batch["labels"]}


@pytest.mark.parametrize("kind", [SFTTrainer, trl.SFTTrainer])
def test_responses_alone_bear_loss_in_a_trainer(kind, build_model, tokenizer, settings):
    """Also where the pad token is the stop token: padding is masked by length."""
    config = SFTConfig if kind is SFTTrainer else trl.SFTConfig
    tokenizer.pad_token = tokenizer.eos_token
    options = {**settings, "report_to": "none", "assistant_only_loss": False}
    trainer = make(kind, build_model, tokenizer, Dataset.from_list(CHATS), options, config)
    before = decoded(trainer, tokenizer)
    assert all("<|user|>" in text for text in before)
    assert train_on_responses_only(trainer) is trainer
    after = decoded(trainer, tokenizer)
    assert all(text.endswith("</s>") and "<|" not in text and text.count("w") == 1 for text in after)


def test_collators_that_make_other_labels_are_refused(build_model, tokenizer, settings):
    data = train_on_responses_only(make(SFTTrainer, build_model, tokenizer, Dataset.from_list(CHATS), settings))
    rows, other = data.train_dataset, DataCollatorForLanguageModeling(tokenizer, mlm=False)
    with pytest.raises(
        DataError, match=r"DataCollatorForLanguageModeling: loss-bearing tokens in 8 rows.*as the labels"
    ):
        make(SFTTrainer, build_model, tokenizer, rows, settings, data_collator=other)
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(DataError, match=r"loss-bearing stop tokens in 8 rows: expected 8.*got 0.*pad token"):
        make(SFTTrainer, build_model, tokenizer, rows, settings, data_collator=other)
    stock = {**settings, "report_to": "none"}
    trainer = make(
        trl.SFTTrainer, build_model, tokenizer, Dataset.from_list(CHATS), stock, trl.SFTConfig, data_collator=other
    )
    with pytest.raises(DataError, match="stop tokens in 8 rows"):
        train_on_responses_only(trainer)
    make(SFTTrainer, build_model, tokenizer, rows, settings)  # its own collator masks by length


def test_data_without_an_end_are_refused(build_model, tokenizer, settings):
    stop = tokenizer.eos_token_id
    rows = [{"input_ids": [9, 10, 11, stop], "labels": [-100, 10, 11, -100]}] * 4
    end = "The model would never learn to stop: let the labels hold the token that ends an answer."
    told = "the training data: loss-bearing stop tokens, of {} rows: expected at least one of ['</s>'], got 0. {}"
    with pytest.raises(DataError) as caught:
        make(SFTTrainer, build_model, tokenizer, Dataset.from_list(rows), settings)
    assert str(caught.value) == told.format("4 in 4", end)
    long = [{"input_ids": [9, stop, 10, 11, 10, stop], "labels": [-100, -100, 10, 11, 10, stop]}] * 3
    with pytest.raises(DataError) as caught:
        make(SFTTrainer, build_model, tokenizer, Dataset.from_list(long), {**settings, "max_length": 5})
    cut = "3 of 3 rows end inside an answer, as cut ones do: raise max_length. Else: "
    assert str(caught.value) == told.format("3 in 3", cut + end)
    make(SFTTrainer, build_model, tokenizer, Dataset.from_list(long), {**settings, "max_length": 6})
    make(SFTTrainer, build_model, tokenizer, Dataset.from_list(rows), {**settings, "refuse_untrained_stop": False})
    taught = [*rows, {"input_ids": [9, stop], "labels": [-100, stop]}]
    make(SFTTrainer, build_model, tokenizer, Dataset.from_list(taught), settings)


def test_packing_is_measured_and_recorded(build_model, tokenizer, tmp_path):
    result = sft(
        build_model(), tokenizer, CHATS, output_dir=tmp_path / "run", steps=1, packing=True, max_length=24,
        batch_size=1, compile=False, disable_tqdm=True, report_to="none",
    )  # fmt: skip
    run = json.loads((Path(tmp_path) / "run" / "run.json").read_text())
    told = run["packing"]["train"]
    assert result.record["packing"]["train"] == told
    assert told["rows"] == 12 and told["max_length"] == 24 and told["packed_rows"] * 24 >= told["tokens"]
    assert told["fill"] == told["tokens"] / (24 * told["packed_rows"]) > 0.8


def test_a_stream_is_packed(build_model, tokenizer, build_rows, settings):
    data = Dataset.from_list(build_rows(20)).to_iterable_dataset()
    trainer = make(SFTTrainer, build_model, tokenizer, data, {**settings, "packing": True, "max_steps": 2})
    trainer.train()
    assert all(sum(row["seq_lengths"]) <= 64 for row in trainer.train_dataset)
