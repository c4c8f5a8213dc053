"""What is left out or not learnt is told once, in the same words of a set and of a stream, where it first comes up."""

from itertools import chain

import pytest
from datasets import Dataset, IterableDataset

from fastft.chat_templates import get_chat_template
from fastft.data.chat import chat_dataset
from fastft.data.notes import Note, Notes, packed, unpacked
from fastft.errors import DataError

USER, BOT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
IMAGE = {"type": "image", "image": "x.png"}
PLAIN = {"messages": [USER, BOT]}
THOUGHT = {"messages": [USER, {**BOT, "reasoning_content": "why"}] * 3}  # two earlier answers
SEEN = {"messages": [{**USER, "content": [{"type": "text", "text": "q"}, IMAGE, IMAGE]}, BOT]}
UNLEARNT = (
    "fastft: {} earlier answers bear no loss in {}: the chat template leaves out the reasoning that a model writes "
    "before them."
)
MEDIA = "fastft: {} images or the like become the chat template's markers in {}: the model sees none of them."
PLACES = {
    "reasoning": ("qwen-3", THOUGHT, UNLEARNT, "'a<|im_end|>'"),
    "images": ("qwen-2.5", SEEN, MEDIA, "'image'"),
}


@pytest.fixture(params=PLACES)
def case(request, build_tokenizer):
    """Return a tokenizer, a row of which something is left out, the line that tells it, and what that names."""
    form, row, line, found = PLACES[request.param]
    return get_chat_template(build_tokenizer(), form), row, line, found


def stream_of(*shards):
    """Return a stream of the rows of `shards`, one after the other; each is for one worker of a loader."""
    return IterableDataset.from_generator(lambda parts: chain.from_iterable(parts), gen_kwargs={"parts": list(shards)})


def lines_of(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("fastft: ")]


def loaded(stream):
    """Return how many rows two workers read; they have ended, and printed, then."""
    from torch.utils.data import DataLoader

    return len(list(DataLoader(stream, batch_size=None, num_workers=2)))


def test_sets_and_streams_tell_the_same(case, capsys):
    tokenizer, row, line, found = case
    rows = [PLAIN, row, PLAIN, row]
    made = chat_dataset(rows, tokenizer)
    assert lines_of(capsys) == [line.format(4, f"2 of 4 rows (the first: row 1, {found})")]
    streamed = chat_dataset(stream_of(rows), tokenizer)
    assert lines_of(capsys) == [line.format(4, f"2 of the first 4 rows (the first: row 1, {found})")]
    assert list(streamed) == list(made) and list(streamed) == list(made)  # and what is read is told no second time
    assert lines_of(capsys) == []


def test_rows_further_down_a_stream_are_told_as_they_are_read(case, capsys):
    tokenizer, row, line, found = case
    streamed = chat_dataset(stream_of([PLAIN] * 250 + [row, row] + [PLAIN] * 100 + [row]), tokenizer)
    assert lines_of(capsys) == []
    assert len(list(streamed)) == 353
    assert lines_of(capsys) == [line.format(4, f"2 of the first 300 rows (the first: row 250, {found})")]
    assert len(list(streamed)) == 353 and lines_of(capsys) == []


def test_a_stream_that_is_read_again_or_goes_on_counts_the_rows_it_reads(case, capsys):
    tokenizer, row, line, found = case
    rows = [PLAIN] * 200 + [row] * 5 + [PLAIN] * 195 + [row] + [PLAIN] * 100
    whole = chat_dataset(stream_of(rows), tokenizer)
    assert len(list(zip(range(150), whole, strict=False))) == 150 and lines_of(capsys) == []
    reader = iter(whole)
    for _ in range(350):
        next(reader)
    assert lines_of(capsys) == [line.format(10, f"5 of the first 300 rows (the first: row 200, {found})")]
    resumed = chat_dataset(stream_of(rows), tokenizer)
    resumed.load_state_dict(whole.state_dict())
    assert len(list(resumed)) == 151
    assert lines_of(capsys) == [line.format(2, f"1 of the 200 rows from row 300 on (the first: row 400, {found})")]
    resumed.set_epoch(1)
    assert len(list(resumed)) == 501 and lines_of(capsys) == []


