"""A checkpoint that is damaged, of another run, or already done is refused before anything of it is loaded."""

import errno
import json
import os
from pathlib import Path

import pytest
from resuming import trainer
from transformers import TrainerCallback

from fastft.errors import LoadError, SaveError, UsageError
from fastft.export.folder import find_weights
from fastft.state import update_state
from fastft.train import checkpoint, earlier, lineage
from fastft.train.record import kept_lines
from fastft.train.sft.config import SFTConfig
from fastft.train.sft.run import sft


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
    every = "['down_proj', 'gate_proj', 'k_proj', 'o_proj', 'q_proj', 'up_proj', 'v_proj']"
    with pytest.raises(UsageError) as caught:
        made.train(resume_from_checkpoint=True)
    assert str(caught.value) == (
        f"{run / 'checkpoint-2'} adapter, targets: expected ['q_proj'], as in the model that is trained, got {every}. "
        f"To go on, put such an adapter on the model: add_lora(targets={every}); or start with resume=False."
    )
    smaller = build_model(hidden_size=16)
    with pytest.raises(UsageError, match=r"lora_A.weight: expected \(4, 16\), got \(4, 32\).*another run"):
        trainer(smaller, tokenizer, dataset, settings, max_steps=9).train(resume_from_checkpoint=True)
    with pytest.raises(UsageError, match=r"expected a whole model.*got 'an adapter'"):
        whole = build_model(lora=False)
        trainer(whole, tokenizer, dataset, settings, max_steps=9).train(resume_from_checkpoint=True)


def test_an_adapter_of_another_rank(run, build_model, tokenizer, dataset, settings):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, target_modules="all-linear", modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(build_model(lora=False), config)
    with pytest.raises(UsageError) as caught:
        trainer(model, tokenizer, dataset, settings, max_steps=9).train(resume_from_checkpoint=True)
    told, (go_on, anew) = run / "checkpoint-2", ("To go on, put such an adapter on the model:", "; or start with")
    assert str(caught.value).splitlines() == [
        f"{told} adapter, r: expected 8, as in the model that is trained, got 4. {go_on} add_lora(r=4){anew} "
        "resume=False.",
        f"{told} adapter, modules_to_save: expected ['lm_head'], as in the model that is trained, got None. {go_on} "
        f"add_lora(modules_to_save=None){anew} resume=False.",
    ]


def test_nothing_left_to_train(run, build_model, tokenizer, dataset, settings):
    made = trainer(build_model(), tokenizer, dataset, settings)
    with pytest.raises(UsageError, match="more than the 2 steps"):
        made.train(resume_from_checkpoint=True)


