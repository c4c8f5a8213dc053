"""What rows are, in one line, and their canonical form, exactly; what is not clear is an error that says so."""

import json

import pytest
from datasets import Dataset, Features, Image, IterableDataset, Json, List, Value

from fastft.data.recognise import canonical, recognise
from fastft.errors import DataError

USER = {"role": "user", "content": "q"}
BOT = {"role": "assistant", "content": "a"}
TURNS = [USER, BOT]
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]}
OTHER = {"name": "g", "arguments": {"y": ""}}
TOOL = {"role": "tool", "tool_call_id": "1", "content": ""}

KNOWN = {
    "messages": ({"messages": TURNS}, "conversations (column 'messages', role/content), 1 row", {"messages": TURNS}),
    "messages under another name": (
        {"conversation": TURNS, "id": 7},
        "conversations (column 'conversation', role/content), 1 row",
        {"id": 7, "messages": TURNS},
    ),
    "sharegpt": (
        {"conversations": SHAREGPT},
        "ShareGPT conversations (column 'conversations', from/value), 1 row",
        {"messages": TURNS},
    ),
    "sharegpt roles": (
        {"messages": [{"role": "Human", "content": "q", "weight": 0}, {"role": "bot", "content": "a"}]},
        "ShareGPT conversations (column 'messages', role/content), 1 row",
        {"messages": [{"role": "user", "content": "q", "weight": 0}, BOT]},
    ),
    "roles in other letters": (
        {"messages": [{"role": "User", "content": "q"}, {"role": "assistant", "content": "a"}]},
        "conversations (column 'messages', role/content), 1 row; role 'User' read as 'user'",
        {"messages": TURNS},
    ),
    "sharegpt with system and calls": (
        {
            "system": "s",
            "tools": '[{"name": "f"}]',
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": null}}'},
                {"from": "observation", "value": "3"},
                {"from": "gpt", "value": "a"},
            ],
        },
        "ShareGPT conversations (columns 'conversations' and 'system', from/value), 1 row",
        {
            "tools": [{"name": "f"}],
            "messages": [
                {"role": "system", "content": "s"},
                USER,
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": None}}}],
                },
                {"role": "tool", "content": "3"},
                BOT,
            ],
        },
    ),
    "json text": (
        {"messages": json.dumps(TURNS)},
        "conversations (column 'messages', role/content), 1 row",
        {"messages": TURNS},
    ),
    "texts": (
        {"prompt": "p", "completion": " c", "label": "x"},
        "prompts with completions (columns 'prompt' and 'completion'), 1 row",
        {"prompt": "p", "completion": " c", "label": "x"},
    ),
    "pairs of turns": (
        {"prompt": [USER], "completion": [BOT]},
        "prompts with completions (columns 'prompt' and 'completion', role/content), 1 row",
        {"prompt": [USER], "completion": [BOT]},
    ),
    "pairs of sharegpt turns": (
        {"prompt": SHAREGPT[:1], "completion": SHAREGPT[1:]},
        "prompts with completions (columns 'prompt' and 'completion', from/value), 1 row",
        {"prompt": [USER], "completion": [BOT]},
    ),
    "alpaca": (
        {"instruction": "add", "input": "1 2", "output": "3"},
        "instructions with answers (columns 'instruction', 'input' and 'output', a user's and an assistant's turn "
        "each), 1 row",
        {"messages": [{"role": "user", "content": "add\n\n1 2"}, {"role": "assistant", "content": "3"}]},
    ),
    "alpaca without input": (
        {"instruction": "q", "input": "", "output": "a", "system": "s", "history": [["x", "y"]]},
        "instructions with answers (columns 'instruction', 'input', 'output', 'system' and 'history', a user's and an "
        "assistant's turn each), 1 row",
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "x"},
                {"role": "assistant", "content": "y"},
                USER,
                BOT,
            ]
        },
    ),
    "dolly": (
        {"instruction": "q", "context": None, "response": "a", "category": "c"},
        "instructions with answers (columns 'instruction', 'context' and 'response', a user's and an assistant's turn "
        "each), 1 row",
        {"category": "c", "messages": TURNS},
    ),
    "question and answer": (
        {"question": "q", "answer": "a"},
        "instructions with answers (columns 'question' and 'answer', a user's and an assistant's turn each), 1 row",
        {"messages": TURNS},
    ),
    "preference, texts": (
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        "preference pairs (columns 'prompt', 'chosen' and 'rejected'), 1 row",
        {"chosen": TURNS, "rejected": [USER, {"role": "assistant", "content": "b"}]},
    ),
    "preference, prompt beside and in it": (
        {"prompt": "q", "chosen": TURNS, "rejected": [USER, {"role": "assistant", "content": "b"}]},
        "preference pairs (columns 'prompt', 'chosen' and 'rejected', role/content), 1 row",
        {"chosen": TURNS, "rejected": [USER, {"role": "assistant", "content": "b"}]},
    ),
    "preference, implicit": (
        {"chosen": SHAREGPT, "rejected": [SHAREGPT[0], {"from": "gpt", "value": "b"}]},
        "preference pairs (columns 'chosen' and 'rejected', from/value), 1 row",
        {"chosen": TURNS, "rejected": [USER, {"role": "assistant", "content": "b"}]},
    ),
    "preference, marked text": (
        {
            "chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: s",
            "rejected": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: t",
        },
        "preference pairs (columns 'chosen' and 'rejected'), 1 row",
        {
            "chosen": [*TURNS, {"role": "user", "content": "r"}, {"role": "assistant", "content": "s"}],
            "rejected": [*TURNS, {"role": "user", "content": "r"}, {"role": "assistant", "content": "t"}],
        },
    ),
    "text": ({"text": "t", "meta": 1}, "plain text (column 'text'), 1 row", {"text": "t", "meta": 1}),
    "content": ({"content": "t"}, "plain text (column 'content'), 1 row", {"text": "t"}),
    "token ids": ({"input_ids": [1, 2]}, "token ids (column 'input_ids'), 1 row", {"input_ids": [1, 2]}),
}