def test_of_the_workers_of_a_loader_the_first_tells_of_its_rows(case, capfd):
    tokenizer, row, line, found = case
    mine, other = [PLAIN] * 120 + [row] + [PLAIN] * 29, [PLAIN] * 110 + [row] * 40
    assert loaded(chat_dataset(stream_of(mine, other), tokenizer)) == 300
    assert lines_of(capfd) == [line.format(2, f"1 of the first 150 rows of one worker (the first: row 120, {found})")]


def test_a_worker_that_goes_on_behind_the_first_rows_has_not_read_them(case, capfd):
    tokenizer, row, line, found = case
    rows = [PLAIN] * 150 + [row] + [PLAIN] * 50
    begun, resumed = (chat_dataset(stream_of(rows), tokenizer) for _ in range(2))
    assert len(list(zip(begun, range(101), strict=False))) == 101
    resumed.load_state_dict(begun.state_dict())
    capfd.readouterr()
    assert loaded(resumed) == 99
    told = f"1 of the 100 rows of one worker from row 100 on (the first: row 150, {found})"
    assert lines_of(capfd) == [line.format(2, told)]


def test_workers_tell_nothing_that_was_told_of_the_first_rows(case, capfd):
    tokenizer, row, line, found = case
    streamed = chat_dataset(stream_of([row] * 150, [row] * 150), tokenizer)
    assert lines_of(capfd) == [line.format(200, f"100 of the first 100 rows (the first: row 0, {found})")]
    assert loaded(streamed) == 300 and lines_of(capfd) == []


def test_of_rows_of_a_stream_that_are_refused_nothing_else_is_told(build_tokenizer, capsys):
    tokenizer = get_chat_template(build_tokenizer(), "qwen-2.5")
    long = {"messages": [{**USER, "content": [{"type": "text", "text": "q" * 200}, IMAGE]}, BOT]}
    streamed = chat_dataset(stream_of([PLAIN, long]), tokenizer, max_length=100)
    assert lines_of(capsys) == []
    with pytest.raises(DataError, match="at most max_length=100"):
        list(streamed)
    assert lines_of(capsys) == []


def test_of_the_last_turn_alone_earlier_answers_are_not_told(build_tokenizer, capsys):
    tokenizer = get_chat_template(build_tokenizer(), "qwen-3")
    chat_dataset([THOUGHT], tokenizer, train_on="last")
    assert lines_of(capsys) == []


def test_a_long_answer_is_told_by_its_start(build_tokenizer, capsys):
    tokenizer = get_chat_template(build_tokenizer(), "qwen-3")
    long = {**BOT, "content": "a" * 200, "reasoning_content": "why"}
    chat_dataset([{"messages": [USER, long] * 2}], tokenizer)
    found = "a" * 37 + "... (210 characters)"
    assert lines_of(capsys) == [UNLEARNT.format(1, f"1 of 1 row (the first: row 0, {found!r})")]


def test_a_large_set_and_its_cache(case, capsys):
    tokenizer, row, line, found = case
    rows = [PLAIN] * 10_000 + [row]
    told = [line.format(2, f"1 of 10,001 rows (the first: row 10000, {found})")]
    for _ in range(2):
        chat_dataset(rows, tokenizer, num_proc=1, progress=False)
        assert lines_of(capsys) == told


def test_of_rows_that_are_left_out_nothing_else_is_told(build_tokenizer, capsys):
    tokenizer = get_chat_template(build_tokenizer(), "qwen-2.5")
    long = {"messages": [{**USER, "content": [{"type": "text", "text": "q" * 200}, IMAGE]}, BOT]}
    cut = {"max_length": 100, "overlong": "truncate", "max_unlearnable": 0.5}
    assert len(chat_dataset([long, PLAIN], tokenizer, **cut)) == 1
    assert lines_of(capsys) == ["fastft: 1 of 2 rows have nothing left to learn within max_length=100: left out."]


