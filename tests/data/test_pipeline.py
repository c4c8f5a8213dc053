"""Over processes, from the cache, and as a stream: the same rows, errors that name them, and little memory."""

from pathlib import Path

import peaks
import pytest
from datasets import Dataset

from fastft.data import pipeline
from fastft.data.chat import chat_dataset, tokenised
from fastft.data.preview import preview
from fastft.data.tokenise import Encoder
from fastft.errors import DataError


@pytest.fixture
def large(monkeypatch):
    """A hundred rows are many."""
    monkeypatch.setattr(pipeline, "LARGE", 100)
    monkeypatch.setattr(pipeline, "BATCH", 30)


@pytest.fixture
def work(monkeypatch):
    """Count the batches that are encoded in this process."""
    done = []
    table = Encoder.table

    def counted(self, rows, indices):
        done.append(len(rows))
        return table(self, rows, indices)

    monkeypatch.setattr(Encoder, "table", counted)
    return done


@pytest.mark.parametrize("num_proc", [1, 2])
def test_the_same_rows_however_they_come(num_proc, large, build_tokenizer, chats):
    tokenizer, rows = build_tokenizer(), chats(250)
    expected = [chat_dataset(rows[start : start + 50], tokenizer)[:] for start in range(0, 250, 50)]
    expected = {name: sum((part[name] for part in expected), []) for name in ("input_ids", "labels")}  # noqa: RUF017
    for source in (rows, tuple(rows), iter(rows), Dataset.from_list(rows)):
        made = chat_dataset(source, tokenizer, num_proc=num_proc, progress=False)
        assert made[:] == expected
        assert made.cache_files
    stream = chat_dataset(Dataset.from_list(rows).to_iterable_dataset(), tokenizer)
    assert [row["labels"] for row in stream] == expected["labels"]
    assert set(stream.column_names) == {"input_ids", "labels"}


def test_the_same_content_is_tokenised_once(large, work, build_tokenizer, chats, marked):
    rows = chats(120)

    def again(rows=rows, tokenizer=None, train_on="assistant", **options):
        work.clear()
        chat_dataset(rows, tokenizer or build_tokenizer(), train_on, num_proc=1, progress=False, **options)
        return sum(work)

    assert again() == 120
    assert again() == 0  # another tokenizer object, the same content
    assert again([dict(row) for row in rows]) == 0
    assert again(iter(rows)) == 0
    assert again(train_on="last") == 120 and again(max_length=500) == 120
    assert again(rows[:-1] + chats(1)) == 120
    changed = build_tokenizer("bytes", marked.replace("<|im_start|>", "<|im_start|> "))
    assert again(tokenizer=changed) == 120 and again(tokenizer=changed) == 0
    added = build_tokenizer()
    added.add_tokens(["What"])
    assert again(tokenizer=added) == 120
    assert again() == 0
    data = Dataset.from_list(rows)
    assert again(data) == 120 and again(Dataset.from_list(rows)) == 0


def test_errors_name_the_row_of_the_whole_set(large, build_tokenizer, chats):
    rows = chats(250)
    rows[70]["messages"][1]["content"] = ""
    rows[203] = {"mesages": []}
    for source in (rows, iter(rows)):
        with pytest.raises(DataError) as caught:
            chat_dataset(source, build_tokenizer(), num_proc=2, progress=False)
        text = str(caught.value)
        assert "row 70, messages[1].content" in text and "row 203, fields" in text and len(caught.value.problems) == 2
    with pytest.raises(DataError, match="eval row 70"):
        tokenised(rows, build_tokenizer(), "assistant", "eval")
    lazy = chat_dataset(iter_dataset(rows[:100]), build_tokenizer())
    with pytest.raises(DataError, match="row 70, messages"):
        list(lazy)


def test_no_rows(build_tokenizer):
    for source in ([], iter([]), Dataset.from_dict({"text": []})):
        with pytest.raises(DataError, match="at least one row"):
            chat_dataset(source, build_tokenizer())


def iter_dataset(rows):
    from datasets import IterableDataset

    return IterableDataset.from_generator(lambda: iter(rows))


def test_rows_that_json_cannot_hold(large, build_tokenizer, chats):
    rows = [{**row, "extra": {1, 2}} for row in chats(120)]
    expected = chat_dataset(chats(99), build_tokenizer())
    made = chat_dataset(rows, build_tokenizer(), num_proc=1, progress=False)
    assert made["labels"][:99] == expected["labels"][:]
    for row in ({"a": [1, None, "\ud800é"], "b": {"c": 1.5}}, {1, 2}, "text"):
        assert pipeline.unspooled(pipeline.spooled_bytes(row)) == row


