"""Where rows come from: lists, data sets, files, folders, and names of the hub, to one kind of thing to go on with."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from attrs import frozen

from fastft.data.check import Mistakes
from fastft.data.files import PARQUET, SUFFIXES, TEXT_SUFFIXES, read_files, stream_files, told_of
from fastft.errors import DataError, Problem, UsageError, did_you_mean, near_files, short

# Words in the names of files and folders that say which split they are.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
ABOUT = ("readme", "license", "licence", "notice", "citation", "changelog", "contributing")
PATH = 4096  # longest path, in characters
FILES = "fastft_files"  # attribute of a stream that `load_rows` returned: the files it reads
# What to do about a file that is no rows as it stands.
ADVICE = {
    (".xlsx", ".xls", ".ods"): "Save the sheet as CSV in UTF-8, or pass Dataset.from_pandas(pandas.read_excel(path)).",
    (".gz", ".zip", ".zst", ".xz", ".bz2", ".tar"): "Unpack it.",
    (".ndjson", ".ldjson"): "Rename it to .jsonl, which it is.",
    (".arrow", ".feather"): "datasets.Dataset.from_file(path) reads Arrow; a folder of save_to_disk is read whole.",
    (".pdf", ".docx", ".doc", ".html", ".htm", ".epub"): "Save its text as .txt or .md.",
    (".yaml", ".yml", ".xml", ".pkl", ".pickle"): "Read it yourself, and pass a list of dicts or save JSON Lines.",
}
ROWS = "a list of rows, each a dict, a datasets.Dataset or IterableDataset, a file, a folder, or a name of the hub"


def load_rows(
    source: Any,
    split: str | None = None,
    *,
    columns: Sequence[str] | None = None,
    config: str | None = None,
    stream: bool = False,
) -> Any:
    """Return the rows of a source, as they are in it: a list, a `datasets.Dataset`, or an `IterableDataset`.

    `source` is one of

    * a list or another iterable of dicts, a `datasets.Dataset` or `IterableDataset`, or a dict of them by split;
    * a file: .jsonl, .json, .csv, .tsv, .parquet, or .txt and .md (a file is one row with `text`); or a list of paths,
      or a pattern such as "data/*.jsonl". Cells of CSV stay texts;
    * a folder: one saved by `save_to_disk`, or the files in it, by splits where their names say train, validation or
      test;
    * a name of the hub, "owner/name", taken from the cache of `datasets` if it is there.

    `split`: default "train", or the only one. `columns`: keep only these. `config`: of a data set on the hub with
    several. `stream`: read files and data sets of the hub a row at a time (an `IterableDataset`).

    Raises `UsageError` for arguments that do not fit the source; `DataError` naming what was tried where nothing is
    found, the splits where none is meant, or file, line and byte of what cannot be read.
    """
    opened = open_source(source, split, config=config, stream=stream).listed()
    rows = opened.rows if columns is None else _select(opened.rows, list(columns))
    return _with_files(rows, opened.files)


@frozen
class Source:
    """Rows, and the files that they are from, in their order; no files where they are from elsewhere."""

    rows: Any
    files: tuple[Path, ...] = ()

    def listed(self) -> "Source":
        """Return the source with the rows of an iterator, which can be read once, as a list."""
        return Source(list(self.rows), self.files) if hasattr(self.rows, "__next__") else self


def open_source(source: Any, split: str | None = None, *, config: str | None = None, stream: bool = False) -> Source:
    """Return the rows that `load_rows` returns and the files they are from; an iterator is left as it is.

    A `Source` comes back as it is.
    """
    if isinstance(source, Source):
        return source
    if isinstance(source, str | Path):
        return _from_text(str(source), split, config, stream)
    if isinstance(source, Mapping):
        return Source(_choose_split({str(name): part for name, part in _parts(source).items()}, split, "rows"))
    if hasattr(source, "column_names") or hasattr(source, "__next__"):
        return Source(_without_split(source, split), getattr(source, FILES, ()))
    if type(source).__module__.partition(".")[0] in ("pandas", "polars"):
        remedy = "datasets.Dataset.from_pandas(frame) or .from_polars(frame) makes one."
        raise DataError(Problem("rows", type(source).__name__, ROWS, remedy))
    if isinstance(source, bytes) or not isinstance(source, Iterable):
        raise DataError(Problem("rows", short(source), ROWS))
    rows = source if isinstance(source, list) else list(source)
    if rows and all(isinstance(path, str | Path) for path in rows):
        _refuse_texts(rows)
        return _from_paths(rows, split, stream)
    return Source(_without_split(rows, split))


def open_named(source: Any, name: str) -> Source:
    """Return what `open_source` returns; errors tell the data's `name`."""
    with told_of(name):
        return open_source(source)


def _with_files(rows: Any, files: tuple[Path, ...]) -> Any:
    """Return a stream with the files it is from, so that later errors can name them; other rows as they are.

    What `datasets` makes of the stream is another object without them: its rows may stand in another order. Nor has a
    stream of several shards them, which the workers of a loader number each from 0.
    """
    if files and hasattr(rows, "column_names") and not hasattr(rows, "__len__") and rows.num_shards == 1:
        setattr(rows, FILES, files)
    return rows