def test_a_format_written_by_hand_is_settled_by_the_first_rows_of_a_stream(build_tokenizer, capsys):
    written, plain = {"text": "<|im_start|>user\nq<|im_end|>\n"}, {"text": "q"}
    streamed = chat_dataset(
        Dataset.from_list([written] * 100 + [plain] * 900).to_iterable_dataset(), build_tokenizer(), train_on="all"
    )
    assert len(list(streamed)) == 1000
    assert [line for line in lines_of(capsys) if "special tokens" in line] == []


def test_notes_count_rows_and_what_is_in_them():
    notes = Notes()
    notes.add(3, {"media": Note("image", 1200), "unasked": Note("assistant")})
    notes.add(4, {"media": Note("audio")})
    first, second = notes.lines(2000)
    assert f"fastft: {first}" == MEDIA.format("1,201", "2 of 2,000 rows (the first: row 3, 'image')")
    assert second.startswith("an answer before any other turn in 1 of 2,000 rows (the first: row 3, 'assistant'): ")
    assert list(notes.lines(2000)) == []
    kept = {"media": Note("image", 2), "control": Note("<s>")}
    assert packed({}) is None and unpacked(packed(kept)) == kept


KNOWING = (
    "{%- for message in messages %}{%- if message['role'] == 'user' %}{{- message['content'] }}"
    "{%- elif message['role'] == 'assistant' %}{%- generation %}{{- message['content'] + '<|im_end|>' }}"
    "{%- endgeneration %}{%- endif %}{%- endfor %}"
)


def test_what_a_template_leaves_out_of_a_prompt_is_told_once(build_tokenizer, told):
    system, tool = {"role": "system", "content": "be"}, {"type": "function", "function": {"name": "look"}}
    pair = {"prompt": [system, USER], "completion": [BOT]}
    tokenizer = build_tokenizer("bytes", KNOWING)
    turn = "a turn that the chat template renders"
    assert told([pair], tokenizer) == [("row 0, prompt + completion[0]", turn)]
    more = {"prompt": [system, USER], "completion": [BOT, {"role": "tool", "content": "3"}, BOT]}
    assert told([more, pair], tokenizer) == [
        ("row 0, prompt + completion[0]", turn), ("row 0, prompt + completion[3]", turn),
        ("row 1, prompt + completion[0]", turn),
    ]  # fmt: skip
    asked = {"prompt": [USER], "completion": [BOT], "tools": [tool]}
    assert told([asked], tokenizer) == [("row 0, tools", "no tools, for the chat template does not list them")]
    listing = build_tokenizer(
        "bytes", "{%- for tool in tools or [] %}{{- tool['function']['name'] }}{%- endfor %}" + KNOWING
    )
    assert told([{**pair, "tools": [tool]}], listing) == [("row 0, prompt + completion[0]", turn)]
    setting = {"prompt": [USER], "completion": [BOT], "chat_template_kwargs": {"x": 1}}
    assert told([setting], tokenizer) == [
        ("row 0, chat_template_kwargs['x']", "a setting that the chat template reads")
    ]


def test_a_prompt_that_is_refused_alone_is_named_as_one(build_tokenizer, told):
    """Of it, the whole conversation says nothing."""
    ending = "{%- if messages[-1]['role'] == 'user' %}{{- raise_exception('no end') }}{%- endif %}" + KNOWING
    assert told([{"prompt": [USER], "completion": [BOT]}], build_tokenizer("bytes", ending)) == [
        ("row 0, prompt", "messages that the template takes")
    ]


@pytest.fixture
def told():
    """Return (rows, tokenizer) -> where the mistakes are, and what is expected there."""

    def call(rows, tokenizer):
        with pytest.raises(DataError) as caught:
            chat_dataset(rows, tokenizer)
        return [(problem.where, problem.expected) for problem in caught.value.problems]

    return call
