"""What `chat_dataset` takes is recognised first; every row is then of that kind, or an error that names it."""

import itertools

import pytest
from datasets import Dataset, IterableDataset

from fastft.chat_templates import get_chat_template
from fastft.data.chat import chat_dataset
from fastft.data.inputs import read
from fastft.data.recognise import SAMPLE
from fastft.errors import DataError

USER, BOT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
GOOD = {"messages": [USER, BOT]}
SHAREGPT = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}


def learnt(rows, tokenizer, **options):
    return [
        tokenizer.decode([label for label in row["labels"] if label != -100])
        for row in chat_dataset(rows, tokenizer, **options)
    ]


def told(rows, tokenizer, **options):
    with pytest.raises(DataError) as caught:
        chat_dataset(rows, tokenizer, **options)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("place", [1, SAMPLE + 20])
@pytest.mark.parametrize("other", [{"text": "t"}, {"prompt": "p", "completion": "c"}, SHAREGPT, {"input_ids": [1]}])
def test_a_row_of_another_shape_is_named(other, place, build_tokenizer):
    rows = [GOOD] * place + [other, GOOD]
    for source in (rows, iter(rows)):
        (line,) = told(source, build_tokenizer())
        assert line.startswith(
            f"row {place}, fields: expected 'messages', got {sorted(other)}. The set is conversations"
        )


def test_columns_that_could_be_two_things(build_tokenizer):
    both = {**GOOD, "text": "t"}
    for rows in ([both], [GOOD, both], iter([both]), Dataset.from_list([both])):
        (line,) = told(rows, build_tokenizer())
        assert line.startswith("columns: expected columns of one kind; these could be conversations")
        assert line.endswith("load_rows(rows, columns=['messages']).")


def test_other_names_of_the_roles_are_mapped_wherever_they_stand(build_tokenizer, capsys):
    tokenizer = build_tokenizer()
    named = {"messages": [{"role": "human", "content": "q"}, {"role": "gpt", "content": "a"}]}
    for rows in ([named, GOOD], [GOOD, named], iter([named, named]), Dataset.from_list([named, named])):
        assert learnt(rows, tokenizer) == ["a<|im_end|>"] * 2
        assert capsys.readouterr().out == "fastft: ShareGPT conversations (column 'messages', role/content), 2 rows\n"
    assert told([GOOD] * SAMPLE + [named], tokenizer) == [
        f"row {SAMPLE}, messages[0].role: expected 'user', got 'human'",
        f"row {SAMPLE}, messages[1].role: expected 'assistant', got 'gpt'",
        "For these 2: fastft.standardize_sharegpt(rows) renames the roles.",
    ]


def test_it_is_said_once_and_of_an_endless_source(build_tokenizer, capsys):
    tokenizer = build_tokenizer()
    assert learnt([GOOD], tokenizer) == ["a<|im_end|>"] and capsys.readouterr().out == ""
    assert learnt(iter([SHAREGPT] * 150), tokenizer) == ["a<|im_end|>"] * 150
    assert capsys.readouterr().out == "fastft: ShareGPT conversations (column 'conversations', from/value), a stream\n"
    given = read(itertools.repeat(SHAREGPT))
    rows = list(itertools.islice(given.rows, SAMPLE + 1))  # no more than the sample was read, and none of it is gone
    assert len(rows) == SAMPLE + 1 and given.row("row 0", rows[0]) == GOOD


def test_parts_that_only_later_rows_have(build_tokenizer):
    tokenizer, plain = build_tokenizer(), {"instruction": "Add", "output": "3"}
    rows = [plain] * SAMPLE + [{**plain, "input": "1 and 2", "system": "Be brief", "history": [["q", "a"]]}]
    text = tokenizer.decode(chat_dataset(rows, tokenizer)[SAMPLE]["input_ids"])
    turns = ["system\nBe brief", "user\nq", "assistant\na", "user\nAdd\n\n1 and 2", "assistant\n3"]
    assert text == "".join(f"<|im_start|>{turn}<|im_end|>\n" for turn in turns)


def test_two_answers_in_a_row_are_taken_where_that_is_asked_for(build_tokenizer):
    rows = [{"messages": [USER, BOT, {**BOT, "content": "b"}]}]
    tokenizer = build_tokenizer()
    assert "row 0, messages[2].role" in told(rows, tokenizer)[0] and "alternate=False" in told(rows, tokenizer)[0]
    assert learnt(rows, tokenizer, alternate=False) == ["a<|im_end|>b<|im_end|>"]
    assert learnt(rows, tokenizer, train_on="last", alternate=False) == ["b<|im_end|>"]
    (line,) = told(rows, get_chat_template(tokenizer, "gemma"), alternate=False)
    assert line.startswith("row 0, messages: ") and "but user and assistant take turns" in line


def test_kinds_that_are_not_rendered(build_tokenizer):
    assert "They are preferences" in told([{"prompt": "p", "chosen": "a", "rejected": "b"}], build_tokenizer())[0]
    assert "Token ids need no rendering" in told([{"input_ids": [1, 2]}], build_tokenizer())[0]


def test_a_template_for_other_names_takes_what_was_renamed(build_tokenizer):
    names = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}
    tokenizer = get_chat_template(build_tokenizer(), "chatml", mapping=names)
    assert learnt([SHAREGPT], tokenizer) == learnt([GOOD], tokenizer) == ["a<|im_end|>"]
    text = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    assert tokenizer.apply_chat_template(SHAREGPT["conversations"], tokenize=False) == text


TURNS = {"prompt": [USER], "completion": [BOT]}
ASKED = {"instruction": "i", "output": "o"}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]


@pytest.mark.parametrize(
    ("row", "more"),
    [
        (ASKED, {"input": "late"}),
        (ASKED, {"system": "late"}),
        (ASKED, {"history": [["late", "yes"]]}),
        (GOOD, {"system_prompt": "late"}),
        (GOOD, {"tools": TOOLS}),
        (TURNS, {"tools": TOOLS}),
        (GOOD, {"id": 3}),
    ],
)
def test_a_stream_keeps_fields_that_its_first_row_lacks(row, more, build_tokenizer):
    tokenizer = get_chat_template(build_tokenizer(), "qwen-3-instruct")
    rows = [row, {**row, **more}, row]
    stream = chat_dataset(IterableDataset.from_generator(lambda: iter(rows)), tokenizer)
    assert list(stream) == list(chat_dataset(rows, tokenizer))  # not one column more, either


def test_rows_may_name_a_field_differently(build_tokenizer):
    """`datasets` gives every row of a batch of a stream the fields of all, empty where the row has none."""
    tokenizer = build_tokenizer()
    rows = [{**ASKED, "input": "first"}, {**ASKED, "context": "second", "system_prompt": "s"}, {**ASKED, "system": "t"}]
    whole = chat_dataset(rows, tokenizer)
    stream = chat_dataset(IterableDataset.from_generator(lambda: iter(rows)), tokenizer)
    assert list(stream) == list(whole)
    texts = [tokenizer.decode(row["input_ids"]) for row in whole]
    for text, system, asked in zip(texts, (None, "s", "t"), ("i\n\nfirst", "i\n\nsecond", "i"), strict=True):
        assert ("<|im_start|>system" in text) == (system is not None)
        assert f"user\n{asked}<|im_end|>" in text and (system is None or f"system\n{system}<|im_end|>" in text)
