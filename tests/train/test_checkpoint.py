"""A checkpoint is whole or absent: what happens when the disk refuses."""

import errno
import resource
from pathlib import Path

import pytest
import torch

from fastft.errors import SaveError
from fastft.train import checkpoint
from fastft.train.sft.config import SFTConfig
from fastft.train.sft.trainer import SFTTrainer


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()
    }


def trainer(build_model, tokenizer, dataset, settings, **changes):
    args = SFTConfig(**{**settings, "save_strategy": "steps", "save_steps": 1, "max_steps": 2, **changes})
    return SFTTrainer(build_model(), args, train_dataset=dataset, processing_class=tokenizer, compile=False)


def fail_at_second(made, name):
    """Let the method `name` write its files, then fail as a full disk does, from the second checkpoint on."""
    own, calls = getattr(made, name), []

    def failing(*args, **kwargs):
        calls.append(1)
        own(*args, **kwargs)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    setattr(made, name, failing)


@pytest.mark.parametrize("name", ["_save_optimizer_and_scheduler", "_save_rng_state", "save_model"])
def test_a_full_disk_leaves_the_last_checkpoint_whole(name, build_model, tokenizer, dataset, settings):
    made = trainer(build_model, tokenizer, dataset, settings)
    fail_at_second(made, name)
    with pytest.raises(SaveError) as caught:
        made.train()
    folder = Path(settings["output_dir"])
    text = str(caught.value)
    assert "checkpoint-2" in text and "No space left" in text and "GB free" in text and "checkpoint-1" in text
    assert [path.name for path in checkpoint.checkpoints(folder)] == ["checkpoint-1"]
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    again = trainer(build_model, tokenizer, dataset, settings)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    assert again.state.global_step == 2


def test_a_write_that_the_system_refuses(build_model, tokenizer, dataset, settings):
    """A file-size limit makes torch's and safetensors' own writers fail, not an injected exception."""
    made = trainer(build_model, tokenizer, dataset, settings)
    made.train()
    folder = Path(settings["output_dir"])
    before = files(folder / "checkpoint-2")
    made.state.global_step = 3
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))
    try:
        with pytest.raises(SaveError, match="checkpoint-3"):
            made._save_checkpoint(made.model, None)
        with pytest.raises(SaveError, match="untouched"):
            made.save_model(str(folder / "checkpoint-2"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in checkpoint.checkpoints(folder)] == ["checkpoint-1", "checkpoint-2"]
    assert files(folder / "checkpoint-2") == before


def test_an_error_that_is_not_the_disks_stays_itself(build_model, tokenizer, dataset, settings):
    made = trainer(build_model, tokenizer, dataset, settings)

    def broken(*args, **kwargs):
        raise RuntimeError("shapes do not match")

    made._save_rng_state = broken
    with pytest.raises(RuntimeError, match="shapes"):
        made.train()
    assert checkpoint.checkpoints(settings["output_dir"]) == []


def test_saving_again_replaces_the_checkpoint(build_model, tokenizer, dataset, settings):
    made = trainer(build_model, tokenizer, dataset, settings)
    made.train()
    folder = Path(settings["output_dir"])
    (folder / "checkpoint-2" / "leftover").write_text("old")
    with torch.no_grad():
        next(p for p in made.model.parameters() if p.requires_grad).add_(1.0)
    before = files(folder / "checkpoint-2")
    made._save_checkpoint(made.model, None)
    after = files(folder / "checkpoint-2")
    assert "leftover" not in after and after["adapter_model.safetensors"] != before["adapter_model.safetensors"]


def test_leftovers_of_a_crash_are_no_checkpoint(tmp_path):
    for name in (".checkpoint-9.partial", "checkpoint-x", "checkpoint-3", "checkpoint-20"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-20"]


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for step in (1, 2, 3, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    checkpoint.rotate(tmp_path, 2, str(tmp_path / "checkpoint-1"))
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-10"]
    checkpoint.rotate(tmp_path, None, None)
    checkpoint.rotate(tmp_path, 1, None)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-10"]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), "a matter of permission, not of room: allow this user"),
        (OSError(errno.EROFS, "Read-only file system"), "a matter of permission, not of room"),
        (OSError(errno.ENOSPC, "No space left on device"), "GB free on its disk). Free some room or choose another"),
        (OSError(errno.ENOTDIR, "Not a directory"), "is in the way: move it, or choose another output_dir"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error. Choose another output_dir."),
        (RuntimeError("PytorchStreamWriter failed writing file"), "Free some room"),
    ],
    ids=lambda value: getattr(value, "strerror", None) or "",
)
def test_the_reason_is_told_and_what_to_do_about_it(error, told, tmp_path):
    text = checkpoint.describe(tmp_path / "checkpoint-2", error)
    assert told in text and ("room" in told or "Free some room" not in text)


def test_a_writer_that_hides_the_reason_in_a_folder_that_may_not_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.os, "access", lambda place, mode: False)
    text = checkpoint.describe(tmp_path / "a" / "b", RuntimeError("PytorchStreamWriter failed writing file"))
    assert f"permission, not of room: allow this user to write in {tmp_path}, or choose" in text


def test_a_failing_file_leaves_the_old_one(tmp_path):
    path = tmp_path / "run.json"
    checkpoint.write_json(path, {"a": float("nan")})
    assert path.read_text() == '{\n  "a": "nan"\n}\n'

    def write(temporary):
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(SaveError, match=r"run.json.*No space left"):
        checkpoint.write_file(path, write)
    assert "nan" in path.read_text() and [p.name for p in tmp_path.iterdir()] == ["run.json"]
