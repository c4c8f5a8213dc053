"""Responses found by their markers in token ids that somebody else made: the same masks as those of the template."""

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastft
from fastft.data.chat import chat_dataset
from fastft.data.packing import pack
from fastft.data.responses import train_on_responses_only
from fastft.errors import DataError, UsageError

CONTENT = st.text(st.sampled_from("ab .\n\tCold?é日😀"), min_size=1, max_size=12).filter(str.strip)
CHAT = st.integers(1, 3).flatmap(lambda turns: st.lists(CONTENT, min_size=2 * turns, max_size=2 * turns))
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
PARTS = {"instruction_part": "<|im_start|>user\n", "response_part": "<|im_start|>assistant\n"}


def row(texts):
    roles = ["user", "assistant"] * len(texts)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]}


@QUICK
@given(
    chats=st.lists(st.integers(1, 3).flatmap(lambda n: st.lists(CONTENT, min_size=2 * n, max_size=2 * n)), min_size=1)
)
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_the_same_masks_as_the_templates(kind, chats, build_tokenizer, unmarked):
    tokenizer, rows = build_tokenizer(kind, unmarked), [row(texts) for texts in chats]
    everything = chat_dataset(rows, tokenizer, "all")
    for given_parts in ({}, PARTS):
        found = train_on_responses_only(everything, tokenizer=tokenizer, **given_parts)
        assert found["labels"][:] == chat_dataset(rows, build_tokenizer(kind))["labels"][:]
    last = train_on_responses_only(everything, tokenizer=tokenizer, last_response_only=True)
    assert last["labels"][:] == chat_dataset(rows, build_tokenizer(kind), "last")["labels"][:]


def test_tool_turns_are_no_part_of_a_response(build_tokenizer):
    tokenizer = build_tokenizer()
    messages = [*row(["a", "b"])["messages"], {"role": "tool", "content": "secret"}, *row(["a", "c"])["messages"][1:]]
    data = chat_dataset([{"messages": messages}], tokenizer, "all")
    labels = train_on_responses_only(data, tokenizer=tokenizer)[0]["labels"]
    assert tokenizer.decode([label for label in labels if label != -100]) == "b<|im_end|>c<|im_end|>"


def test_documents_of_a_packed_row(build_tokenizer, chats):
    tokenizer = build_tokenizer()
    data, _ = pack(chat_dataset(chats(9), tokenizer, "all"), 200)
    exact, _ = pack(chat_dataset(chats(9), tokenizer), 200)
    found = train_on_responses_only(data, tokenizer=tokenizer, last_response_only=True)
    assert found["labels"][:] == exact["labels"][:] and found["seq_lengths"][:] == exact["seq_lengths"][:]


def test_what_bore_no_loss_before_bears_none(build_tokenizer, chats):
    tokenizer = build_tokenizer()
    data = chat_dataset(chats(3), tokenizer)
    before = [[-100, *labels[1:-4], *[-100] * 0, *labels[-4:]] for labels in data["labels"]]
    before[1] = [-100 if place % 2 else label for place, label in enumerate(before[1])]
    ids = data["input_ids"][:]
    made = train_on_responses_only(Dataset.from_dict({"input_ids": ids, "labels": before}), tokenizer=tokenizer)
    assert made["labels"][:] == before


def test_rows_without_a_response(build_tokenizer, chats, capsys):
    tokenizer = build_tokenizer()
    data = chat_dataset(chats(20), tokenizer, "all", max_length=10, overlong="truncate")
    whole = chat_dataset(chats(20), tokenizer, "all")
    mixed = Dataset.from_list([*whole, *list(data)[:3]])
    with pytest.raises(DataError, match=r"got '3 of 23 \(13.04%\): rows 20, 21, 22'.*max_unlearnable=0.14"):
        train_on_responses_only(mixed, tokenizer=tokenizer)
    kept = train_on_responses_only(mixed, tokenizer=tokenizer, max_unlearnable=0.14)
    assert len(kept) == 20 and "3 of 23 rows of the data have no response" in capsys.readouterr().out
    wrong = {"instruction_part": "### Question:", "response_part": "### Answer:"}
    with pytest.raises(DataError, match=r"'### Answer:'.*got '20 of 20"):
        train_on_responses_only(whole, tokenizer=tokenizer, **wrong)
    padded = {name: f"\n {part} " for name, part in PARTS.items()}
    with pytest.raises(DataError, match="force_match=False"):
        train_on_responses_only(whole, tokenizer=tokenizer, **padded)
    loose = train_on_responses_only(whole, tokenizer=tokenizer, force_match=False, **PARTS)
    assert loose["labels"][:] == chat_dataset(chats(20), tokenizer)["labels"][:]


def test_wrong_arguments(build_tokenizer, chats):
    tokenizer = build_tokenizer()
    data = chat_dataset(chats(2), tokenizer)
    with pytest.raises(UsageError, match="a tokenizer"):
        train_on_responses_only(data)
    with pytest.raises(UsageError, match="response_part is missing"):
        train_on_responses_only(data, "x", tokenizer=tokenizer)
    with pytest.raises(UsageError, match=r"response_part.*not empty"):
        train_on_responses_only(data, "x", " ", tokenizer=tokenizer)
    with pytest.raises(DataError, match="'input_ids' among them"):
        train_on_responses_only(Dataset.from_dict({"text": ["a"]}), tokenizer=tokenizer)


def test_a_function_and_a_stream(build_tokenizer, chats):
    tokenizer = build_tokenizer()
    assert fastft.train_on_responses_only is train_on_responses_only
    data, exact = chat_dataset(chats(5), tokenizer, "all"), chat_dataset(chats(5), tokenizer)["labels"][:]
    label = train_on_responses_only(data, tokenizer=tokenizer, return_function=True)
    assert label(data[:]) == {"labels": exact}
    stream = train_on_responses_only(data.to_iterable_dataset(), tokenizer=tokenizer)
    assert [row["labels"] for row in stream] == exact