def test_counts_over_the_whole_set(large, build_tokenizer, chats, capsys):
    tokenizer, rows = build_tokenizer(), chats(120)
    for row in rows[:6]:
        row["messages"][0]["content"] = "What " * 100
    options = {"max_length": 60, "overlong": "truncate", "num_proc": 1, "progress": False}
    with pytest.raises(DataError, match=r"got '6 of 120 \(5.00%\)'"):
        chat_dataset(rows, tokenizer, **options)
    made = chat_dataset(rows, tokenizer, max_unlearnable=0.05, **options)
    assert len(made) == 114 and "6 of 120 rows have nothing left to learn" in capsys.readouterr().out
    assert made["labels"][:] == chat_dataset(rows[6:], tokenizer, **options)["labels"][:]


@pytest.mark.parametrize(("long", "more"), [(10, None), (11, "and 1 more row"), (13, "and 3 more rows")])
def test_as_many_rows_have_nothing_to_learn_as_the_preview_says(build_tokenizer, chats, long, more):
    """The sentence about all rows is said besides, and is no row."""
    tokenizer, rows = build_tokenizer(), chats(20)
    for row in rows[:long]:
        row["messages"][0]["content"] = "What " * 100
    assert preview(rows, tokenizer, 1, lengths=(60,)).truncation.losses[0].rows_lost == long
    with pytest.raises(DataError) as caught:
        chat_dataset(rows, tokenizer, max_length=60, overlong="truncate")
    lines = str(caught.value).splitlines()
    assert [line for line in lines if "more row" in line] == ([more] if more else [])
    assert sum(line.startswith("row ") for line in lines) == 10 and f"got '{long} of 20" in lines[-1]


def test_rows_with_several_mistakes_are_counted_once(build_tokenizer):
    bad = {"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": 4}]}
    with pytest.raises(DataError) as caught:
        chat_dataset([bad] * 12, build_tokenizer())
    assert str(caught.value).splitlines()[-1] == "and 7 more rows"


def test_a_stop_token_that_is_never_learnt(build_tokenizer, chats):
    long = chats(3, answer="It is {n}. " * 30)
    with pytest.raises(DataError) as caught:
        chat_dataset(long, build_tokenizer(), max_length=60, overlong="truncate")
    assert str(caught.value) == (
        "stop token, learnt in 3 rows: expected at least once one of ['<|im_end|>'], got '0 times'. 3 of them fill "
        "max_length=60 and are cut before it: raise max_length. A model that never learns to stop goes on until it is "
        "stopped."
    )
    assert len(chat_dataset([*long, *chats(1)], build_tokenizer(), max_length=60, overlong="truncate")) == 4
    bare = "{%- for m in messages %}{{- m['role'] + ': ' + m['content'] + '\n' }}{%- endfor %}"
    with pytest.raises(DataError, match="stop token") as caught:  # none is cut, and it is no matter of length
        chat_dataset(chats(3), build_tokenizer("bytes", bare), "all", max_length=500, overlong="truncate")
    assert "max_length" not in str(caught.value)
    stream = Dataset.from_list(long).to_iterable_dataset()
    with pytest.raises(
        DataError, match=r"stop token, learnt in the first 3 rows of the stream.*'. 3 of them fill max_length=60"
    ):
        chat_dataset(stream, build_tokenizer(), max_length=60, overlong="truncate")


STREAM = """
import json, sys, threading, time
sys.path.insert(0, {tests!r})
from conftest import build
import datasets
from fastft.data.chat import chat_dataset
datasets.config.HF_DATASETS_CACHE = {cache!r}

def rows(count):
    for n in range(count):
        # few different words: a tokenizer remembers up to 10,000 of them
        turns = [("user", f"What is {{n % 100}}? " * 20), ("assistant", "a " * 60)]
        yield {{"messages": [{{"role": role, "content": content}} for role, content in turns]}}

highest = 0.0

def watch():  # pages of mapped files are the kernel's to drop, so only what is the process's own counts
    global highest
    while True:
        status = open("/proc/self/status").read()
        highest = max(highest, int(status.split("RssAnon:")[1].split()[0]) / 1024)
        time.sleep(0.005)

threading.Thread(target=watch, daemon=True).start()

def peak():
    time.sleep(0.02)
    return highest

import fastft.data.pipeline
fastft.data.pipeline.LARGE = 1000
tokenizer, seen, marks = build(), 0, []
if {lazy}:
    data = chat_dataset(datasets.IterableDataset.from_generator(rows, gen_kwargs={{"count": 18000}}), tokenizer)
    for row in data:
        seen += 1
        if seen in (6000, 18000):
            marks.append(peak())
else:
    for count in (6000, 18000):
        made = chat_dataset(rows(count), tokenizer, num_proc=1, progress=False)
        marks.append(peak())
print(json.dumps([marks[1] - marks[0], marks[0]]))
"""


@peaks.needs_linux
@pytest.mark.parametrize("lazy", [True, False], ids=["IterableDataset", "generator"])
def test_memory_does_not_grow_with_a_stream(lazy, tmp_path):
    """12,000 more rows are 36 MB of ids and labels in int32 alone; half of that would be too much."""
    script = STREAM.format(tests=str(Path(__file__).parent), cache=str(tmp_path), lazy=lazy)
    grown, before = peaks.run(script)
    assert grown < 18, (grown, before)