@pytest.mark.parametrize("row, statement, expected", KNOWN.values(), ids=KNOWN)
@pytest.mark.parametrize("made", [list, Dataset.from_list, "stream"], ids=["list", "Dataset", "stream"])
def test_every_kind_in_every_container(row, statement, expected, made):
    rows = Dataset.from_list([row]).to_iterable_dataset() if made == "stream" else made([row])
    recognised = recognise(rows)
    assert recognised.statement == (statement.replace("1 row", "a stream") if made == "stream" else statement)
    assert recognised.rows == (None if made == "stream" else 1)
    found = list(canonical(rows, recognised))
    assert found == [{**expected, **({"tools": None} if "tools" in found[0] and "tools" not in expected else {})}]
    again = recognise(canonical(rows, recognised))  # what is canonical is recognised, and stays
    assert list(canonical(canonical(rows, recognised), again)) == found


def test_messages_are_kept_as_they_are():
    parts = [{"type": "text", "text": "see"}, {"type": "image", "image": "a.png"}]
    turns = [
        {"role": "user", "content": parts, "name": "Ann"},
        {**CALL, "content": None, "extra": {"deep": [1, None]}},
        TOOL,
        {"role": "assistant", "content": "", "reasoning_content": "hm"},
    ]
    rows = [{"messages": turns, "tools": [{"type": "function"}], "chat_template_kwargs": {"k": None}}]
    assert canonical(rows, recognise(rows)) == rows
    assert canonical([{"messages": turns}], recognise(rows))[0]["messages"] is turns
    stored = Dataset.from_list(
        rows, features=Features(messages=List(Json()), tools=Json(), chat_template_kwargs=Json())
    )
    assert list(canonical(stored, recognise(stored))) == rows


