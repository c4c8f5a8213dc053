"""What the preview shows is what the collator gives; the truncation table counts what it says."""

import json

import pytest
from datasets import Dataset

import fastft
from fastft.data import preview_text
from fastft.data.chat import chat_dataset
from fastft.data.preview import preview
from fastft.data.training_collator import training_collator
from fastft.data.truncation import truncation_table
from fastft.errors import LoadError, UsageError


def test_truncation_table():
    rows = [
        {"input_ids": list(range(10)), "labels": [-100] * 6 + [6, 7, 8, 9]},
        {"input_ids": list(range(4)), "labels": [0, 1, -100, 3]},
        {"input_ids": [5, 6], "labels": [5, -100]},
    ]
    table = truncation_table(Dataset.from_list(rows), lengths=(3, 6, 8, 10))
    assert (table.rows, table.tokens, table.bearing, table.longest) == (3, 16, 6, 10)
    found = {loss.length: (loss.rows_cut, loss.rows_lost, loss.tokens_lost, loss.bearing_lost) for loss in table.losses}
    assert found == {3: (2, 1, 8, 5), 6: (1, 1, 4, 4), 8: (1, 0, 2, 2), 10: (0, 0, 0, 0)}
    assert "2 (33.3%)" in str(table)
    assert table.to_dict()["losses"][0]["rows_cut"] == 2
    with pytest.raises(UsageError, match="truncation_table"):
        truncation_table(Dataset.from_list(rows), lengths=(0,))


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
def test_rows_are_those_of_the_collator(train_on, build_tokenizer, chats):
    tokenizer, rows = build_tokenizer(), chats(5, answer="It is {n} 😀.")
    found = preview(rows, tokenizer, 2, train_on=train_on)
    data = chat_dataset(rows, tokenizer, train_on)
    batch = training_collator(tokenizer)([data[0], data[1]])
    for number, row in enumerate(found.rows):
        size = len(row.tokens)
        assert [token.id for token in row.tokens] == batch["input_ids"][number, :size].tolist()
        learnt = batch["labels"][number, :size].ne(-100).tolist()
        assert [token.learnt for token in row.tokens] == [False, *learnt[1:]]
        assert "".join(token.text for token in row.tokens) == tokenizer.decode(data[number]["input_ids"])
        said = {
            role: "".join(token.text for token in row.tokens if token.role == role) for role in ("user", "assistant")
        }
        assert said["user"] == f"What is {number}?" and said["assistant"] == f"It is {number} 😀."
    assert found.truncation.rows == 5 and found.packing["rows"] == 5 and found.whole
    assert str(found).count("[[") == str(found).count("]]") > 0
    if train_on == "assistant":
        assert "[[It is 0 😀.<|im_end|>]]" in str(found) and "[[It is 1" in str(found)


def test_cut_rows_ids_and_a_stream(build_tokenizer, chats, capsys):
    tokenizer = build_tokenizer()
    found = fastft.preview(chats(3), tokenizer, 1, max_length=12, ids=True)
    row = found.rows[0]
    assert len(row.tokens) == 12 and row.tokens_cut > 0 and row.learnt == 0
    assert [loss.length for loss in found.truncation.losses] == [12, 1024, 2048, 4096, 8192]
    assert found.truncation.losses[0].rows_lost == 3
    found.show()
    text = capsys.readouterr().out
    assert "cut to 12 tokens" in text and f"{row.tokens[0].id:>7}" in text and repr(row.tokens[0].text) in text
    stream = preview(Dataset.from_list(chats(4)).to_iterable_dataset(), tokenizer, 2)
    assert not stream.whole and len(stream.rows) == 2 and "a stream" in str(stream)
    ids = preview(chat_dataset(chats(4), tokenizer), tokenizer, 1)
    assert ids.rows[0].learnt == preview(chats(4), tokenizer, 1).rows[0].learnt
    json.dumps(found.to_dict())
    with pytest.raises(UsageError, match="rows"):
        preview(chats(1), tokenizer, 0)
    with pytest.raises(LoadError, match="no-such-model"):
        preview(chats(1), "./no-such-model")


def test_the_page_needs_nothing_else(build_tokenizer, chats, tmp_path):
    rows = chats(1, answer='<b>&"</b>')
    found = preview(rows, build_tokenizer())
    found.save_html(tmp_path / "deep" / "page.html")
    page = (tmp_path / "deep" / "page.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>") and page == found.to_html() == found._repr_html_()
    for outside in ("http", "<script", "<link", "<img", "@import", "url(", "<b>"):
        assert outside not in page
    assert page.count('class="learnt"') == found.rows[0].learnt
    assert "&lt;" in page and "prefers-color-scheme" in page


def test_arguments_of_a_wrong_type(build_tokenizer, chats):
    for wrong in ({"rows": "3"}, {"lengths": 10}, {"lengths": "10"}, {"max_length": 3.5}):
        with pytest.raises(UsageError, match=f"preview: {next(iter(wrong))}"):
            preview(chats(1), build_tokenizer(), **wrong)
    for dataset in ("rows.jsonl", chats(1)):
        with pytest.raises(UsageError, match=r"truncation_table: dataset: expected a datasets.Dataset with 'inp"):
            truncation_table(dataset)
    with pytest.raises(LoadError, match=r"'/nope/x': no such folder \(looked at /nope/x\)"):
        preview(chats(1), "/nope/x")


def test_no_escape_codes_of_the_data_reach_a_terminal(build_tokenizer, chats):
    found = preview(chats(1, answer="\x1b[2Jgone\x07\ttab"), build_tokenizer())
    assert "\x1b" not in str(found) and "\x07" not in str(found) and "\ttab" in str(found)
    assert "␛[2Jgone␇" in str(found).replace("]][[", "")
    assert "\x1b[2J" not in preview_text.coloured(found)


def test_a_folder_without_a_tokenizer_is_told_as_load_tells_it(chats, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    told = []
    for ask in (fastft.load, lambda folder: preview(chats(1), folder)):
        with pytest.raises(LoadError) as caught:
            ask(tmp_path)
        told.append(str(caught.value).splitlines()[0])
    assert told[0] == told[1] and told[0].startswith(f"{tmp_path.resolve()}: no tokenizer (tokenizer.json or ")
