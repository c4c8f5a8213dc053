"""Every broken file is an error that names file, line and remedy; mistakes of several are told together."""

import json
from functools import partial

import pytest
from datasets import Dataset
from tokenizers import normalizers

import fastft
from fastft.data.chat import chat_dataset, tokenised
from fastft.data.preview import preview
from fastft.data.recognise import canonical, recognise
from fastft.data.sources import load_rows
from fastft.errors import DataError


def file_told(path, stream=False):
    with pytest.raises(DataError) as caught:
        list(load_rows(path, stream=stream))
    return str(caught.value).splitlines()


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": }\n\n[1]\n{"text": "b", "text": "c"}\n{"text": "d"')
    lines = file_told(path)
    assert lines == [
        f"""{path}, line 2, column 10: expected JSON, got '{{"text": }}'. Expecting value.""",
        f"{path}, line 4: expected a JSON object, one row, got [1]. A row has its fields by name.",
        f"""{path}, line 5: expected one value for each name, 'text' has two, got '{{"text": "b", "text": "c"}}'. """
        "Remove one of them.",
        f"""{path}, line 6, column 13: expected JSON, got '{{"text": "d"'. Expecting ',' delimiter.""",
    ]
    assert file_told(path, stream=True) == lines[:1]
    path.write_text('{"n": ' + "1" * 5000 + "}\n" + "[" * 100_000)
    assert [line.split(": expected")[0] for line in file_told(path)] == [f"{path}, line 1", f"{path}, line 2"]
    path.write_text("{\n" * 1000)
    assert file_told(path)[-1] == "and 990 more rows"


def test_lines_that_are_no_rows_are_told_with_what_is_wrong_in_the_others(tmp_path, build_tokenizer):
    path, tokenizer = tmp_path / "a.jsonl", build_tokenizer()
    good, bad = ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": c}]} for c in "b ")
    rows = [good, [1, 2], bad, None, good, bad, *[good] * 3]
    lines = [json.dumps(row) if row else "{" for row in rows]
    path.write_text("\n\n".join(lines))
    numbers = [3, 5, 7, 11]
    for call in (chat_dataset, partial(tokenised, train_on="assistant", name="train"), preview):
        with pytest.raises(DataError) as caught:
            call(path, tokenizer)
        problems = caught.value.problems
        places = [problem.where.partition(", ")[2] for problem in problems]
        assert [place.partition(",")[0] for place in places] == [f"line {number}" for number in numbers]
        assert places[1] == "line 5, messages[1].content" and places[2].startswith("line 7, column 2")
        assert (
            problems[0].expected == "a JSON object, one row" and problems[3].expected == "an answer that is not empty"
        )
    assert [line.partition(": ")[0] for line in file_told(path)] == [f"{path}, line 3", f"{path}, line 7, column 2"]
    path.write_text("[1]\n" * 7 + lines[2] + "\n" + "[1]\n" * 7 + (lines[2] + "\n") * 3)
    with pytest.raises(DataError) as caught:
        chat_dataset(path, tokenizer)
    *told, more = caught.value.problems
    assert [problem.where.split(", ")[1] for problem in told] == [f"line {number}" for number in range(1, 11)]
    assert more == "and 8 more rows"
    path.write_text('[1]\n{"answer": 1}\n')  # of a kind that is not known: that is told when all lines are rows
    with pytest.raises(DataError) as caught:
        chat_dataset(path, tokenizer)
    assert [problem.where for problem in caught.value.problems] == [f"{path}, line 1"]