def test_an_earlier_run_in_the_folder_is_kept_before_the_new_one_begins(
    run, build_model, tokenizer, dataset, settings, capsys
):
    (run / "notes.txt").write_text("mine")
    before = {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    del before[Path("notes.txt")]
    seen = []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.append((capsys.readouterr().out, checkpoint.checkpoints(run)))

    made = trainer(build_model(), tokenizer, dataset, settings, save_total_limit=1)
    made.callback_handler.callbacks.insert(1, Look())  # before all others of a user
    made.train()
    ((said, there),) = seen
    kept = run / "_earlier-1"
    told = f"fastft: {run} holds an earlier run (finished, 2 steps): it is kept in {kept} ("
    assert told in said and f"resume='{kept / 'checkpoint-2'}' goes on from it." in said and there == []
    assert {path.relative_to(kept): path.read_bytes() for path in kept.rglob("*") if path.is_file()} == before
    assert [path.name for path in checkpoint.checkpoints(run)] == ["checkpoint-2"]
    assert (run / "notes.txt").read_text() == "mine"
    trainer(build_model(), tokenizer, dataset, settings).train()
    assert sorted(path.name for path in run.iterdir() if path.name.startswith("_")) == ["_earlier-1", "_earlier-2"]
    last = (run / "checkpoint-2" / "adapter_model.safetensors").read_bytes()
    on = trainer(build_model(), tokenizer, dataset, settings, max_steps=3)
    on.train(resume_from_checkpoint=str(kept / "checkpoint-2"))
    assert (run / "_earlier-3" / "checkpoint-2" / "adapter_model.safetensors").read_bytes() == last
    assert [path.name for path in checkpoint.checkpoints(run)] == ["checkpoint-3"]
    assert on.state.global_step == 3 and len(json.loads((run / "run.json").read_text())["runs"]) == 2


def test_saved_weights_are_kept_with_their_run(build_model, build_rows, tokenizer, tmp_path):
    options = {"steps": 1, "batch_size": 2, "save_strategy": "no", "compile": False, "disable_tqdm": True}
    sft(build_model(), tokenizer, build_rows(), tmp_path, **options)
    names = {path.name for path in tmp_path.iterdir()}
    weights = (tmp_path / "adapter_model.safetensors").read_bytes()
    sft(build_model(seed=3), tokenizer, build_rows(), tmp_path, **options)
    assert {path.name for path in tmp_path.iterdir()} == {*names, "_earlier-1"}
    assert {path.name for path in (tmp_path / "_earlier-1").iterdir()} == names
    assert (tmp_path / "_earlier-1" / "adapter_model.safetensors").read_bytes() == weights
    assert (tmp_path / "adapter_model.safetensors").read_bytes() != weights


def test_records_without_weights_are_replaced(build_model, tokenizer, dataset, settings, capsys):
    for _ in range(2):
        trainer(build_model(), tokenizer, dataset, settings, save_strategy="no").train()
    folder = Path(settings["output_dir"])
    assert (
        f"{folder / 'run.json'} is of an earlier run that left no weights; it is replaced." in capsys.readouterr().out
    )
    assert not [path for path in folder.iterdir() if path.name.startswith("_")]


def test_a_base_in_the_folder_is_not_put_aside(run, build_model, tokenizer, dataset, settings):
    model = build_model()
    model.get_base_model().config.save_pretrained(run)
    update_state(model, source=str(run))
    with pytest.raises(UsageError, match=r"output_dir: expected another folder than that of the base model"):
        trainer(model, tokenizer, dataset, settings).train()
    assert [path.name for path in checkpoint.checkpoints(run)] == ["checkpoint-1", "checkpoint-2"]


def test_a_base_that_is_a_checkpoint_in_the_folder_is_not_put_aside(run, build_model, tokenizer, dataset, settings):
    model = build_model()
    update_state(model, source=str(run / "checkpoint-2"))
    made = trainer(model, tokenizer, dataset, settings, max_steps=3)
    with pytest.raises(UsageError, match=r"output_dir: expected another folder[^\n]*checkpoint-2 would be put aside"):
        made.train()
    assert [path.name for path in checkpoint.checkpoints(run)] == ["checkpoint-1", "checkpoint-2"]
    other = Path(settings["output_dir"]).with_name("other")
    trainer(model, tokenizer, dataset, settings, output_dir=str(other)).train()
    made.train(resume_from_checkpoint=str(run / "checkpoint-2"))  # nothing is put aside
    with pytest.raises(UsageError, match="would be put aside"):
        made.train(resume_from_checkpoint=str(other / "checkpoint-1"))


@pytest.mark.parametrize("failing", [1, 3, 5])
def test_a_move_that_fails_is_undone(failing, run, build_model, tokenizer, dataset, settings, monkeypatch):
    (run / "mine").mkdir()
    (run / "mine" / "README.md").write_text("linked")
    for name in ("merges.txt", "README.md"):  # links are moved by other means
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(Path("mine") / "README.md")
    before = {path.relative_to(run): os.path.islink(path) or path.stat().st_ino for path in run.rglob("*")}
    moved, rename = [], os.rename

    def fails(source, target):
        if Path(target).parent.name == "_earlier-1":
            moved.append(source)
            if len(moved) == failing:
                raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    made = trainer(build_model(), tokenizer, dataset, settings)
    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(SaveError, match=r"_earlier-1: could not be written: Input/output error"):
        made.train()
    assert len(moved) == failing
    assert {path.relative_to(run): os.path.islink(path) or path.stat().st_ino for path in run.rglob("*")} == before
    assert (run / "merges.txt").read_text() == "linked"


def test_links_among_what_is_put_aside_lead_where_they_led(run, build_model, tokenizer, dataset, settings):
    (run / "mine").mkdir()
    (run / "mine" / "merges.txt").write_text("linked")
    (run / "merges.txt").symlink_to(Path("mine") / "merges.txt")
    (run / "added_tokens.json").symlink_to("config.json")  # to what is put aside as well
    (run / "config.json").write_text("{}")
    trainer(build_model(), tokenizer, dataset, settings).train()
    kept = run / "_earlier-1"
    assert (kept / "merges.txt").is_symlink() and (kept / "merges.txt").read_text() == "linked"
    assert os.readlink(kept / "added_tokens.json") == "config.json" and not os.path.lexists(run / "merges.txt")


def test_what_goes_wrong_in_the_first_process_is_raised_in_the_others(
    build_model, tokenizer, dataset, settings, monkeypatch
):
    made = trainer(build_model(), tokenizer, dataset, settings)
    monkeypatch.setattr(made, "is_world_process_zero", lambda: False)
    monkeypatch.setattr(earlier, "broadcast_object_list", lambda told: [None, f"{told}: the disk is full"])
    with pytest.raises(SaveError, match=r"\[None, None\]: the disk is full"):
        made.train()


def test_a_folder_that_cannot_be_made_is_told(run, build_model, tokenizer, dataset, settings, monkeypatch):
    def refused(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    made = trainer(build_model(), tokenizer, dataset, settings)
    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(SaveError, match=r"_earlier-1: could not be written: Permission denied"):
        made.train()
    assert [path.name for path in checkpoint.checkpoints(run)] == ["checkpoint-1", "checkpoint-2"]


def test_other_data_are_told(run, build_model, build_rows, tokenizer, dataset, settings, capsys):
    from datasets import Dataset

    for rows, told in ((dataset, False), (Dataset.from_list(build_rows(seed=5)), True)):
        made = trainer(build_model(), tokenizer, rows, settings, max_steps=3)
        made.train(resume_from_checkpoint=str(run / "checkpoint-2"))
        assert ("the data are not those that" in capsys.readouterr().out) is told


def losses(folder):
    return [(row["step"], row["loss"]) for row in kept_lines(folder / "metrics.jsonl", 99) if "loss" in row]


def test_checkpoints_of_an_earlier_run_are_not_gone_on_with_unless_named(
    run, build_model, tokenizer, dataset, settings, capsys
):
    """The first run has two steps more than the second, which is the one that `resume=True` means."""
    trainer(build_model(), tokenizer, dataset, settings, max_steps=5).train()
    first = losses(run)
    again = {"save_steps": 3, "learning_rate": 2e-2}
    second = trainer(build_model(seed=3), tokenizer, dataset, settings, max_steps=3, **again)
    second.train()
    (run / "_earlier-2" / "checkpoint-5").rename(run / "checkpoint-5")
    capsys.readouterr()
    made = trainer(build_model(seed=3), tokenizer, dataset, settings, max_steps=4, **again)
    made.train(resume_from_checkpoint=True)
    said = capsys.readouterr().out
    assert f"{run / 'checkpoint-5'} is of another run" in said and "goes on from checkpoint-3" in said
    assert losses(run)[:3] == [(row["step"], row["loss"]) for row in second.state.log_history if "loss" in row]
    assert [step for step, _ in losses(run)] == [1, 2, 3, 4]
    named = trainer(build_model(), tokenizer, dataset, settings, max_steps=6)
    named.train(resume_from_checkpoint=str(run / "checkpoint-5"))
    assert f"(finished, 4 steps): it is kept in {run / '_earlier-3'} (" in capsys.readouterr().out
    assert [step for step, _ in losses(run)] == [6]  # the lines there were of the second run
    assert [step for step, _ in losses(run / "_earlier-3")] == [1, 2, 3, 4]
    assert [path.name for path in checkpoint.checkpoints(run)] == ["checkpoint-5", "checkpoint-6"]
    whole = [(row["step"], row["loss"]) for row in named.state.log_history if "loss" in row]
    assert whole[:5] == first


def test_a_run_without_a_checkpoint_goes_on_from_none_of_another(run, build_model, tokenizer, dataset, settings):
    trainer(build_model(), tokenizer, dataset, settings, save_strategy="no").train()
    made = trainer(build_model(), tokenizer, dataset, settings, max_steps=9)
    kept = run / "_earlier-1" / "checkpoint-2"
    with pytest.raises(UsageError, match=f"There is none; resume='{kept}' goes on from an earlier run"):
        made.train(resume_from_checkpoint=True)
    kept.rename(run / "checkpoint-2")
    with pytest.raises(UsageError, match=r"checkpoint-2 is of another run.*resume='.*checkpoint-2' goes on"):
        made.train(resume_from_checkpoint=True)
    with pytest.raises(LoadError, match="is of another run"):
        for name in ("config.json", "adapter_config.json"):
            (run / name).unlink(missing_ok=True)
        find_weights(run)


def test_a_way_that_was_left_is_not_gone_on_with(run, build_model, tokenizer, dataset, settings):
    """From step 1 a second way was gone to step 2 and not kept: step 2 of the folder is the first way's."""
    made = trainer(build_model(), tokenizer, dataset, settings, max_steps=2, save_strategy="no")
    made.train(resume_from_checkpoint=str(run / "checkpoint-1"))
    made = trainer(build_model(), tokenizer, dataset, settings, max_steps=3)
    made.train(resume_from_checkpoint=True)
    record = json.loads((run / "run.json").read_text())
    assert [part["from_step"] for part in record["runs"]] == [0, 1]
    assert [step for step, _ in losses(run)] == [1, 2, 3]


def told(capsys):
    """Return what is told of a run that goes on."""
    words = ("other settings than in", "was to take", "is not used", "goes on, by schedule")
    lines = [line.removeprefix("fastft: ") for line in capsys.readouterr().out.splitlines()]
    return [line for line in lines if any(word in line for word in words)]


def rates(made):
    return [row["learning_rate"] for row in made.state.log_history if "learning_rate" in row]


def test_where_a_run_goes_on_is_told(build_model, tokenizer, dataset, settings, capsys):
    """One line where nothing has changed."""
    every, there = {"max_steps": 4, "save_steps": 2}, Path(settings["output_dir"]) / "checkpoint-2"
    trainer(build_model(), tokenizer, dataset, settings, **every).train()
    assert "goes on from" not in capsys.readouterr().out
    made = trainer(build_model(), tokenizer, dataset, settings, **every)
    capsys.readouterr()
    made.train(resume_from_checkpoint=str(there))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fastft: ")]
    assert lines == [f"fastft: goes on from {there}, at step 3 of 4."]


def test_other_settings_are_told(run, build_model, tokenizer, dataset, settings, capsys):
    changed = {"learning_rate": 5e-3, "lr_scheduler_type": "constant", "max_grad_norm": 0.5, "weight_decay": 0.1}
    made = trainer(build_model(), tokenizer, dataset, settings, max_steps=4, **changed)
    made.train(resume_from_checkpoint=True)
    there = run / "checkpoint-2"
    assert told(capsys) == [
        f"other settings than in {there}: lr_scheduler_type is 'constant' (there 'linear'), max_grad_norm is 0.5 "
        "(there 1.0).",
        f"the run of {there} was to take 2 steps, this one takes 4.",
        f"weight_decay=0.1 is not used: the 0.0 of {there} goes on, with its optimizer.",
        f"learning_rate=0.005 is not used: the 0.01 of {there} goes on, by schedule 'constant'. Step 3 still has the "
        f"rate that {there} had come to, 0, and learns nothing.",
    ]
    assert rates(made)[2:] == [0.0, 1e-2]
    assert [group["weight_decay"] for group in made.optimizer.param_groups] == [0.0, 0.0]


def test_another_optimizer_is_refused_before_anything_is_loaded(run, build_model, tokenizer, dataset, settings):
    """torch itself takes the state of any optimizer with as many parameters, and fails in the first step."""
    there, model = run / "checkpoint-2", build_model(seed=5)
    made = trainer(model, tokenizer, dataset, settings, max_steps=3, optim="sgd", loraplus_ratio=4.0)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(UsageError) as caught:
        made.train(resume_from_checkpoint=True)
    weights = f"fastft.load({str(there)!r}) takes the weights alone, for a new run."
    default = SFTConfig(**settings).optim.value
    assert str(caught.value) == (
        f"SFTConfig optim: expected {default!r}, whose state {there} has, got 'sgd'. Say optim={default!r} to go on "
        f"from it. {weights}\n"
        f"SFTConfig loraplus_ratio: expected None, by which the optimizer of {there} has its groups of parameters, got "
        f"4.0. Leave loraplus_ratio out to go on from it. {weights}"
    )
    assert made.optimizer is None and all(parameter.equal(before[name]) for name, parameter in model.named_parameters())


def test_another_optimizer_is_told_in_the_words_of_the_function(run, build_model, tokenizer, dataset, settings):
    given = {"use_cpu": True, "batch_size": 2, "max_length": 64, "compile": False}
    with pytest.raises(UsageError, match=r"^sft optimizer: expected .*got 'sgd'\. Say optimizer='adamw_torch"):
        sft(build_model(), tokenizer, dataset, run, resume=True, steps=3, optimizer="sgd", **given)


@pytest.mark.parametrize("name, value", [("loraplus_ratio", 4.0), ("embedding_learning_rate", 1e-3)])
def test_groups_of_parameters_that_the_checkpoint_has_and_the_run_has_not(
    name, value, build_model, tokenizer, dataset, settings, capsys
):
    def made(**changes):
        return trainer(build_model(modules_to_save=["embed_tokens"]), tokenizer, dataset, settings, **changes)

    made(**{name: value}).train()
    refused = rf"^SFTConfig {name}: expected {value}, by .*, got None\. Say {name}={value} to go on"
    with pytest.raises(UsageError, match=refused):
        made(max_steps=3).train(resume_from_checkpoint=True)
    capsys.readouterr()
    going_on = made(max_steps=3, **{name: 2 * value})  # another one than none is held, and told
    going_on.train(resume_from_checkpoint=True)
    there = Path(settings["output_dir"]) / "checkpoint-2"
    assert f"{name}={2 * value} is not used: the {value} of {there} goes on, with its optimizer." in told(capsys)
    assert going_on.state.global_step == 3


@pytest.mark.parametrize(
    "earlier, later",
    [
        ("adamw_torch", "adamw_torch_fused"),
        ("adamw_8bit", "paged_adamw_8bit"),
        ("rmsprop_bnb", "rmsprop_bnb_32bit"),
    ],
    ids=["fused", "paged", "one under two names"],
)
def test_an_optimizer_with_the_same_state_goes_on(earlier, later, build_model, tokenizer, dataset, settings, capsys):
    trainer(build_model(), tokenizer, dataset, settings, optim=earlier).train()
    made = trainer(build_model(), tokenizer, dataset, settings, max_steps=3, optim=later)
    capsys.readouterr()
    made.train(resume_from_checkpoint=True)
    there = Path(settings["output_dir"]) / "checkpoint-2"
    assert f"other settings than in {there}: optim is {later!r} (there {earlier!r})." in told(capsys)
    assert made.state.global_step == 3


@pytest.mark.parametrize("schedule", ["linear", "constant", "constant_with_warmup"])
def test_another_number_of_steps_is_told(schedule, build_model, tokenizer, dataset, settings, capsys):
    every = {"lr_scheduler_type": schedule, "save_steps": 2}
    run, said = Path(settings["output_dir"]), {}
    there = run / "checkpoint-2"
    trainer(build_model(), tokenizer, dataset, settings, max_steps=4, **every).train()
    for steps in (4, 8):
        capsys.readouterr()
        made = trainer(build_model(), tokenizer, dataset, settings, max_steps=steps, **every)
        made.train(resume_from_checkpoint=str(run / "checkpoint-2"))
        said[steps] = told(capsys)
    longer = f"the run of {there} was to take 4 steps, this one takes 8."
    rate = "learning_rate=0.01 goes on, by schedule 'linear' over 8 steps. Step 3 still has the rate that "
    rate += f"{there} had come to, 0.005."
    assert said == {4: [], 8: [longer, *([rate] if schedule == "linear" else [])]}
    before, after = [1e-2, 7.5e-3, 5e-3], [6.25e-3, 5e-3, 3.75e-3, 2.5e-3, 1.25e-3]
    assert rates(made) == pytest.approx([*before, *after] if schedule == "linear" else [1e-2] * 8)


def test_a_learning_rate_that_is_not_used_is_told_as_often_as_it_is_not(
    run, build_model, tokenizer, dataset, settings, capsys
):
    """The second run's config says 0.02 and its checkpoint has 0.01, which is what the third is told of."""
    trainer(build_model(), tokenizer, dataset, settings, max_steps=4).train()
    for step, rate, last in ((2, 2e-2, 4), (3, 1e-2, 4), (3, 2e-2, 4)):
        capsys.readouterr()
        made = trainer(build_model(), tokenizer, dataset, settings, max_steps=last, learning_rate=rate)
        made.train(resume_from_checkpoint=str(run / f"checkpoint-{step}"))
        there, record = run / f"checkpoint-{step}", json.loads((run / "run.json").read_text())
        line = f"learning_rate=0.02 is not used: the 0.01 of {there} goes on, by schedule 'linear' over 4 steps."
        assert told(capsys) == ([line] if rate == 2e-2 else [])
        assert record["held"] == ({"learning_rate": 1e-2} if rate == 2e-2 else {})
        assert "| learning rate | 0.01 |" in (run / "README.md").read_text()
        assert rates(made) == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])


