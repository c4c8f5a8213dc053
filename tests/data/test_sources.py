"""Where rows come from: each source gives exactly its rows; what is missing is one error that says where we looked."""

import json
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from fastft.data.recognise import recognise
from fastft.data.sources import load_rows
from fastft.errors import DataError, UsageError

ROWS = [{"text": "one"}, {"text": "zwei\nü"}, {"text": "three"}]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder, with the cache of `datasets` beside it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    made = tmp_path / "data"
    made.mkdir()
    return made


def write(path, rows=ROWS):
    """Write rows in the format of the path's suffix."""
    path.parent.mkdir(exist_ok=True, parents=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), "utf-8")
    elif path.suffix in (".csv", ".tsv"):
        separator = "\t" if path.suffix == ".tsv" else ","
        lines = [separator.join(rows[0])] + [separator.join(f'"{value}"' for value in row.values()) for row in rows]
        path.write_text("\n".join(lines), "utf-8")
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
@pytest.mark.parametrize("stream", [False, True])
def test_files(folder, suffix, stream):
    path = write(folder / f"rows{suffix}")
    for source in (path, str(path), [path], str(folder / "*"), str(folder)):
        rows = load_rows(source, stream=stream)
        assert isinstance(rows, IterableDataset) == stream
        assert list(rows) == ROWS
        assert list(rows) == ROWS  # a stream can be read again


@pytest.mark.parametrize("stream", [False, True])
def test_texts(folder, stream):
    (folder / "sub").mkdir()
    (folder / "b.md").write_bytes(b"\xef\xbb\xbf# Title\r\n")
    (folder / "sub" / "train.txt").write_text("ü", "utf-8")  # a document may be called anything
    (folder / ".hidden").write_text("no")
    assert list(load_rows(folder, stream=stream)) == [{"text": "# Title\r\n"}, {"text": "ü"}]


def test_cells_stay_texts_and_json_stays_what_it_is(folder):
    (folder / "a.csv").write_text('\ufeffquestion,answer\n007,NA\n"a ""b"", c",\n"x\ny",null\n', "utf-8")
    assert load_rows(folder / "a.csv") == [
        {"question": "007", "answer": "NA"},
        {"question": 'a "b", c', "answer": ""},
        {"question": "x\ny", "answer": "null"},
    ]
    long = "x" * 300_000  # more than the csv module takes unasked
    (folder / "b.csv").write_text(f"text\n{long}\n")
    assert load_rows(folder / "b.csv") == [{"text": long}]
    lines = '\ufeff{"a": {"b": null}, "n": 1.0}\r\n\n  {"a": [1, "x", {"c": true}]}'
    for name in ("a.jsonl", "lines.json"):  # JSON Lines are often called .json
        (folder / name).write_text(lines, "utf-8")
        assert load_rows(folder / name) == [{"a": {"b": None}, "n": 1.0}, {"a": [1, "x", {"c": True}]}]


def test_several_files_follow_one_another(folder):
    write(folder / "a.jsonl", ROWS[:1]), write(folder / "b.json", ROWS[1:2]), write(folder / "c.csv", ROWS[2:])
    assert load_rows(folder) == ROWS
    assert load_rows([folder / "c.csv", folder / "a.jsonl"]) == [ROWS[2], ROWS[0]]
    (folder / "parts").mkdir()
    write(folder / "parts" / "0.parquet", ROWS[:1]), write(folder / "parts" / "1.parquet", ROWS[1:])
    assert list(load_rows(folder / "parts")) == ROWS


def test_rows_pass_through():
    stored, stream = Dataset.from_list(ROWS), Dataset.from_list(ROWS).to_iterable_dataset()
    for rows in (ROWS, stored, stream):
        assert load_rows(rows) is rows
    assert load_rows(iter(ROWS)) == ROWS and load_rows(tuple(ROWS)) == ROWS
    assert load_rows(row for row in ROWS) == ROWS
    assert recognise(load_rows(iter(ROWS))).statement == "plain text (column 'text'), 3 rows"


