"""The Modelfile: from the format's record, refused where it could not be right; ollama itself is run when asked."""

import os
import stat

import pytest

import fastft
from fastft.demo import MODEL_FOLDER
from fastft.errors import SaveError, UsageError
from fastft.export.modelfile import create_ollama_model, modelfile, write_modelfile
from fastft.model.tokenizer import load_tokenizer
from fastft.registry.chat import chat_format


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL_FOLDER)


def test_from_the_format_of_the_training_template(tokenizer):
    text = modelfile("./x.gguf", tokenizer, system="Be brief.", temperature=0.7, top_k=40)
    form = chat_format("chatml")
    assert text.startswith(f'FROM ./x.gguf\nTEMPLATE """{form.ollama_template}"""\n')
    lines = text.splitlines()
    for stop in form.ollama_stops:
        assert f'PARAMETER stop "{stop}"' in lines
    assert "PARAMETER num_ctx 512" in lines  # the demo model's length
    assert "PARAMETER temperature 0.7" in lines
    assert "PARAMETER top_k 40" in lines
    assert lines[-1] == 'SYSTEM """Be brief."""'


def test_context(tokenizer):
    assert "PARAMETER num_ctx 2048\n" in modelfile("x", tokenizer, num_ctx=2048)
    wide = load_tokenizer(MODEL_FOLDER)
    wide.model_max_length = 131072
    assert "PARAMETER num_ctx 8192\n" in modelfile("x", wide)


def test_a_format_by_name_takes_the_tokenizers_eos(tokenizer):
    text = modelfile("x", tokenizer, chat_format="alpaca")
    assert f'PARAMETER stop "{tokenizer.eos_token}"\n' in text
    assert "</s>" not in text


def test_what_could_not_be_right_is_refused(tokenizer):
    with pytest.raises(UsageError) as caught:
        modelfile("x", tokenizer, chat_format="gemma", num_ctx=0, temprature=1, top_k=0.5)
    text = str(caught.value)
    assert "'<end_of_turn>', which is no token of this tokenizer" in text
    assert "parameter temprature" in text
    assert "top_k: expected a whole number" in text
    assert "num_ctx: expected a positive number" in text
    other = load_tokenizer(MODEL_FOLDER)
    other.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} ~{% endfor %}"
    with pytest.raises(UsageError, match="none that fastft knows"):
        modelfile("x", other)
    with pytest.raises(UsageError, match='without """'):
        modelfile("x", tokenizer, system='a """ b')


def test_it_is_written_beside_the_file(tokenizer, tmp_path):
    with pytest.raises(UsageError, match=r"a \.gguf file that is there"):
        write_modelfile(tmp_path / "m.gguf", tokenizer)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    path = write_modelfile(tmp_path / "m.gguf", tokenizer)
    assert path == tmp_path / "Modelfile"
    assert path.read_text().startswith("FROM ./m.gguf\n")


def test_one_that_was_edited_is_kept(tokenizer, tmp_path, capsys):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    path = write_modelfile(tmp_path / "m.gguf", tokenizer)
    write_modelfile(tmp_path / "m.gguf", tokenizer)
    assert not list(tmp_path.glob("*.earlier")) and capsys.readouterr().out == ""
    path.write_text("FROM ./m.gguf\nSYSTEM mine\n")
    write_modelfile(tmp_path / "m.gguf", tokenizer)
    assert (tmp_path / "Modelfile.earlier").read_text().endswith("SYSTEM mine\n")
    assert "SYSTEM" not in path.read_text() and "is kept as Modelfile.earlier" in capsys.readouterr().out
    write_modelfile(tmp_path / "m.gguf", tokenizer, num_ctx=64)  # what was kept is not replaced
    assert (tmp_path / "Modelfile.earlier").read_text().endswith("SYSTEM mine\n")
    assert (tmp_path / "Modelfile.earlier-2").is_file() and "num_ctx 64" in path.read_text()


def test_ollama_is_run_when_it_is_there(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    path = write_modelfile(tmp_path / "m.gguf", tokenizer)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(UsageError, match=rf"not on this machine's PATH.*ollama create mine -f {path}"):
        create_ollama_model(path, "mine")
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "ollama"
    program.write_text('#!/bin/sh\n[ "$2" = broken ] && { echo "Error: no" >&2; exit 1; }\necho "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    assert create_ollama_model(path, "mine") == f"create mine -f {path}"
    with pytest.raises(SaveError, match="Error: no"):
        create_ollama_model(path, "broken")
    with pytest.raises(UsageError, match="a file that is there"):
        create_ollama_model(tmp_path / "absent", "mine")
    assert os.path.exists(path)


def test_every_format_has_one(tokenizer):
    from fastft.registry.chat import chat_formats

    for form in chat_formats():
        known = load_tokenizer(MODEL_FOLDER)
        if form.stop_token not in known.get_vocab():
            known.add_tokens([form.stop_token])
        text = modelfile("x", known, chat_format=form.name)
        assert text.count('"""') == 2
        assert all(f'"{stop}"' in text for stop in form.ollama_stops if stop != form.eos), form.name


def test_public_name():
    assert fastft.push.__module__ == "fastft.export.hub"
