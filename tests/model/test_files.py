"""Folders that are no models are told by what they are."""

import pytest

from fastft.errors import LoadError
from fastft.model.load import load


def test_a_runs_folder_without_a_model_names_the_newest_checkpoint(tmp_path):
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-x"):
        (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(LoadError) as caught:
        load(tmp_path / "run")
    newest = str(tmp_path / "run" / "checkpoint-10")
    told = f"it holds checkpoints of a run that did not end, and no model; the newest to load is {newest!r}"
    assert str(caught.value) == f"{tmp_path / 'run'}: {told}"


def test_a_folder_of_gguf_files_is_an_export(tmp_path):
    (tmp_path / "model-q8_0.gguf").write_bytes(b"GGUF")
    with pytest.raises(LoadError, match="it holds GGUF files, which are exports; load the model that they were made"):
        load(tmp_path)
