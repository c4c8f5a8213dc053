"""Every broken row is an error that names row, field, value and remedy; all are counted, and none is dropped."""

import math

import pytest
from datasets import Dataset

from fastft.data.check import LONGEST, SHOWN, Mistakes, short
from fastft.data.recognise import SAMPLE, canonical, recognise
from fastft.data.sources import load_rows
from fastft.errors import DataError

USER = {"role": "user", "content": "q"}
BOT = {"role": "assistant", "content": "a"}
GOOD = {"messages": [USER, BOT]}
EMPTY = "Remove the row or give it text."


def told(rows, like=None):
    """Return the lines of the error that rows raise; they are of the kind of `like`, which stands before them."""
    rows = [like, *rows] if like else rows
    with pytest.raises(DataError) as caught:
        canonical(rows, recognise(rows))
    return str(caught.value).splitlines()


MESSAGES = {
    "no role": (
        [{"content": "x"}],
        "[0].role: expected a text such as 'user' or 'assistant', got None. The message has the fields ['content'].",
    ),
    "role of a wrong type": (
        [{"role": 3, "content": "x"}],
        "[0].role: expected a text such as 'user' or 'assistant', got 3",
    ),
    "no content": ([{"role": "user"}], f"[0].content: expected a text (str), got None. {EMPTY}"),
    "content of a wrong type": (
        [{"role": "user", "content": 3}],
        "[0].content: expected a text (str), got 3. Convert it to text.",
    ),
    "NaN": (
        [{"role": "user", "content": math.nan}],
        "[0].content: expected a text (str), got nan. NaN is an empty cell of a table: remove the row, or fill "
        "it (fillna('') in pandas).",
    ),
    "bytes": (
        [{"role": "user", "content": b"x"}],
        "[0].content: expected a text (str), got b'x'. Decode it: value.decode('utf-8').",
    ),
    "empty question": (
        [{"role": "user", "content": " \n"}, BOT],
        f"[0].content: expected a text that is not empty, got ' \\n'. {EMPTY}",
    ),
    "empty answer": (
        [USER, {"role": "assistant", "content": ""}],
        "[1].content: expected an answer that is not empty, got ''. Remove the turn, or the row.",
    ),
    "empty list of parts": (
        [{"role": "user", "content": []}],
        f"[0].content: expected at least one part, got []. {EMPTY}",
    ),
    "part without type": (
        [{"role": "user", "content": [{"text": "x"}]}],
        "[0].content[0]: expected a dict with a 'type', got {'text': 'x'}. Such as {'type': 'text', 'text': ...}.",
    ),
    "empty part": (
        [{"role": "user", "content": [{"type": "text", "text": ""}]}],
        f"[0].content[0].text: expected a text that is not empty, got ''. {EMPTY}",
    ),
    "long": (
        [{"role": "user", "content": "é" * 10_000_000}],
        "[0].content: expected at most 4,000,000 characters, got '"
        + "é" * 77
        + "... (10,000,000 characters)'. Cut it into parts; fastft.text_dataset cuts documents into chunks.",
    ),
    "half a character": (
        [{"role": "user", "content": "ab\ud83d"}],
        "[0].content: expected characters that UTF-8 has, got 'ab\\ud83d'. Character 2 is half of a surrogate "
        "pair: the text was cut or decoded wrongly.",
    ),
    "two answers": (
        [USER, BOT, BOT],
        "[2].role: expected another role than in [1], got 'assistant'. Join them, or put the "
        "user's turn between them; alternate=False takes both, where the template does.",
    ),
    "no dict": ([USER, "x"], "[1]: expected a dict with 'role' and 'content', got 'x'"),
    "no messages": ([], ": expected at least one message, got []. Remove the row."),
    "None": (None, f": expected a list of {{'role', 'content'}}, got None. {EMPTY}"),
    "a number": (7, ": expected a list of {'role', 'content'}, got 7"),
    "no JSON": (
        "[{",
        ": expected a list of messages, got '[{'. It is no JSON: Expecting property name enclosed in double "
        "quotes: line 1 column 3 (char 2).",
    ),
    "Python's notation": (
        "[{'role': 'user'}]",
        ": expected a list of messages, got \"[{'role': 'user'}]\". This is Python's notation, as pandas writes "
        "lists to CSV; save JSON Lines or Parquet instead.",
    ),
}


@pytest.mark.parametrize("messages, line", MESSAGES.values(), ids=MESSAGES)
def test_messages(messages, line):
    assert told([{"messages": messages}], like=GOOD) == [f"row 1, messages{line}"]


