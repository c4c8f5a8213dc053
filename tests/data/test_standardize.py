"""Conversations under the usual names and back, and columns merged into conversations, exactly."""

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

import fastft
from fastft.data.recognise import canonical, recognise
from fastft.data.standardize import standardize_data_formats, standardize_sharegpt, to_sharegpt
from fastft.errors import DataError, UsageError

ALPACA = [
    {"instruction": "add", "input": "1 2", "output": "3", "n": 0},
    {"instruction": "greet", "input": "", "output": "hi", "n": 1},
    {"instruction": "name", "input": None, "output": "me", "n": 2},
    {"instruction": "say", "input": "x", "output": "y", "n": 3},
]
CONTAINERS = {
    "list": list,
    "Dataset": Dataset.from_list,
    "stream": lambda rows: Dataset.from_list(rows).to_iterable_dataset(),
}
container = pytest.mark.parametrize("made", CONTAINERS.values(), ids=CONTAINERS)


def asked(rows):
    return [[turn["value"] for turn in row["conversations"] if turn["from"] == "human"] for row in rows]


def test_names():
    assert standardize_sharegpt is standardize_data_formats is fastft.standardize_sharegpt
    assert fastft.to_sharegpt is to_sharegpt


@container
def test_standardize_keeps_column_and_fields(made):
    turns = [
        {"from": "system", "value": ""},
        {"from": "human", "value": "q", "weight": 0},
        {"from": "gpt", "value": "a"},
        {"from": "tool", "value": "r"},
    ]
    rows = standardize_sharegpt(made([{"conversations": turns, "id": 3}]))
    wanted = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "q", "weight": 0},
        {"role": "assistant", "content": "a"},
        {"role": "tool", "content": "r"},
    ]
    assert list(rows) == [{"conversations": wanted, "id": 3}]
    assert list(standardize_sharegpt(rows)) == list(rows)


def test_aliases_and_processors():
    rows = [{"conversations": [{"from": "boss", "value": "q"}, {"from": "Helper", "value": "a"}]}]
    names = {"aliases_for_user": ["boss"], "aliases_for_assistant": ["helper"], "aliases_for_system": ["rules"]}
    assert standardize_data_formats(rows, **names)[0]["conversations"] == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    with pytest.raises(DataError, match=r"row 0, conversations\[0\].from: expected a known role, got 'boss'"):
        standardize_data_formats(rows)

    class Processor:
        image_processor = object()

    assert standardize_data_formats(rows, Processor(), **names)[0]["conversations"][1] == {
        "role": "assistant",
        "content": [{"type": "text", "text": "a"}],
    }


def test_what_is_no_conversation():
    with pytest.raises(DataError, match=r"instructions with answers.*to_sharegpt"):
        standardize_sharegpt(ALPACA)
    good = {"conversations": [{"from": "human", "value": "q"}]}
    with pytest.raises(DataError) as caught:
        standardize_sharegpt([good, {"conversations": [{"value": "q"}]}, {"text": "x"}, 3])
    starts = ["row 1, conversations[0].from", "row 2, fields", "row 3"]
    assert [line.split(": expected")[0] for line in str(caught.value).splitlines()] == starts


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda part: not part.isspace())
# roles that alternate, with or without a system message before them
conversations = st.lists(st.tuples(text, text), min_size=1, max_size=4).flatmap(
    lambda pairs: st.one_of(st.none(), text).map(
        lambda system: (
            ([("system", system)] if system else [])
            + [turn for asked, said in pairs for turn in (("user", asked), ("assistant", said))]
        )
    )
)
BACK = {"user": "human", "assistant": "gpt", "system": "system"}


@settings(max_examples=60, deadline=None)
@given(st.lists(conversations, min_size=1, max_size=3))
def test_there_and_back_again(many):
    messages = [{"messages": [{"role": role, "content": said} for role, said in turns]} for turns in many]
    sharegpt = [{"conversations": [{"from": BACK[role], "value": said} for role, said in turns]} for turns in many]
    assert canonical(sharegpt, recognise(sharegpt)) == messages
    assert [row["conversations"] for row in standardize_sharegpt(sharegpt)] == [row["messages"] for row in messages]


@settings(max_examples=10, deadline=None)
@given(st.lists(conversations, min_size=1, max_size=3))
def test_a_data_set_gives_what_a_list_gives(many):
    sharegpt = [{"conversations": [{"from": BACK[role], "value": said} for role, said in turns]} for turns in many]
    stored = Dataset.from_list(sharegpt)
    assert list(canonical(stored, recognise(stored))) == canonical(sharegpt, recognise(sharegpt))