def _parts(source: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Return a dict of data sets. Raises `DataError` for one row."""
    if source and all(hasattr(part, "column_names") or isinstance(part, list) for part in source.values()):
        named = [name for name in source if any(name in (split, *words) for split, words in SPLITS.items())]
        if named or all(hasattr(part, "column_names") or are_rows(part) for part in source.values()):
            return source
    columns = source and all(isinstance(part, list) and not _has_turns(part) for part in source.values())
    remedy = "datasets.Dataset.from_dict(columns) makes rows of columns." if columns else "Put the row into a list."
    raise DataError(Problem("rows", type(source).__name__, ROWS, remedy))


def are_rows(part: Any) -> bool:
    """Say whether it is a list of rows; the turns of a conversation are one row's."""
    listed = isinstance(part, list | tuple) and bool(part) and all(isinstance(row, Mapping) for row in part)
    return listed and not _has_turns(part)


def _has_turns(part: Sequence[Any]) -> bool:
    return any(isinstance(turn, Mapping) and ("role" in turn or "from" in turn) for turn in part)


def _refuse_texts(texts: Sequence[str | Path]) -> None:
    """Raise `DataError` for texts where paths are meant."""
    if any("\n" in str(text) or len(str(text)) > PATH for text in texts) or all(
        " " in str(text) and Path(str(text)).suffix.lower() not in SUFFIXES for text in texts
    ):
        remedy = "Texts are rows: [{'text': text} for text in texts]."
        raise DataError(Problem("rows", short(str(texts[0])), "paths of files, or rows", remedy))


def _choose_split(parts: Mapping[str, Any], split: str | None, where: str) -> Any:
    """Return one of several splits. Raises `DataError` naming them."""
    wanted = split or ("train" if "train" in parts or len(parts) != 1 else next(iter(parts)))
    if wanted in parts:
        return parts[wanted]
    remedy = f"Choose one: {', '.join(f'split={name!r}' for name in parts)}."
    raise DataError(
        Problem(f"{where}, split", split, f"one of {list(parts)}", did_you_mean(split or "", parts) or remedy)
    )


def _without_split(rows: Any, split: str | None) -> Any:
    own = getattr(rows, "split", None)
    if split is not None and str(own) != split:
        remedy = "Leave the split out, or give a data set that has several."
        raise UsageError(Problem("split", split, f"none: the rows are {own or 'of no split'}", remedy))
    return rows


def _select(rows: Any, columns: list[str]) -> Any:
    """Return the rows with these columns alone."""
    if not hasattr(rows, "column_names"):
        there = dict.fromkeys(name for row in rows if isinstance(row, Mapping) for name in row)
        _need_columns(columns, list(there))
        return [
            {name: row[name] for name in columns if name in row} if isinstance(row, Mapping) else row for row in rows
        ]
    if rows.column_names is not None:
        _need_columns(columns, rows.column_names)
    return rows.select_columns(columns)


def _need_columns(columns: Sequence[str], there: Sequence[str]) -> None:
    missing = [name for name in columns if name not in there]
    if missing:
        hint = did_you_mean(missing[0], there)
        raise UsageError(Problem("columns", missing, f"some of {short(sorted(there), 200)}", hint))


# ---- files and folders


def _from_text(text: str, split: str | None, config: str | None, stream: bool) -> Source:
    """Return the rows that a path, a pattern or a name stands for."""
    if "\n" in text or len(text) > PATH:
        raise DataError(Problem("rows", short(text), ROWS, "A text is a row: [{'text': text}]."))
    path = Path(text).expanduser()
    if path.is_dir() and not config:
        return _from_folder(path, split, stream)
    if path.is_file():
        return _from_paths([path], split, stream)
    if has_magic(text):
        found = sorted(Path(name) for name in glob(str(path), recursive=True) if Path(name).is_file())
        if not found:
            raise DataError(Problem("rows", text, "a pattern that some file fits", f"Looked in {Path().absolute()}."))
        return _from_paths(found, split, stream)
    local = path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1 or "\\" in text
    if local or path.suffix.lower() in SUFFIXES:
        there = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = near_files(path.name, there)
        remedy = f"did you mean {near[0]!r}?" if near else f"Looked for {path.absolute()}."
        raise DataError(Problem("rows", text, "a file or folder that exists", remedy))
    from fastft.data.hub import load_from_hub

    return Source(_choose_split(load_from_hub(text, config, stream), split, text))


def _from_paths(paths: Sequence[str | Path], split: str | None, stream: bool) -> Source:
    """Return the rows of files, which must all be of known suffixes, tables or Parquet or texts."""
    _without_split(None, split)
    files = [Path(path).expanduser() for path in paths]
    mistakes = Mistakes()
    for path in files:
        if not path.is_file():
            mistakes.add([Problem(str(path), "no such file", "a file", f"Looked for {path.absolute()}.")])
        elif path.suffix.lower() not in SUFFIXES:
            mistakes.add([Problem(str(path), path.suffix, f"one of {SUFFIXES}", _advice(path))])
    mistakes.refuse()
    kinds = {"parquet": [], "text": [], "table": []}
    for path in files:
        suffix = path.suffix.lower()
        kinds["parquet" if suffix == PARQUET else "text" if suffix in TEXT_SUFFIXES else "table"].append(path)
    if sum(map(bool, kinds.values())) > 1:
        some = [part[0].name for part in kinds.values() if part]
        remedy = f"Name the ones that are meant, as '*{Path(some[0]).suffix}', say."
        raise DataError(Problem("files", some, "tables, or texts, or Parquet, not several of them", remedy))
    if kinds["parquet"]:
        return Source(_parquet(files, stream), tuple(files))
    return Source(_stream(files) if stream else read_files(files), tuple(files))


def _advice(path: Path) -> str:
    """Return what to do about a file of a suffix that is not read."""
    plain = "Rename the file, or read it yourself and pass a list of dicts."
    return next((advice for suffixes, advice in ADVICE.items() if path.suffix.lower() in suffixes), plain)


def _stream(files: Sequence[Path]) -> Any:
    from datasets import IterableDataset

    return IterableDataset.from_generator(partial(stream_files, list(files)))


def _parquet(files: Sequence[Path], stream: bool) -> Any:
    from datasets import Dataset, IterableDataset
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    mistakes, schemas = Mistakes(), {}
    for path in files:
        try:
            schemas[path] = ParquetFile(path).schema_arrow
        except (ArrowInvalid, OSError) as error:
            mistakes.add([Problem(str(path), short(str(error)), "a Parquet file", "It is damaged; fetch it again.")])
            continue
        first = next(iter(schemas))
        if schemas[path].names != schemas[first].names:
            expected = f"the columns of {first.name}, {schemas[first].names}"
            mistakes.add([Problem(str(path), schemas[path].names, expected, "Load them one by one.")])
    mistakes.refuse()
    names = [str(path) for path in files]
    if stream:
        return IterableDataset.from_parquet(names)
    return Dataset.from_parquet(names)


def _from_folder(folder: Path, split: str | None, stream: bool) -> Source:
    """Return the rows of a folder: a saved data set, one that its card describes, or its files."""
    from datasets import load_dataset, load_from_disk

    if (folder / "dataset_dict.json").is_file():
        return Source(_choose_split(load_from_disk(str(folder)), split, str(folder)))
    if (folder / "state.json").is_file():
        return Source(_without_split(load_from_disk(str(folder)), split))
    card = folder / "README.md"
    if card.is_file() and _describes_files(card.read_text("utf-8", "replace")):
        return Source(_choose_split(load_dataset(str(folder), streaming=stream), split, str(folder)))
    parts = _split_files(folder, _files_in(folder))
    if len(parts) == 1 and "" in parts:
        return _from_paths(parts[""], split, stream)
    return _from_paths(_choose_split(parts, split, str(folder)), None, stream)


def _describes_files(card: str) -> bool:
    """Return whether a data set's card says in its head which files it is made of."""
    head = card.split("\n---", 1)[0] if card.startswith("---") else ""
    return any(line.startswith("configs:") for line in head.splitlines())


def _files_in(folder: Path) -> list[Path]:
    """Return the files with rows in a folder, hidden ones left out. Raises `DataError` for what cannot be rows."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if any(path.suffix.lower() in SUFFIXES and path.suffix.lower() not in TEXT_SUFFIXES for path in files):
        files = [path for path in files if path.stem.lower() not in ABOUT]
    others = [path.relative_to(folder).as_posix() for path in files if path.suffix.lower() not in SUFFIXES]
    if others:
        remedy = f"Take them away, or name the files that are meant, as {str(folder / '*.jsonl')!r}, say."
        remedy = f"{remedy} {others[0]}: {_advice(Path(others[0]))}"
        raise DataError(Problem(f"{folder}, files", short(others, 200), f"files of {SUFFIXES}", remedy))
    if not files:
        raise DataError(Problem(str(folder), "no files", f"files of {SUFFIXES}", "Check the path."))
    return files


def _split_files(folder: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """Return the files by the split that their names say, under "" where none of them says one."""
    parts: dict[str, list[Path]] = {}
    for path in files:
        names = path.relative_to(folder).with_suffix("").as_posix().lower()
        words = "".join(letter if letter.isalpha() else " " for letter in names).split()
        said = [split for split, known in SPLITS.items() if any(word in known for word in words)]
        texts = path.suffix.lower() in TEXT_SUFFIXES  # documents may be called anything
        parts.setdefault("" if texts or not said else said[0], []).append(path)
    if len(parts) > 1 and "" in parts:
        loose = [path.relative_to(folder).as_posix() for path in parts.pop("")]
        remedy = f"Rename them, or name the files that are meant, as {str(folder / '*.jsonl')!r}, say."
        expected = f"a split in every name, as there are {list(parts)}"
        raise DataError(Problem(f"{folder}, files", short(loose, 200), expected, remedy))
    return parts
