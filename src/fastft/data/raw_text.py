"""Documents to chunks of tokens: neighbours overlap, no chunk crosses from one document into the next."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fastft.data.check import Mistakes, text_problem
from fastft.data.files import told_by_file
from fastft.data.recognise import recognise
from fastft.data.sources import open_source
from fastft.errors import DataError, Problem, UsageError, short

IGNORE = -100
BATCH = 100  # documents tokenised together
Chunk = tuple[list[int], list[int]]


def text_dataset(
    source: Any,
    tokenizer: Any,
    *,
    length: int = 2048,
    overlap: int = 256,
    column: str | None = None,
    split: str | None = None,
    stream: bool = False,
) -> Any:
    """Cut documents into chunks of tokens; return a `datasets.Dataset` with `input_ids` and `labels` (int32).

    `source` is anything that `load_rows` takes: text files, folders of them, or rows with `text` (or `column`); each
    row is a document. A chunk has at most `length` tokens and starts with the last `overlap` tokens of the one before,
    as context: they are not learnt again (label -100), so that every token of a document is learnt once. A document's
    first chunk begins with the tokenizer's start token, if it has one; its last chunk ends with the EOS token, and no
    other does. `stream` reads and cuts as it goes, in constant memory, and returns an `IterableDataset`, as does a
    source that is one.

    Raises `UsageError` for lengths that cannot work, `DataError` naming the documents that are empty or no text.
    """
    _check_arguments(tokenizer, length, overlap)
    source = open_source(source, split, stream=stream).listed()
    rows = source.rows
    column = column or _text_column(rows)
    cut = partial(_cut, tokenizer=tokenizer, length=length, overlap=overlap, column=column)
    if hasattr(rows, "__len__") and not stream:
        with told_by_file(source.files):
            return _cut_all(rows, cut)
    from datasets import IterableDataset

    return IterableDataset.from_generator(
        _cut_stream, features=_features(), gen_kwargs={"rows": _Rows(rows), "cut": cut, "files": source.files}
    )


def spans(count: int, length: int, overlap: int) -> list[tuple[int, int]]:
    """Return (start, end) of the chunks of `count` tokens: at most `length` long, each with `overlap` of the last one.

    The last chunk is never a single token, which nothing would predict: it then takes one token more of the one before.
    """
    made, start = [], 0
    while True:
        end = min(start + length, count)
        made.append((start, end))
        if end == count:
            return made
        start = end - overlap
        start -= count - start == 1


def _check_arguments(tokenizer: Any, length: int, overlap: int) -> None:
    problems = []
    if length < 2:
        problems.append(Problem("length", length, "at least 2 tokens", "The first token is never predicted."))
    if not 0 <= overlap < max(length, 1):
        problems.append(Problem("overlap", overlap, f"0 to {length - 1}, less than length={length}"))
    if tokenizer.eos_token_id is None:
        problems.append(Problem("tokenizer.eos_token", None, "a token to end documents with", "Set it."))
    if problems:
        raise UsageError(*problems)


def _text_column(rows: Any) -> str:
    recognised = recognise(rows)
    if recognised.kind != "text":
        remedy = "fastft.chat_dataset takes turns and pairs; column='...' names the column with the documents."
        raise DataError(Problem("rows", recognised.statement, "documents: rows with 'text'", remedy))
    return recognised.fields["text"]


class _Rows:
    """Rows of a stream, held so that `from_generator` reads them once and hashes no content."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self.rows)


def _features() -> Any:
    from datasets import Features, List, Value

    return Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})


def _cut_all(rows: Any, cut: Any) -> Any:
    """Cut all documents, the mistakes of all of them told together."""
    import pyarrow
    from datasets import Dataset

    schema, mistakes = _features().arrow_schema, Mistakes()
    tables = [schema.empty_table()]
    for start in range(0, len(rows), BATCH):
        stop = min(start + BATCH, len(rows))
        batch = rows[start:stop] if isinstance(rows, list) else list(rows.select(range(start, stop)))
        made: list[Chunk] = []
        for problems, chunks in cut(batch, start):
            mistakes.add(problems)
            made.extend(chunks)
        if not mistakes.count:
            columns = {"input_ids": [ids for ids, _ in made], "labels": [labels for _, labels in made]}
            tables.append(pyarrow.table(columns, schema=schema))
    mistakes.refuse(len(rows))
    return Dataset(pyarrow.concat_tables(tables))


def _cut_stream(rows: Any, cut: Any, files: Sequence[Path]) -> Iterator[dict[str, list[int]]]:
    for index, row in enumerate(rows):
        for problems, chunks in cut([row], index):
            if problems:
                with told_by_file(files):
                    raise DataError(*problems)
            for ids, labels in chunks:
                yield {"input_ids": ids, "labels": labels}


def _cut(
    batch: Sequence[Any], first: int, tokenizer: Any, length: int, overlap: int, column: str
) -> Iterator[tuple[list[Problem], list[Chunk]]]:
    """Yield, for every row, what is wrong with it and its chunks."""
    problems = [_document_problem(f"row {first + offset}", row, column) for offset, row in enumerate(batch)]
    texts = [row[column] for row, problem in zip(batch, problems, strict=True) if problem is None]
    tokens = iter(_tokens(texts, tokenizer))
    for offset, problem in enumerate(problems):
        ids = next(tokens) if problem is None else []
        if problem is None and len(ids) < 2:
            where = f"row {first + offset}, {column}"
            problem = Problem(where, short(batch[offset][column]), "a text that gives tokens", "Remove the row.")
        if problem is not None:
            yield [problem], []
            continue
        chunks, seen = [], 0
        for start, end in spans(len(ids), length, overlap):
            chunks.append((ids[start:end], [IGNORE] * (seen - start) + ids[seen:end]))
            seen = end
        yield [], chunks


def _document_problem(where: str, row: Any, column: str) -> Problem | None:
    if not isinstance(row, Mapping) or column not in row:
        value = short(sorted(map(str, row))) if isinstance(row, Mapping) else short(row)
        return Problem(f"{where}, fields", value, repr(column))
    return text_problem(f"{where}, {column}", row[column], longest=None)


def _tokens(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Return the ids of whole documents: the tokenizer's start token once, the EOS token at the end, once."""
    bos, eos = getattr(tokenizer, "bos_token", None), tokenizer.eos_token_id
    made = []
    for doubled in (False, True):
        some = [text for text in texts if (bos is not None and text.startswith(bos)) == doubled]
        found = tokenizer(some, add_special_tokens=not doubled, verbose=False)["input_ids"] if some else []
        made.append(iter(found))
    starts = [bos is not None and text.startswith(bos) for text in texts]
    ids = [list(next(made[start])) for start in starts]
    return [part if part and part[-1] == eos else [*part, eos] for part in ids]