def test_epochs_are_told_as_steps(build_model, tokenizer, dataset, settings, capsys):
    rows, run = dataset.select(range(4)), Path(settings["output_dir"])
    for epochs in (2, 3):
        made = trainer(build_model(), tokenizer, rows, settings, max_steps=-1, num_train_epochs=epochs)
        made.train(resume_from_checkpoint=None if epochs == 2 else str(run / "checkpoint-3"))
    assert f"the run of {run / 'checkpoint-3'} was to take 4 steps, this one takes 6." in capsys.readouterr().out


def test_a_checkpoint_of_another_method(run, build_model, tokenizer, dataset, settings):
    path = run / "checkpoint-2" / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "method": "dpo"}))
    made = trainer(build_model(), tokenizer, dataset, settings, max_steps=3)
    with pytest.raises(UsageError, match=r"checkpoint-2 method: expected 'sft'.*got 'dpo'"):
        made.train(resume_from_checkpoint=True)


def test_half_a_line_of_metrics_is_left_out(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + '\n{"step": 2, "lo')
    assert kept_lines(path, 2) == [{"step": 1}]
    assert "line 2 is damaged" in capsys.readouterr().out


def test_how_batches_are_copied_is_no_other_setting():
    def record(**parts):
        return {"config": {"accelerator_config": {"even_batches": True, "non_blocking": False, **parts}}}

    assert lineage.changes(record(), record(non_blocking=True)) == {}
    (name,) = lineage.changes(record(), record(non_blocking=True, even_batches=False))
    assert name == "accelerator_config"


def test_a_run_that_is_over_by_its_epochs_is_not_gone_on_with(build_model, tokenizer, dataset, settings):
    folder = Path(settings["output_dir"])
    once = {"max_steps": -1, "num_train_epochs": 1, "save_strategy": "epoch"}
    trainer(build_model(), tokenizer, dataset, settings, **once).train()
    (saved,) = checkpoint.checkpoints(folder)
    with pytest.raises(UsageError, match="SFTConfig num_train_epochs: expected more than the 1 epochs that") as caught:
        trainer(build_model(), tokenizer, dataset, settings, **once).train(resume_from_checkpoint=str(saved))
    assert "ask for more epochs" in str(caught.value) and checkpoint.checkpoints(folder) == [saved]
    more = trainer(build_model(), tokenizer, dataset, settings, **{**once, "num_train_epochs": 2})
    more.train(resume_from_checkpoint=str(saved))
    assert more.state.epoch == 2.0
