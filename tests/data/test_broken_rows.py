"""Every broken row is an error that names row, field, value and remedy; all are counted, and none is dropped."""

import math

import pytest
from datasets import Dataset

import fastft
from fastft.data.check import LONGEST, SHOWN, Mistakes
from fastft.data.recognise import SAMPLE, canonical, recognise
from fastft.errors import DataError, short

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
        "[0].role: expected a text such as 'user' or 'assistant', got None. The message has the fields ['content'] and "
        "no 'role'.",
    ),
    "role of a wrong type": (
        [{"role": 3, "content": "x"}],
        "[0].role: expected a text such as 'user' or 'assistant', got 3",
    ),
    "role under another name": (
        [{"from": "user", "content": "x"}],
        "[0].role: expected a text such as 'user' or 'assistant', got None. The message has the fields ['content', "
        "'from'] and no 'role': did you mean 'role' by 'from'?",
    ),
    "no content": (
        [{"role": "user"}],
        "[0].content: expected a text (str), got None. The message has the fields ['role'] and no 'content'. " + EMPTY,
    ),
    "content of None": ([{"role": "user", "content": None}], f"[0].content: expected a text (str), got None. {EMPTY}"),
    "content under a name like it": (
        [USER, {"Contents": "x", "role": "assistant"}],
        "[1].content: expected a text (str), got None. The message has the fields ['Contents', 'role'] and no "
        "'content': did you mean 'content' by 'Contents'?",
    ),
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


def test_a_turn_with_another_key_than_the_others():
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}, {"from": "human", "text": "How?"}]
    assert told([{"conversations": turns}]) == [
        "row 0, conversations[2].value: expected a text (str), got None. The message has the fields ['from', 'text'] "
        "and no 'value': did you mean 'value' by 'text'?"
    ]


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
        "conversations[0].value: expected a text (str), got None. The message has the fields ['from'] and no 'value'. "
        + EMPTY,
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
        "prompt: expected a text, as in the first rows, got [{'role': 'user', 'content': 'q'}]",
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
    assert [line.partition(":")[0] for line in lines[:-1]] == [
        *(f"row {row}, messages[0].content" for row in (5, 6, 7, 8)),
        "For these 4",
        *(f"row {row}, messages[1].role" for row in (5, 6, 7)),
        "For these 3",
        *(f"row {row}, messages[2]" for row in (5, 6, 7)),
    ]
    assert lines[4] == f"For these 4: {EMPTY}"
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
    assert str(caught.value) == f"{lines[0]}. {EMPTY}"  # alone, it comes with what to do


def test_values_are_shortened():
    assert short("x" * 80) == "x" * 80 and short("x" * 81) == "x" * 77 + "... (81 characters)"
    assert short({"a": 1}) == {"a": 1} and short(None) is None
    for value in ({"a": "x" * 10**7}, ["y" * 10**7] * 3, list(range(10**6)), {"k": list(range(10**6))}, b"z" * 10**7):
        assert len(repr(short(value))) < 150
    assert LONGEST == 4_000_000  # as the documentation says


def test_roles_that_nobody_knows():
    """A template renders such a turn, and nothing of it is learnt."""
    rows = [[USER, {**BOT, "role": "asistant"}], [{**USER, "role": "zzz"}, BOT], [USER, {**BOT, "role": "tool_call"}]]
    first, second, third = told([{"messages": turns} for turns in rows], like=GOOD)
    assert first == ("row 1, messages[1].role: expected a known role, got 'asistant'. did you mean 'assistant'?")
    assert second.startswith("row 2, messages[0].role: expected a known role, got 'zzz'. Rename it: known are system, ")
    assert third.endswith("got 'tool_call'. fastft.standardize_sharegpt(rows) renames the roles.")
    assert canonical([{"messages": [USER, {"role": "ipython", "content": "3"}, BOT]}], recognise([GOOD]))


@pytest.mark.parametrize("column, value", [("system", "Be brief."), ("tools", [{"name": "add"}])])
def test_what_only_messages_have_a_place_for_is_no_column_beside_texts(column, value, build_tokenizer):
    plain, tokenizer = {"prompt": "One?", "completion": " Two."}, build_tokenizer()
    assert len(fastft.chat_dataset([plain, {**plain, column: None}], tokenizer)) == 2
    with pytest.raises(DataError, match=rf"row 1, {column}: expected nothing beside .*Give the prompt as messages"):
        fastft.chat_dataset([plain, {**plain, column: value}], tokenizer)