def test_json(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"},\n {"text" "b"}]')
    assert file_told(path)[0].startswith(f"{path}, line 2, column 10: expected JSON, got ")
    path.write_text('[{"text": "a"}, 3, "x"]')
    assert [line.split(":")[0] for line in file_told(path)] == [f"{path}, row 1", f"{path}, row 2", "For these 2"]
    path.write_text('{\n "data": [{"text": "a"}]\n}')
    assert "Save the list under 'data' as a file of its own." in file_told(path)[0]
    path.write_text("")
    assert file_told(path)[0].startswith(f"{path}, line 1, column 1: expected JSON, got ''")


@pytest.mark.parametrize("text", ['[{"text": "a"}, {"text": "b"}]', '\n[\n {"text": "a"},\n {"text": "b"}\n]\n'])
@pytest.mark.parametrize("stream", [False, True])
def test_one_json_list_under_the_name_of_json_lines_is_read(text, stream, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    assert list(load_rows(path, stream=stream)) == [{"text": "a"}, {"text": "b"}]


def test_a_broken_json_list_is_told_once(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("[\n" + ' {"text": "a"},\n' * 30)
    assert len(file_told(path)) == 1 and file_told(path)[0].startswith(f"{path}, line 32, column 1: expected JSON")
    path.write_text('[{"text": "a"}, 3]')
    assert [line.split(":")[0] for line in file_told(path)] == [f"{path}, row 1"]
    path.write_text('["a"]\n["b"]\n')  # lines, each of which is no row
    assert [line.split(":")[0] for line in file_told(path)] == [f"{path}, line 1", f"{path}, line 2", "For these 2"]


def test_utf8(tmp_path):
    for name, before in [
        ("a.jsonl", b'{"text": "\xc3\xa9"}\n{"text": "'),
        ("a.csv", b"text\n\xc3\xa9"),
        ("a.txt", b"a\n"),
    ]:
        for mark in (b"", b"\xef\xbb\xbf"):
            path = tmp_path / name
            data = mark + before + b'caf\xe9"}\n'
            path.write_bytes(data)
            line = file_told(path)[0]
            assert line.startswith(f"{path}, line 2, byte {data.index(b'caf') + 3} of the file: expected UTF-8, got ")
            assert "caf\\xe9" in line and line.endswith("Save the file as UTF-8, or put the damaged bytes right.")
    path = tmp_path / "first.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "\xff"}')
    assert file_told(path)[0].startswith(f"{path}, line 1, byte 13 of the file")
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"text":\n"\xff"}]')
    assert file_told(path)[0].startswith(f"{path}, line 2, byte 11 of the file")


def test_csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('question,answer\nq,a\nq,a,b\n"q\nr",a\nq\n')
    assert file_told(path) == [
        f"{path}, line 3: expected 2 cells, as in the header, got \"3 cells, ['q', 'a', 'b']\"",
        f"{path}, line 6: expected 2 cells, as in the header, got \"1 cells, ['q']\"",
        "For these 2: A cell with the separator in it stands in quotes.",
    ]
    path.write_text('question,answer\nq,a\n"q,a\nq,a\n')
    assert file_told(path)[0].startswith(f"{path}, line 3: expected cells in CSV, got 'unexpected end of data'")
    path.write_bytes(b"a,b\r1,2\r")
    assert "save it with line feeds" in file_told(path)[0]
    path.write_text("a,a\n1,2\n")
    assert file_told(path)[0].startswith(f"{path}, line 1: expected a header with a name of its own for each column")
    path.write_text("")
    assert file_told(path) == [f"{path}: expected a header and rows, got 'an empty file'"]
    path.write_text("question,answer\n,a\nq,\n")  # empty cells are empty texts, and told as such
    rows = load_rows(path)
    with pytest.raises(DataError) as caught:
        canonical(rows, recognise(rows))
    assert str(caught.value).splitlines() == [
        "row 0, question: expected a text that is not empty, got ''",
        "row 1, answer: expected a text that is not empty, got ''",
        "For these 2: Remove the row or give it text.",
    ]


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_a_table_with_another_separator(tmp_path, separator):
    path = tmp_path / "a.csv"
    lines = [["question", "answer"], ["What, then?", '"a ""b"";\t|"'], ["", "x"]]
    path.write_text("\n" + "\n".join(separator.join(line) for line in lines))
    assert load_rows(path) == [{"question": "What, then?", "answer": 'a "b";\t|'}, {"question": "", "answer": "x"}]
    path.write_text(path.read_text() + f"\na{separator}b{separator}c")
    assert file_told(path)[0].startswith(
        f"{path}, line 5: expected 2 cells, as in the header, got \"3 cells, ['a', 'b', 'c']\""
    )


def test_separators_that_are_not_clear(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("a;b,c\n1,2\n")  # what the suffix says
    assert load_rows(path) == [{"a;b": "1", "c": "2"}]
    (tmp_path / "a.tsv").write_text("a,b\tc\n1\t2\n")
    assert load_rows(tmp_path / "a.tsv") == [{"a,b": "1", "c": "2"}]
    path.write_text("text;\nWell;\n")  # no second name: it is no separator
    assert load_rows(path) == [{"text;": "Well;"}]
    path.write_text("a;b|c\n1;2|3\n")
    assert file_told(path) == [
        f"{path}, line 1: expected one separator, found [';', '|'], got 'a;b|c\\n'. Save the file with ',' between the "
        "cells."
    ]


def test_rows_of_files_are_named_by_file_and_line(tmp_path, build_tokenizer):
    good, bad = {"prompt": "Hi", "completion": "Hello."}, {"prompt": "Hi", "completion": ""}
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "a.jsonl").write_text(f"{json.dumps(good)}\n\n{json.dumps(bad)}\n")
    (lists / "b.json").write_text(json.dumps([good, bad], indent=1))
    (lists / "c.csv").write_text('prompt;completion\n"Hi\nyou";Hello.\nHi;\n')
    tables = tmp_path / "tables"
    tables.mkdir()
    for name, rows in (("0.parquet", [good]), ("1.parquet", [good, bad])):
        Dataset.from_list(rows).to_parquet(tables / name)
    places = [f"{lists / 'a.jsonl'}, line 3", f"{lists / 'b.json'}, row 1", f"{lists / 'c.csv'}, line 4"]
    tokenizer = build_tokenizer()
    for source, wanted in ((lists, places), (tables, [f"{tables / '1.parquet'}, row 1"])):
        for read in (chat_dataset, partial(tokenised, train_on="assistant", name="eval"), fastft.preview):
            with pytest.raises(DataError) as caught:
                read(source, tokenizer)
            assert [problem.where for problem in caught.value.problems] == [f"{place}, completion" for place in wanted]
            assert str(caught.value).splitlines() == caught.value.lines()
            # a traceback shows the list once: it comes with no other error
            assert (caught.value.__cause__, caught.value.__context__) == (None, None)
    one = tables / "1.parquet"
    for source, place in ((lists, places[0]), (one, f"{one}, row 1")):
        for columns in (None, ["prompt", "completion"]):
            rows = load_rows(source, stream=True, columns=columns)
            with pytest.raises(DataError) as caught:
                list(chat_dataset(rows, tokenizer))
            assert str(caught.value).startswith(f"{place}, completion: expected")
    moved = load_rows(lists, stream=True).skip(1)  # another stream, whose rows have other numbers
    with pytest.raises(DataError) as caught:
        list(chat_dataset(moved, tokenizer))
    assert str(caught.value).startswith("row 0, completion: expected")
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "a.txt").write_text("fine")
    (documents / "b.txt").write_text("a" * 10)
    whole = build_tokenizer()
    whole.backend_tokenizer.normalizer = normalizers.Replace("a", "")
    for stream in (False, True):
        with pytest.raises(DataError) as caught:
            list(fastft.text_dataset(documents, whole, stream=stream))
        assert str(caught.value).startswith(f"{documents / 'b.txt'}, text: expected a text that gives tokens")
    with pytest.raises(DataError) as caught:
        list(fastft.text_dataset(load_rows(documents, stream=True), whole))
    assert str(caught.value).startswith(f"{documents / 'b.txt'}, text: expected a text that gives tokens")


def test_mistakes_of_several_files_are_told_together(tmp_path):
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    (tmp_path / "c.txt").write_text("fine")
    assert [line.split(":")[0] for line in file_told(tmp_path)] == [
        str(tmp_path / "a.txt"),
        f"{tmp_path / 'b.txt'}, line 1, byte 0 of the file",
    ]
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "0.parquet").write_bytes(b"PAR1")
    Dataset.from_list([{"a": 1}]).to_parquet(tmp_path / "p" / "1.parquet")
    Dataset.from_list([{"b": 1}]).to_parquet(tmp_path / "p" / "2.parquet")
    first, second = file_told(tmp_path / "p")
    assert "0.parquet: expected a Parquet file" in first
    assert "2.parquet: expected the columns of 1.parquet, ['a'], got ['b']" in second
