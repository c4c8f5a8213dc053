"""A checkpoint that is damaged, of another run, or already done is refused before anything of it is loaded."""

import json
from pathlib import Path

import pytest

from fastft.errors import UsageError
from fastft.train import checkpoint
from fastft.train.record import kept_lines
from fastft.train.sft import SFTConfig, SFTTrainer

STEPS = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}


def trainer(model, tokenizer, dataset, settings, **changes):
    args = SFTConfig(**{**settings, **STEPS, **changes})
    return SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer, compile=False)


@pytest.fixture
def run(build_model, tokenizer, dataset, settings):
    trainer(build_model(), tokenizer, dataset, settings).train()
    return Path(settings["output_dir"])


def cut(path):
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_a_damaged_checkpoint_is_named_with_the_whole_one(name, damage, run, build_model, tokenizer, dataset, settings):
    damage(run / "checkpoint-2" / name)
    made = trainer(build_model(), tokenizer, dataset, settings, max_steps=3)
    with pytest.raises(UsageError) as caught:
        made.train(resume_from_checkpoint=True)
    text = str(caught.value)
    assert name in text and f"resume={str(run / 'checkpoint-1')!r}" in text
    made.train(resume_from_checkpoint=str(run / "checkpoint-1"))
    assert made.state.global_step == 3


def test_a_damaged_state(run, build_model, tokenizer, dataset, settings):
    for step in (1, 2):
        cut(run / f"checkpoint-{step}" / "trainer_state.json")
    made = trainer(build_model(), tokenizer, dataset, settings, max_steps=3)
    with pytest.raises(UsageError, match=r"trainer_state.json is damaged[^\n]*\n.*no other whole one"):
        made.train(resume_from_checkpoint=True)


def test_checkpoints_of_another_run(run, build_model, tokenizer, dataset, settings):
    made = trainer(build_model(targets=["q_proj"]), tokenizer, dataset, settings, max_steps=3)
    with pytest.raises(UsageError, match="expected no such tensor"):
        made.train(resume_from_checkpoint=True)
    wider = build_model(targets=["q_proj", "v_proj", "lm_head"])
    with pytest.raises(UsageError, match=r"lm_head.*no such tensor.*another run"):
        trainer(wider, tokenizer, dataset, settings, max_steps=9).train(resume_from_checkpoint=True)
    with pytest.raises(UsageError, match=r"expected a whole model.*got 'an adapter'"):
        whole = build_model(lora=False)
        trainer(whole, tokenizer, dataset, settings, max_steps=9).train(resume_from_checkpoint=True)


def test_nothing_left_to_train(run, build_model, tokenizer, dataset, settings):
    made = trainer(build_model(), tokenizer, dataset, settings)
    with pytest.raises(UsageError, match="more than the 2 steps"):
        made.train(resume_from_checkpoint=True)


def test_an_earlier_run_in_the_folder_is_told_and_loses_to_the_new_one(
    run, build_model, tokenizer, dataset, settings, capsys
):
    (run / "checkpoint-2").rename(run / "checkpoint-9")
    trainer(build_model(), tokenizer, dataset, settings, save_total_limit=1).train()
    assert "checkpoint-9 is of an earlier run" in capsys.readouterr().out
    assert [path.name for path in checkpoint.checkpoints(run)] == ["checkpoint-2"]


def test_other_data_are_told(run, build_model, build_rows, tokenizer, dataset, settings, capsys):
    from datasets import Dataset

    for rows, told in ((dataset, False), (Dataset.from_list(build_rows(seed=5)), True)):
        made = trainer(build_model(), tokenizer, rows, settings, max_steps=3)
        made.train(resume_from_checkpoint=str(run / "checkpoint-2"))
        assert ("not those that the run" in capsys.readouterr().out) is told


def test_half_a_line_of_metrics_is_left_out(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + '\n{"step": 2, "lo')
    assert kept_lines(path, 2) == [{"step": 1}]
    assert "line 2 is damaged" in capsys.readouterr().out