@container
def test_merged_columns(made):
    rows = list(to_sharegpt(made(ALPACA), "{instruction}[[\nInput: {input} of row {n}.]] {{done}}"))
    assert asked(rows) == [
        ["add\nInput: 1 2 of row 0. {done}"], ["greet {done}"], ["name {done}"], ["say\nInput: x of row 3. {done}"]
    ]  # fmt: skip
    assert [set(row) for row in rows] == [{"conversations"}] * 4
    assert rows[0]["conversations"][1] == {"from": "gpt", "value": "3"}
    assert canonical(rows, recognise(rows))[1]["messages"] == [
        {"role": "user", "content": "greet {done}"},
        {"role": "assistant", "content": "hi"},
    ]


@container
def test_other_columns_stay_on_request(made):
    rows = list(
        to_sharegpt(made(ALPACA[:1]), "{input}?", merged_column_name="asked", output_column_name="instruction",
                    remove_unused_columns=False)
    )  # fmt: skip
    turns = [{"from": "human", "value": "1 2?"}, {"from": "gpt", "value": "add"}]
    assert rows == [{**ALPACA[0], "asked": "1 2?", "conversations": turns}]
    assert asked(to_sharegpt(made(ALPACA[:1]))) == [["add"]]  # no merged_prompt: the column itself


@pytest.mark.parametrize("made", [list, Dataset.from_list], ids=["list", "Dataset"])
def test_conversations_are_extended(made):
    rows = [{"instruction": f"q{index}", "output": f"a{index}"} for index in range(20)]
    long = list(to_sharegpt(made(rows), conversation_extension=3))
    found = asked(long)
    assert [turns[0] for turns in found] == [f"q{index}" for index in range(20)]
    assert all(len(set(turns)) == 3 for turns in found)  # others, not the same again
    assert sorted(turn for turns in found for turn in turns) == sorted(
        [f"q{index}" for index in range(20)] * 3
    )  # each as often as any
    for row in long:
        answers = [turn["value"] for turn in row["conversations"] if turn["from"] == "gpt"]
        assert answers == [turn.replace("q", "a") for turn in asked([row])[0]]
    assert long == list(to_sharegpt(made(rows), conversation_extension=3))
    assert long == list(to_sharegpt(rows, conversation_extension=3))  # whatever holds the rows
    assert long != list(to_sharegpt(made(rows), conversation_extension=3, random_state=1))
    with pytest.raises(UsageError, match="at most the number of rows, 20"):
        to_sharegpt(made(rows), conversation_extension=21)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"merged_prompt": "{instructoin} {no}"}, ["'instructoin'", "did you mean 'instruction'", "got 'no'"]),
        ({"merged_prompt": "{input}", "output_column_name": "ouput"}, ["output_column_name", "'output'"]),
        ({"merged_prompt": "[[{input}"}, ["closed by ]]"]),
        ({"merged_prompt": "text [[alone]] {input}"}, ["[[alone]]"]),
        ({"merged_prompt": "text"}, ["at least one {column}"]),
        ({"merged_column_name": "instruct"}, ["merged_column_name", "did you mean 'instruction'"]),
        ({"conversation_extension": 0}, ["conversation_extension", "at least 1"]),
    ],
)
def test_wrong_arguments(arguments, words):
    with pytest.raises(UsageError) as caught:
        to_sharegpt(ALPACA, **arguments)
    for word in words:
        assert word in str(caught.value)


def test_streams_cannot_be_extended():
    with pytest.raises(UsageError, match="1 for a stream"):
        to_sharegpt(Dataset.from_list(ALPACA).to_iterable_dataset(), conversation_extension=2)


def test_broken_cells():
    with pytest.raises(DataError) as caught:
        to_sharegpt([*ALPACA, {**ALPACA[0], "output": ""}], "{instruction} {input}")
    places = [line.split(":")[0] for line in str(caught.value).splitlines()]
    assert places == ["row 1, input", "row 2, input", "row 4, output", "For these 3"]
    with pytest.raises(DataError, match=r"conversations already.*standardize_sharegpt"):
        to_sharegpt([{"conversations": []}])


def test_an_alias_that_is_one_text():
    rows = [{"conversations": [{"from": "human", "value": "q"}, {"from": "bot9", "value": "a"}]}]
    (row,) = standardize_data_formats(rows, aliases_for_assistant="bot9")
    assert [turn["role"] for turn in row["conversations"]] == ["user", "assistant"]