def test_a_role_by_another_name_after_the_rows_that_were_looked_at():
    rows = [GOOD] * SAMPLE + [{"messages": [{"role": "human", "content": "x"}]}]
    line = "messages[0].role: expected 'user', got 'human'. fastft.standardize_sharegpt(rows) renames the roles."
    assert told(rows) == [f"row {SAMPLE}, {line}"]


def test_tools():
    assert told([{**GOOD, "tools": "nope"}, {**GOOD, "tools": [3]}, {**GOOD, "tools": "[{"}]) == [
        "row 0, tools: expected a list of JSON schemas, got 'nope'",
        "row 1, tools: expected a list of JSON schemas, or None, got [3]",
        "row 2, tools: expected a list of JSON schemas, got '[{'. It is no JSON: Expecting property name enclosed in "
        "double quotes: line 1 column 3 (char 2).",
    ]


SHAREGPT = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
PAIR = {"prompt": "p", "completion": "c"}
TURNS = {"prompt": [USER], "completion": [BOT]}
ALPACA = {"instruction": "q", "input": "", "output": "a"}
CHOICE = {"prompt": "q", "chosen": "a", "rejected": "b"}
OTHERS = {
    "sharegpt, unknown role": (
        SHAREGPT,
        {"conversations": [{"from": "gtp", "value": "x"}]},
        "conversations[0].from: expected a known role, got 'gtp'. did you mean 'gpt'?",
    ),
    "sharegpt, no value": (
        SHAREGPT,
        {"conversations": [{"from": "human"}]},
        f"conversations[0].value: expected a text (str), got None. {EMPTY}",
    ),
    "sharegpt, two answers": (
        SHAREGPT,
        {"conversations": SHAREGPT["conversations"] + SHAREGPT["conversations"][1:]},
        "conversations[2].from: expected another role than in [1], got 'assistant'. Join them, "
        "or put the user's turn between them; alternate=False takes both, where the template does.",
    ),
    "sharegpt, call": (
        SHAREGPT,
        {"conversations": [{"from": "function_call", "value": "f(1)"}]},
        'conversations[0].value: expected a JSON object {"name", "arguments"}, or a list of them, got \'f(1)\'. '
        "It is no JSON: Expecting value: line 1 column 1 (char 0).",
    ),
    "pair, empty": (
        PAIR,
        {"prompt": "p", "completion": ""},
        f"completion: expected a text that is not empty, got ''. {EMPTY}",
    ),
    "pair, turns among texts": (
        PAIR,
        TURNS,
        "prompt: expected a text, as in the first rows, got [{'role': 'user', 'content': 'q'}]. Make both texts, "
        "or both lists of messages, in every row.",
    ),
    "pair, text among turns": (TURNS, PAIR, "prompt: expected a list of messages, got 'p'"),
    "pair, two answers": (
        TURNS,
        {"prompt": [USER, BOT], "completion": [BOT]},
        "prompt + completion[2].role: expected another role than in [1], got 'assistant'. Join them, "
        "or put the user's turn between them; alternate=False takes both, where the template does.",
    ),
    "alpaca, NaN": (
        ALPACA,
        {**ALPACA, "input": math.nan},
        "input: expected a text (str), got nan. NaN is an empty cell of a table: remove the row, or fill it "
        "(fillna('') in pandas).",
    ),
    "alpaca, None": (ALPACA, {**ALPACA, "output": None}, f"output: expected a text (str), got None. {EMPTY}"),
    "choice, equal": (
        CHOICE,
        {**CHOICE, "rejected": "a"},
        "chosen and rejected: expected two that differ, got 'equal answers'. Remove the row.",
    ),
    "choice, other prompts": (
        {"chosen": [USER, BOT], "rejected": [USER, {**BOT, "content": "b"}]},
        {"chosen": [USER, BOT], "rejected": [{**USER, "content": "r"}, BOT]},
        "rejected[0]: expected the start of 'chosen', {'role': 'user', 'content': 'q'}, got {'role': 'user', "
        "'content': 'r'}",
    ),
    "choice, no prompt": (
        CHOICE,
        {"chosen": "a", "rejected": "b"},
        "chosen: expected a conversation that starts with what the answer is to, got [{'role': 'assistant', "
        "'content': 'a'}]. Add a column 'prompt', or put the user's turns before the answer.",
    ),
    "text": ({"text": "t"}, {"text": 1.5}, "text: expected a text (str), got 1.5. Convert it to text."),
}


@pytest.mark.parametrize("good, bad, line", OTHERS.values(), ids=OTHERS)
def test_other_kinds(good, bad, line):
    assert told([bad], like=good)[0] == f"row 1, {line}"


