"""Orders of turns that are mostly a mistake are told, one line a kind; those that are used on purpose are not."""

import pytest

from fastft.chat_templates import get_chat_template
from fastft.data.chat import chat_dataset

SYSTEM, USER = {"role": "system", "content": "s"}, {"role": "user", "content": "q"}
BOT, RESULT = {"role": "assistant", "content": "a"}, {"role": "tool", "content": "r"}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"x": 1}}}]}
UNASKED = (
    "fastft: an answer before any other turn in {}: it is trained on as what opens a conversation. If a question was "
    "lost, add it, or take the answer out."
)
UNANSWERED = (
    "fastft: no answer to the last turn of {}: what follows the last answer is not learnt. If the answer was lost, add "
    "it, or take the turn out."
)
UNCALLED = (
    "fastft: a tool's result behind no turn of the assistant in {}: no call is learnt that it would be the result of. "
    "Put the call before it, or make it a user's turn."
)


@pytest.fixture
def told(build_tokenizer, capsys):
    """Return (rows, ...) -> the lines that are printed on the way."""
    tokenizer = get_chat_template(build_tokenizer(), "qwen3")

    def call(*conversations, **options):
        rows = [{"messages": list(messages)} for messages in conversations]
        capsys.readouterr()
        assert len(chat_dataset(rows, tokenizer, **options)) == len(rows)
        return capsys.readouterr().out.splitlines()

    return call


@pytest.mark.parametrize(
    "messages",
    [
        (USER, USER, BOT),
        (USER, BOT, SYSTEM, USER, BOT),
        (USER, SYSTEM, BOT),
        (SYSTEM, SYSTEM, USER, BOT),
        (SYSTEM, BOT),
        (SYSTEM, BOT, USER, BOT),
        (USER, CALL, RESULT, RESULT, BOT),
        (USER, BOT, RESULT, BOT),  # the call is written into the content
    ],
    ids=lambda messages: " ".join(message["role"] for message in messages),
)
def test_what_is_used_on_purpose(messages, told):
    assert told(messages) == []


def test_one_line_a_kind(told):
    plain = (USER, BOT)
    assert told(plain, (BOT, USER, BOT), (BOT,)) == [UNASKED.format("2 of 3 rows (the first: row 1, 'assistant')")]
    assert told(plain, plain, (USER, BOT, USER)) == [UNANSWERED.format("1 of 3 rows (the first: row 2, 'user')")]
    assert told((USER, CALL, RESULT)) == [UNANSWERED.format("1 of 1 row (the first: row 0, 'tool')")]
    assert told(plain, (USER, RESULT, BOT)) == [UNCALLED.format("1 of 2 rows (the first: row 1, 'tool')")]
    assert told((BOT, USER), plain, (USER, RESULT, BOT)) == [
        UNASKED.format("1 of 3 rows (the first: row 0, 'assistant')"),
        UNANSWERED.format("1 of 3 rows (the first: row 0, 'user')"),
        UNCALLED.format("1 of 3 rows (the first: row 2, 'tool')"),
    ]


def test_where_everything_is_learnt_no_turn_is_without_loss(told):
    assert told((USER, BOT, USER), train_on="all") == []


OPENING = {"role": "assistant", "content": "zz"}


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
@pytest.mark.parametrize("row", [
    {"messages": [OPENING, USER, BOT]},
    {"messages": [{**OPENING, "weight": 0}, USER, BOT]},
    {"messages": [OPENING, USER]},
    {"prompt": [OPENING, USER], "completion": [BOT]},
], ids=["turns", "weight 0", "alone", "in a prompt"])  # fmt: skip
def test_an_opening_answer_is_told_where_it_is_learnt(row, train_on, build_tokenizer, capsys):
    if train_on == "all" and any("weight" in message for message in row.get("messages", ())):
        return  # refused: a weight says what bears loss, and all does
    if "prompt" in row and train_on == "assistant":
        train_on = "completion"
    tokenizer = get_chat_template(build_tokenizer(), "qwen3")
    (made,) = chat_dataset([row], tokenizer, train_on=train_on)
    told = "an answer before any other turn" in capsys.readouterr().out
    learnt = tokenizer.decode([label for label in made["labels"] if label != -100])
    assert told is ("zz" in learnt)
