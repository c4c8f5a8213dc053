"""Rows through an encoder: in this process, over several with a cache on disk, or one batch after another of a stream.

Whatever the rows are, no more than a batch of them is held besides what the caller holds already.
"""

import hashlib
import itertools
import json
import os
import pickle
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from fastft.data.check import refuse_empty
from fastft.data.template import own_templates
from fastft.data.tokenise import Encoder
from fastft.environment import version_of

BATCH = 1000
LARGE = 5000  # from so many rows on, other processes and the cache are worth their start
SPOOLED = "fastft_row"


@frozen
class Job:
    """One batch of a `datasets.Dataset` through an encoder; picklable."""

    encoder: Encoder
    columns: tuple[str, ...]

    def __call__(self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> Any:
        """Return the `pyarrow.Table` of the batch's rows."""
        return self.encoder.table(rows_of(batch, self.columns), indices)


def rows_of(batch: Mapping[str, Sequence[Any]], columns: Sequence[str]) -> list[Any]:
    """Return the rows of a batch of columns."""
    if tuple(columns) == (SPOOLED,):
        return [unspooled(row) for row in batch[SPOOLED]]
    return [dict(zip(columns, values, strict=True)) for values in zip(*(batch[name] for name in columns), strict=True)]


def encoded(rows: Any, encoder: Encoder, num_proc: int | None = None, progress: bool = True) -> Any:
    """Return a `datasets.Dataset` with the columns of `tokenise.to_table`, one row for each of `rows`.

    `rows` are a sequence, an iterator that is read once, or a `datasets.Dataset`. From `LARGE` rows on the work goes
    over `num_proc` processes (default: as many as this one may use) and the result is kept among the files of
    `datasets`, under a hash of the rows, the templates, the tokenizer and the settings: the same again is not computed
    again.
    """
    from datasets import Dataset

    if isinstance(rows, Dataset):
        if len(rows) >= LARGE:
            return _mapped(rows, rows_hash(rows), encoder, num_proc, progress)
        columns = rows.column_names
        batches = (rows_of(batch, columns) for batch in rows.iter(BATCH))
        return _here(batches, encoder)
    head = list(itertools.islice(iter(rows), LARGE))
    refuse_empty(head)
    if len(head) < LARGE:
        return _here((head[start : start + BATCH] for start in range(0, len(head), BATCH)), encoder)
    rest = rows[LARGE:] if isinstance(rows, list | tuple) else rows
    if not hasattr(rows, "__next__") and not isinstance(rows, list | tuple):
        rest = itertools.islice(iter(rows), LARGE, None)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        spooled, digest = _spool(itertools.chain(head, rest), Path(folder) / "rows.arrow")
        return _mapped(spooled, digest, encoder, num_proc, progress)


def _here(batches: Iterable[Sequence[Any]], encoder: Encoder) -> Any:
    """Encode a few rows in this process."""
    import pyarrow
    from datasets import Dataset

    tables, done = [], 0
    for batch in batches:
        tables.append(encoder.table(batch, range(done, done + len(batch))))
        done += len(batch)
    return Dataset(pyarrow.concat_tables(tables).combine_chunks())


def _mapped(rows: Any, digest: str, encoder: Encoder, num_proc: int | None, progress: bool) -> Any:
    """Encode a `datasets.Dataset` over processes, or return what has been computed before."""
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    fingerprint = _fingerprint(digest, encoder)
    columns = tuple(rows.column_names)
    processes = num_proc or _cores()
    shown = is_progress_bar_enabled()
    try:
        if not progress and shown:
            disable_progress_bar()
        return rows.map(
            Job(encoder, columns),
            with_indices=True,
            batched=True,
            batch_size=BATCH,
            remove_columns=list(columns),
            features=features(),
            num_proc=processes if processes > 1 else None,
            cache_file_name=str(cache_folder() / f"{fingerprint}.arrow"),
            load_from_cache_file=True,
            new_fingerprint=fingerprint,
            desc="Tokenising",
        )
    finally:
        if not progress and shown:
            enable_progress_bar()


def _cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def features() -> Any:
    """Return the features of an encoded set."""
    from datasets import Features, Value
    from datasets import List as ListOf

    ids = ListOf(Value("int32"))
    told = {"problems": Value("binary"), "turns": Value("bool"), "notes": Value("string")}
    return Features({"input_ids": ids, "labels": ids, **told})


def cache_folder() -> Path:
    """Return where encoded sets are kept: a folder among those of `datasets` (its HF_DATASETS_CACHE)."""
    import datasets

    folder = Path(datasets.config.HF_DATASETS_CACHE) / "fastft"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def spooled_bytes(row: Any) -> bytes:
    """Return a row as bytes that depend on its content alone; what JSON cannot hold is pickled."""
    try:
        return b"j" + json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    except (TypeError, ValueError):
        return b"p" + pickle.dumps(row)


def unspooled(data: bytes) -> Any:
    """Return the row that `spooled_bytes` has written."""
    return json.loads(data[1:].decode("utf-8", "surrogatepass")) if data[:1] == b"j" else pickle.loads(data[1:])


def _spool(rows: Iterable[Any], path: Path) -> tuple[Any, str]:
    """Write rows to an Arrow file; return it as a `datasets.Dataset`, and the hash of the rows."""
    import pyarrow
    from datasets import Dataset
    from datasets.arrow_writer import ArrowWriter

    digest, schema = hashlib.sha256(), pyarrow.schema({SPOOLED: pyarrow.large_binary()})
    with ArrowWriter(path=str(path), schema=schema) as writer:
        for batch in _batches(rows, BATCH):
            written = [spooled_bytes(row) for row in batch]
            for data in written:
                digest.update(len(data).to_bytes(8, "little"))
                digest.update(data)
            writer.write_table(pyarrow.table({SPOOLED: pyarrow.array(written, pyarrow.large_binary())}))
        writer.finalize()
    return Dataset.from_file(str(path)), digest.hexdigest()


def _batches(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    rows = iter(rows)
    while batch := list(itertools.islice(rows, size)):
        yield batch


def rows_hash(rows: Any) -> str:
    """Return a hash of a `datasets.Dataset`'s content."""
    digest = hashlib.sha256(repr(rows.features).encode())
    for table in rows.with_format("arrow").iter(10 * BATCH):
        for batch in table.combine_chunks().to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()


def _fingerprint(rows: str, encoder: Encoder) -> str:
    """Return a hash of all that an encoded set depends on."""
    templates, given = own_templates(encoder.tokenizer), encoder.given
    what = given.recognised
    parts = {
        "rows": [rows, what.kind, sorted(what.fields.items()), what.keys, repr(given.features), given.alternate],
        "templates": [*templates, encoder.templates.plain, encoder.templates.tools],
        "tokenizer": tokenizer_hash(encoder.tokenizer),
        "settings": [encoder.train_on, encoder.max_length, encoder.truncate],
        "columns": sorted(features()),
        "versions": [version_of(name) for name in ("fastft", "transformers", "tokenizers", "jinja2")],
        "date": _today() if any("strftime_now" in template for template in templates) else None,
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _today() -> str:
    from datetime import date

    return date.today().isoformat()


def tokenizer_hash(tokenizer: Any) -> str:
    """Return a hash of what a tokenizer does: its vocabulary, rules and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    kept = (rules, special, type(tokenizer).__name__, str(getattr(tokenizer, "split_special_tokens", False)))
    return hashlib.sha256("\0".join(kept).encode("utf-8", "surrogatepass")).hexdigest()