def test_keys_that_arrow_filled_in_are_absent_and_nothing_else_is():
    rows = [
        {"messages": [USER, {**CALL, "content": None}, TOOL, BOT], "tools": [{"name": "f", "p": {"x": {"t": "i"}}}]},
        {
            "messages": [USER, {**BOT, "tool_calls": [{"type": "function", "function": OTHER}]}],
            "tools": [{"name": "g", "p": {"y": {"t": "s"}}}],
        },
    ]  # fmt: skip
    rows = [{**row, "chat_template_kwargs": {name: True}} for row, name in zip(rows, "ab", strict=True)]
    stored = Dataset.from_list(rows)
    filled = stored[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert filled == {"x": 1, "y": None}  # or this test would show nothing
    wanted = [{**rows[0], "messages": [USER, CALL, TOOL, BOT]}, rows[1]]
    assert list(canonical(stored, recognise(stored))) == wanted
    assert list(canonical(stored.to_iterable_dataset(), recognise(stored.to_iterable_dataset()))) == wanted
    # what the user wrote as null in a list is no filling
    assert canonical(rows, recognise(rows))[0]["messages"][1] == {**CALL, "content": None}


@pytest.mark.parametrize(
    "keys, roles", [(("role", "content"), ("user", "assistant")), (("from", "value"), ("human", "gpt"))]
)
def test_images_in_a_data_set_keep_their_type(keys, roles):
    from PIL import Image as Picture

    part = {"type": Value("string"), "text": Value("string"), "image": Image()}
    features = Features({"messages": List({keys[0]: Value("string"), keys[1]: List(part)})})
    picture = Picture.new("RGB", (2, 2), (255, 0, 0))
    parts = [{"type": "text", "text": "see", "image": None}, {"type": "image", "text": None, "image": picture}]
    answer = [{"type": "text", "text": "red", "image": None}]
    turns = [dict(zip(keys, turn, strict=True)) for turn in zip(roles, (parts, answer), strict=True)]
    stored = Dataset.from_list([{"messages": turns}], features=features)
    made = canonical(stored, recognise(stored))
    assert made.features == Features({"messages": List({"role": Value("string"), "content": List(part)})})
    assert [turn["role"] for turn in made[0]["messages"]] == ["user", "assistant"]
    assert made[0]["messages"][0]["content"][1]["image"].getpixel((1, 1)) == (255, 0, 0)


@pytest.mark.parametrize(
    "row, words",
    [
        ({"mesages": TURNS}, ["['mesages']", "did you mean 'messages'?", "'prompt' and 'completion'"]),
        ({"a": "x", "b": "y"}, ["['a', 'b']", "to_sharegpt"]),
        ({"Question": "q", " answer": "a", "id": "1"}, ["as in {'Question': 'question', ' answer': 'answer'}"]),
        ({"role": "user", "content": "q"}, ["rows that are no single turns", "one row: [{'messages': turns}]"]),
        ({"from": "human", "value": "q"}, ["rows that are no single turns", "one row: [{'messages': turns}]"]),
        ({"dialog": ["hello", "hi"]}, ["['dialog']"]),
        (
            {"instruction": "q", "input": "", "output": "a", "text": "t"},
            ["instructions with answers (columns 'instruction', 'input' and 'output'", "plain text (column 'text')",
             "columns=['instruction', 'input', 'output']"],
        ),
        ({"messages": TURNS, "conversations": SHAREGPT}, ["column 'messages'", "column 'conversations', from/value"]),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "messages": TURNS}, ["preference pairs", "conversations"]),
        ({"instruction": "q", "output": "a", "response": "b"}, ["'output'", "'response'"]),
        ({"prompt": "p", "completion": "c", "label": False}, ["'label'", "marked as bad", "filter"]),
    ],
)  # fmt: skip
def test_nothing_is_guessed(row, words):
    with pytest.raises(DataError) as caught:
        recognise([row])
    assert str(caught.value).startswith("columns: ")
    for word in words:
        assert word in str(caught.value)


def test_what_is_no_rows():
    for rows, words in [
        ([], "0 rows"), ({"text": "a"}, "a list of rows"), ("a.jsonl", "load_rows"), ([3], "row 0"),
        ([TURNS], r"row 0: expected a dict, .*\[\{'messages': turns\} for turns in rows\]"),
    ]:  # fmt: skip
        with pytest.raises(DataError, match=words):
            recognise(rows)


def test_column_names_are_enough_for_a_guess_at_the_kind():
    assert recognise(["id", "conversations"]).kind == "sharegpt"
    assert (
        recognise(["prompt", "completion"]).statement == "prompts with completions (columns 'prompt' and 'completion')"
    )


def test_a_row_of_another_shape_is_named_wherever_it_is():
    rows = [{"messages": TURNS}] * 500 + [{"text": "t"}, {"mesages": TURNS}, {"messages": TURNS}, 3]
    with pytest.raises(DataError) as caught:
        canonical(rows, recognise(rows))
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("row 500, fields: expected 'messages', got ['text']. The set is conversations")
    assert lines[1] == "row 501, fields: expected 'messages', got ['mesages']. did you mean 'messages'?"
    assert lines[2].startswith("row 503: expected a dict, got 3")
    first_broken = [{"mesages": TURNS}, {"messages": TURNS}]
    with pytest.raises(DataError, match="row 0, fields"):
        canonical(first_broken, recognise(first_broken))


def test_a_stream_is_read_as_it_goes():
    read = []

    def generate():
        for index in range(100_000):
            read.append(index)
            yield {"conversations": SHAREGPT, "id": index}

    rows = IterableDataset.from_generator(generate)
    recognised = recognise(rows)
    assert recognised.statement == "ShareGPT conversations (column 'conversations', from/value), a stream"
    made = iter(canonical(rows, recognised))
    assert next(made) == {"id": 0, "messages": TURNS}
    assert max(read) < 200


def test_a_data_set_is_mapped_once_and_kept(tmp_path):
    path = tmp_path / "rows.parquet"
    Dataset.from_list([{"conversations": SHAREGPT}] * 3).to_parquet(path)
    stored = Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    first, second = (canonical(stored, recognise(stored)) for _ in range(2))
    assert first.cache_files == second.cache_files and len(first.cache_files) == 1
    assert list(first) == [{"messages": TURNS}] * 3
    with pytest.raises(DataError, match=r"\[2\].from: expected a known role, got 'narrator'"):
        canonical([{"conversations": [*SHAREGPT, {"from": "narrator", "value": "x"}]}], recognise(stored))