def test_all_mistakes_are_counted_and_some_shown():
    bad = {"messages": [{"role": "user", "content": ""}, {"content": "y"}, 3]}
    lines = told([GOOD] * 5 + [bad] * 1000 + [GOOD] * 5)
    assert len(lines) == SHOWN + 1
    assert lines[0].startswith("row 5, messages[0].content") and lines[3].startswith("row 6, ")
    assert lines[-1] == "and 996 more rows: 1,000 of 1,010 rows cannot be used (3,000 mistakes)"
    lines = told([GOOD, {"messages": [3] * 50}])
    assert lines[-1] == "and 40 more mistakes in these rows: 1 of 2 rows cannot be used (50 mistakes)"


def test_a_million_broken_rows_take_no_memory_and_ten_lines():
    mistakes = Mistakes()
    for _ in range(1_000_000):
        mistakes.add(["x"])
    assert len(mistakes.kept) == SHOWN
    with pytest.raises(DataError) as caught:
        mistakes.refuse(1_000_000)
    lines = str(caught.value).splitlines()
    assert lines[10:] == ["and 999,990 more rows: 1,000,000 of 1,000,000 rows cannot be used (1,000,000 mistakes)"]


def test_a_data_set_tells_the_same_as_a_list_and_a_stream_at_the_row():
    rows = [GOOD, {"messages": None}, GOOD, {"messages": [USER, {"role": "assistant", "content": ""}]}] * 6
    lines = told(rows)
    assert lines[-1] == "and 2 more rows: 12 of 24 rows cannot be used (12 mistakes)"
    stored = Dataset.from_list(rows)
    for _ in range(2):  # also where the mapped set comes out of the cache
        with pytest.raises(DataError) as caught:
            canonical(stored, recognise(stored))
        assert str(caught.value).splitlines() == lines
    stream = iter(canonical(stored.to_iterable_dataset(), recognise(stored.to_iterable_dataset())))
    assert next(stream) == GOOD
    with pytest.raises(DataError) as caught:
        next(stream)
    assert str(caught.value) == lines[0]


def test_values_are_shortened():
    assert short("x" * 80) == "x" * 80 and short("x" * 81) == "x" * 77 + "... (81 characters)"
    assert short({"a": 1}) == {"a": 1} and short(None) is None
    for value in ({"a": "x" * 10**7}, ["y" * 10**7] * 3, list(range(10**6)), {"k": list(range(10**6))}, b"z" * 10**7):
        assert len(repr(short(value))) < 150
    assert LONGEST == 4_000_000  # as the documentation says


# ---- broken files


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


def test_json(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"},\n {"text" "b"}]')
    assert file_told(path)[0].startswith(f"{path}, line 2, column 10: expected JSON, got ")
    path.write_text('[{"text": "a"}, 3, "x"]')
    assert [line.split(":")[0] for line in file_told(path)] == [f"{path}, row 1", f"{path}, row 2"]
    path.write_text('{\n "data": [{"text": "a"}]\n}')
    assert "Save the list under 'data' as a file of its own." in file_told(path)[0]
    path.write_text("")
    assert file_told(path)[0].startswith(f"{path}, line 1, column 1: expected JSON, got ''")


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
        f"{path}, line 3: expected 2 cells, as in the header, got '3 cells'. Its cells are ['q', 'a', 'b']; a "
        "cell with "
        "the separator in it stands in quotes.",
        f"{path}, line 6: expected 2 cells, as in the header, got '1 cells'. Its cells are ['q']; a cell with the "
        "separator in it stands in quotes.",
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
    assert [line.split(":")[0] for line in told(load_rows(path))] == ["row 0, question", "row 1, answer"]


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


def test_roles_that_nobody_knows():
    """A template renders such a turn, and nothing of it is learnt."""
    rows = [[USER, {**BOT, "role": "asistant"}], [{**USER, "role": "zzz"}, BOT], [USER, {**BOT, "role": "tool_call"}]]
    first, second, third = told([{"messages": turns} for turns in rows], like=GOOD)
    assert first == ("row 1, messages[1].role: expected a known role, got 'asistant'. did you mean 'assistant'?")
    assert second.startswith("row 2, messages[0].role: expected a known role, got 'zzz'. Rename it: known are system, ")
    assert third.endswith("got 'tool_call'. fastft.standardize_sharegpt(rows) renames the roles.")
    assert canonical([{"messages": [USER, {"role": "ipython", "content": "3"}, BOT]}], recognise([GOOD]))
