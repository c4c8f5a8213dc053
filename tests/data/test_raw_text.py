"""Documents to chunks: every token learnt once, no chunk of two documents, the EOS token where a document ends."""

from itertools import pairwise

import pytest
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft.data.raw_text import spans, text_dataset
from fastft.errors import DataError, UsageError

BOS, EOS = 1, 2


def tokenizer(bos=True, eos="</s>"):
    """A tokenizer of the words w0, w1 ... (ids 10, 11 ...), with a start token or without."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"r{i}" for i in range(6)), *(f"w{i}" for i in range(90))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "unk_token": "<unk>", "eos_token": eos}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def document(count, first=0):
    return {"text": " ".join(f"w{(first + index) % 90}" for index in range(count))}


def ids_of(count, first=0, bos=True):
    return [BOS] * bos + [10 + (first + index) % 90 for index in range(count)] + [EOS]


def test_exact_chunks():
    made = text_dataset([document(7), document(2, 50)], tokenizer(), length=4, overlap=2)
    assert made["input_ids"][:] == [[1, 10, 11, 12], [11, 12, 13, 14], [13, 14, 15, 16], [15, 16, 2], [1, 60, 61, 2]]
    assert made["labels"][:] == [
        [1, 10, 11, 12], [-100, -100, 13, 14], [-100, -100, 15, 16], [-100, -100, 2], [1, 60, 61, 2]
    ]  # fmt: skip
    assert made.features["input_ids"].feature.dtype == "int32"


def test_the_last_chunk_is_never_one_token():
    assert spans(9, 4, 0) == [(0, 4), (4, 8), (7, 9)]
    made = text_dataset([document(3)], tokenizer(), length=4, overlap=0)
    assert made["input_ids"][:] == [[1, 10, 11, 12], [12, 2]] and made["labels"][:] == [[1, 10, 11, 12], [-100, 2]]


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 300), st.integers(2, 40), st.data())
def test_spans_cover_a_document_once(count, length, data):
    overlap = data.draw(st.integers(0, length - 1))
    found = spans(count, length, overlap)
    assert found[0][0] == 0 and found[-1][1] == count
    assert all(2 <= end - start <= length for start, end in found)
    for (_, before), (start, end) in pairwise(found):
        assert end > before and start in (before - overlap, before - overlap - (overlap == 0))
    assert all(end - start == length for start, end in found[:-1])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 89)), min_size=1, max_size=6), st.booleans(), st.data())
def test_without_the_overlaps_the_documents_are_back(sizes, bos, data):
    length = data.draw(st.integers(2, 30))
    overlap = data.draw(st.integers(0, length - 1))
    made = text_dataset([document(*size) for size in sizes], tokenizer(bos), length=length, overlap=overlap)
    documents, whole = [], []
    for ids, labels in zip(made["input_ids"], made["labels"], strict=True):
        assert len(ids) == len(labels) <= length
        context = labels.count(-100)
        assert labels == [-100] * context + ids[context:]  # context first, then what is new
        if context:
            assert whole[-context:] == ids[:context]  # the end of the chunk before, of the same document
        elif overlap:
            assert not whole  # only a document's first chunk has none
        whole += ids[context:]
        if ids[-1] == EOS:
            documents.append(whole)
            whole = []
        assert EOS not in ids[:-1]
    assert documents == [ids_of(*size, bos) for size in sizes] and not whole


def test_start_and_end_tokens_are_not_doubled():
    rows = [{"text": "<s> w1"}, {"text": "w1 </s>"}, {"text": "w2"}, {"text": "<s> w3 </s>"}]
    made = text_dataset(rows, tokenizer())
    assert made["input_ids"][:] == [[1, 11, 2], [1, 11, 2], [1, 12, 2], [1, 13, 2]]


@pytest.mark.parametrize("suffix", ["txt", "md", "jsonl", "csv"])
def test_files(tmp_path, suffix):
    rows = [document(5), document(1, 20)]
    if suffix in ("txt", "md"):
        for index, row in enumerate(rows):
            (tmp_path / f"{index}.{suffix}").write_text(row["text"])
    else:
        lines = [f'{{"text": "{row["text"]}"}}' if suffix == "jsonl" else row["text"] for row in rows]
        (tmp_path / f"a.{suffix}").write_text("\n".join((["text"] if suffix == "csv" else []) + lines))
    wanted = [[1, 10, 11, 12], [12, 13, 14, 2], [1, 30, 2]]
    assert text_dataset(tmp_path, tokenizer(), length=4, overlap=1)["input_ids"][:] == wanted
    streamed = text_dataset(tmp_path, tokenizer(), length=4, overlap=1, stream=True)
    assert isinstance(streamed, IterableDataset)
    for _ in range(2):
        assert [row["input_ids"] for row in streamed] == wanted


def test_containers_and_columns():
    rows = [{"body": "w1", "id": 1}, {"body": "w2", "id": 2}]
    wanted = [[1, 11, 2], [1, 12, 2]]
    stored = Dataset.from_list(rows)
    for source in (rows, stored, stored.to_iterable_dataset(), iter(rows)):
        made = text_dataset(source, tokenizer(), column="body")
        assert [row["input_ids"] for row in made] == wanted
        assert set(made.column_names) == {"input_ids", "labels"}


def test_a_stream_is_cut_as_it_is_read():
    read = []

    def generate():
        for index in range(100_000):
            read.append(index)
            yield {"text": f"w{index % 90}"}

    made = iter(text_dataset(IterableDataset.from_generator(generate), tokenizer(), column="text"))
    assert [next(made)["input_ids"] for _ in range(3)] == [[1, 10, 2], [1, 11, 2], [1, 12, 2]]
    assert max(read) < 100


def test_long_documents_are_what_it_is_for():
    made = text_dataset([{"text": ("w1" + " " * 40) * 100_000}], tokenizer(), length=50_000, overlap=0)
    assert [len(ids) for ids in made["input_ids"]] == [50_000, 50_000, 2]


def test_broken_documents():
    rows = [document(1), {"text": ""}, {"text": None}, {"body": "x"}, 3, {"text": "\ud800"}]
    with pytest.raises(DataError) as caught:
        text_dataset(rows, tokenizer())
    lines = str(caught.value).splitlines()
    places = ["row 1, text", "row 2, text", "For these 2", "row 3, fields", "row 4, fields", "row 5, text"]
    assert [line.split(":")[0] for line in lines] == places
    with pytest.raises(DataError, match="row 1, text"):
        list(text_dataset(iter(rows), tokenizer(), stream=True))
    with pytest.raises(DataError, match=r"prompts with completions.*chat_dataset"):
        text_dataset([{"prompt": "a", "completion": "b"}], tokenizer())


def test_wrong_arguments():
    with pytest.raises(UsageError) as caught:
        text_dataset([document(1)], tokenizer(eos=None), length=1, overlap=-1)
    for word in ("length: expected at least 2", "overlap: expected 0 to", "tokenizer.eos_token"):
        assert word in str(caught.value)
    with pytest.raises(UsageError, match="less than length=8"):
        text_dataset([document(1)], tokenizer(), length=8, overlap=8)
