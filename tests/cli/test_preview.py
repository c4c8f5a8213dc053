"""`fastft preview` as people and scripts meet it."""

import json

import pytest

from fastft.cli.main import main
from fastft.demo import MODEL_FOLDER

ROWS = [
    {"messages": [{"role": "user", "content": "Is it hot?"}, {"role": "assistant", "content": "It is."}]},
    {"messages": [{"role": "user", "content": "And big?"}, {"role": "assistant", "content": "No."}]},
]


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return str(path)


def test_text_json_and_page(data, tmp_path, capsys):
    model = ["--model", str(MODEL_FOLDER)]
    assert main(["preview", data, *model, "--rows", "1"]) == 0
    text = capsys.readouterr().out
    assert "[[It is.<|im_end|>]]" in text and "No." not in text and "8,192" in text and "2 rows" in text
    assert main(["preview", data, *model, "--json", "--train-on", "all", "--max-length", "8"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [len(row["tokens"]) for row in found["rows"]] == [8, 8] and found["rows"][0]["learnt"] == 7
    assert found["truncation"]["losses"][0]["length"] == 8 and found["packing"]["max_length"] == 8
    assert main(["preview", data, *model, "--ids"]) == 0
    assert "place" in capsys.readouterr().out
    page = tmp_path / "page.html"
    assert main(["preview", data, *model, "--html", str(page)]) == 0
    assert "It" in page.read_text(encoding="utf-8") and str(page) in capsys.readouterr().out


def test_two_answers_in_a_row(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [*ROWS[0]["messages"], ROWS[1]["messages"][1]]}), encoding="utf-8")
    assert main(["preview", str(path), "--model", str(MODEL_FOLDER)]) == 1
    assert "messages[2].role" in capsys.readouterr().err
    assert main(["preview", str(path), "--model", str(MODEL_FOLDER), "--no-alternate"]) == 0
    assert "[[No.<|im_end|>]]" in capsys.readouterr().out


def test_mistakes(data, tmp_path, capsys):
    assert main(["preview", data, "--model", str(tmp_path)]) == 1
    assert main(["preview", str(tmp_path / "none.jsonl"), "--model", str(MODEL_FOLDER)]) == 1
    assert "none.jsonl" in capsys.readouterr().err
    assert main(["preview", data, "--model", str(MODEL_FOLDER), "--train-on", "asistant"]) == 3
    assert "did you mean 'assistant'" in capsys.readouterr().err
    assert main(["preview", data]) == 3