def test_columns():
    rows = [{"a": 1, "text": "x"}, {"text": "y"}]
    assert load_rows(rows, columns=["text"]) == [{"text": "x"}, {"text": "y"}]
    assert load_rows(Dataset.from_list(rows), columns=["text"]).column_names == ["text"]
    for source in (rows, Dataset.from_list(rows)):
        with pytest.raises(UsageError, match=r"columns: expected some of \['a', 'text'\], got \['tex'\].*'text'"):
            load_rows(source, columns=["tex", "a"])


def splits(names):
    return DatasetDict({name: Dataset.from_list([{"text": name}]) for name in names})


@pytest.mark.parametrize("kind", ["dict", "saved", "files", "folders", "card"])
def test_splits(folder, kind):
    def source(*names):
        at = folder / "-".join(names)
        for name in names:
            if kind == "files":
                write(at / f"{name}-00000-of-00001.jsonl", [{"text": name}])
            elif kind == "folders":
                write(at / name / "0.csv", [{"text": name}])
            elif kind == "card":
                write(at / f"x{len(name)}.jsonl", [{"text": name}])
        if kind == "card":
            data = "".join(f"\n  - split: {name}\n    path: x{len(name)}.jsonl" for name in names)
            (at / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:{data}\n---\n# Card")
        elif kind in ("files", "folders"):
            (at / "README.md").write_text("About.")
        if kind == "saved":
            splits(names).save_to_disk(at)
        return splits(names) if kind == "dict" else at

    assert list(load_rows(source("train", "test"))) == [{"text": "train"}]
    assert list(load_rows(source("train", "test"), "test")) == [{"text": "test"}]
    assert list(load_rows(source("validation"))) == [{"text": "validation"}]
    with pytest.raises(DataError) as caught:
        load_rows(source("test", "validation"))
    assert "split='test'" in str(caught.value) and "split='validation'" in str(caught.value)
    with pytest.raises(DataError, match="did you mean 'train'"):
        load_rows(source("train", "test"), "trian")


def test_a_split_of_what_has_none(folder):
    write(folder / "rows.jsonl")
    for source in (ROWS, folder / "rows.jsonl", folder, Dataset.from_list(ROWS)):
        with pytest.raises(UsageError, match="split: expected none"):
            load_rows(source, "train")
    assert list(load_rows(Dataset.from_list(ROWS, split="train"), "train")) == ROWS


def test_a_saved_data_set(folder):
    Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    assert list(load_rows(folder / "saved")) == ROWS


@pytest.mark.parametrize(
    "names, words",
    [
        ([], ["no files"]),
        (["a.jsonl", "b.png"], ["['b.png']", "*.jsonl"]),
        (["b.xlsx"], ["['b.xlsx']", "b.xlsx: Save the sheet as CSV in UTF-8"]),
        (["a.jsonl", "b.txt"], ["a.jsonl", "b.txt", "not several of them"]),
        (["a.jsonl", "b.parquet"], ["a.jsonl", "b.parquet"]),
        (["train.jsonl", "other.jsonl"], ["['other.jsonl']", "a split in every name"]),
    ],
)
def test_folders_that_are_not_clear(folder, names, words):
    for name in names:
        if write(folder / name).suffix in (".png", ".txt", ".xlsx"):
            (folder / name).write_text("x")
    with pytest.raises(DataError) as caught:
        load_rows(folder)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "source, words",
    [
        (None, ["got None", "a list of rows"]),
        ({"text": "one"}, ["Put the row into a list"]),
        ({"text": ["one", "two"]}, ["Dataset.from_dict(columns)"]),
        (b"rows", ["a list of rows"]),
        ("a text\nof two lines", ["[{'text': text}]"]),
        ("x" * 5000, ["[{'text': text}]", "(5,000 characters)"]),
        (["a text", "another one"], ["[{'text': text} for text in texts]"]),
        ("./rows.jsnl", ["did you mean 'rows.jsonl'?"]),
        ("./rosw.json", ["did you mean 'rows.jsonl'?"]),
        ("./missing.jsonl", ["got './missing.jsonl'. Looked for "]),  # syntax.jsonl has its ending alone
        ("rows.jsnl", ["did you mean 'rows.jsonl'", "the hub is switched off"]),
        ("none/*.jsonl", ["a pattern that some file fits"]),
        (["rows.jsonl", "gone.csv", "rows.xls"], ["gone.csv: expected a file", "rows.xls: expected one of", "as CSV"]),
        ("rows.xls", ["rows.xls: expected one of", "Dataset.from_pandas(pandas.read_excel(path))"]),
        ("./gone", ["a file or folder that exists"]),
        ("not a name", ["a file, a folder, or a name of the hub"]),
    ],
)
def test_what_cannot_be_found(folder, monkeypatch, source, words):
    monkeypatch.chdir(folder)
    write(Path("rows.jsonl"))
    Path("rows.xls").write_text("x")
    write(Path("syntax.jsonl"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError) as caught:
        load_rows(source)
    for word in words:
        assert word in str(caught.value)


def test_a_table_of_another_library():
    pandas = pytest.importorskip("pandas")
    with pytest.raises(DataError, match="from_pandas"):
        load_rows(pandas.DataFrame(ROWS))


# ---- names of the hub


def cache(folder, name, config="default", parts=("train",)):
    """Put a data set into the cache of `datasets`, as loading it from the hub leaves it."""
    root = Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___") / config / "0.0.0" / ("0" * 40)
    last = name.split("/")[-1]
    files = {part: str(write(folder / f"{part}-of-{config}.jsonl", [{"text": f"{config} {part}"}])) for part in parts}
    builder = datasets.load_dataset_builder("json", data_files=files, cache_dir=str(folder / "built"))
    builder.download_and_prepare(str(root))
    for path in root.glob("json-*"):
        path.rename(path.with_name(path.name.replace("json-", f"{last}-")))
    info = json.loads((root / "dataset_info.json").read_text())
    (root / "dataset_info.json").write_text(json.dumps({**info, "config_name": config, "dataset_name": last}))


@pytest.mark.parametrize("stream", [False, True])
def test_a_name_that_is_in_the_cache_needs_no_network(folder, stream):
    cache(folder, "someone/thing", parts=("train", "test"))
    assert list(load_rows("someone/thing", stream=stream)) == [{"text": "default train"}]
    assert list(load_rows("someone/thing", "test", stream=stream)) == [{"text": "default test"}]
    with pytest.raises(DataError, match=r"someone/thing, split.*'train', 'test'"):
        load_rows("someone/thing", "dev")


def test_one_of_several_configs(folder):
    cache(folder, "someone/thing", "en"), cache(folder, "someone/thing", "de")
    assert list(load_rows("someone/thing", config="de")) == [{"text": "de train"}]
    with pytest.raises(DataError, match=r"config='de', config='en'"):
        load_rows("someone/thing")


def test_a_name_that_is_nowhere(folder, monkeypatch):
    for off, words in [("0", "the hub could not be reached|not on the hub"), ("1", "switched off")]:
        monkeypatch.setenv("HF_HUB_OFFLINE", off)
        with pytest.raises(DataError, match=words) as caught:
            load_rows("fastft-tests-nobody/nothing")
        assert "no file or folder" in str(caught.value) and str(datasets.config.HF_DATASETS_CACHE) in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1


def test_lists_of_rows_by_split_whatever_their_names():
    parts = {"easy": [{"text": "a"}], "hard": [{"text": "b"}, {"text": "c"}]}
    assert load_rows(parts, split="hard") == parts["hard"]
    with pytest.raises(DataError, match=r"one of \['easy', 'hard'\], got None. Choose one: split='easy', split='hard'"):
        load_rows(parts)
    for row in ({"messages": [{"role": "user", "content": "a"}]}, {"conversations": [{"from": "human", "value": "a"}]}):
        with pytest.raises(DataError, match="Put the row into a list"):
            load_rows(row)
