"""Rows out of files: JSON Lines, JSON, CSV, TSV and plain text, with the line or byte of every mistake.

Cells of a table stay the texts they are: nothing becomes a number, a date or NaN.
"""

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastft.data.check import Mistakes, short
from fastft.errors import DataError, Problem

TEXT_SUFFIXES = (".txt", ".md")
TABLE_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv")
PARQUET = ".parquet"
SUFFIXES = (*TABLE_SUFFIXES, PARQUET, *TEXT_SUFFIXES)
_BOM = b"\xef\xbb\xbf"
_ENCODING = "Save the file as UTF-8, or put the damaged bytes right."
_CELL = 2**31 - 1  # longest cell of a CSV file, in characters: as good as none
Row = dict[str, Any]
Told = Callable[[Problem], None]


def read_files(paths: Sequence[Path]) -> list[Row]:
    """Return the rows of files in their order. Raises `DataError` with the mistakes of all of them together."""
    mistakes, rows = Mistakes(), []
    for path in paths:
        rows.extend(_rows_of(path, lambda problem: mistakes.add([problem])))
    mistakes.refuse()
    return rows


def stream_files(paths: Sequence[Path]) -> Iterator[Row]:
    """Yield the rows of files in their order, a line at a time. Raises `DataError` at the first mistake."""
    for path in paths:
        yield from _rows_of(path, _raise)


def _raise(problem: Problem) -> None:
    raise DataError(problem)


def _rows_of(path: Path, tell: Told) -> Iterator[Row]:
    if path.suffix.lower() in TEXT_SUFFIXES:
        yield from _text(path, tell)
    elif path.suffix.lower() == ".jsonl":
        yield from _json_lines(path, tell)
    elif path.suffix.lower() == ".json":
        yield from _json(path, tell)
    else:
        yield from _csv(path, tell)


def _lines(path: Path, tell: Told) -> Iterator[tuple[int, str]]:
    """Yield (number, text) of every line; one that is no UTF-8 is told with the place of its first bad byte."""
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = line
            if number == 1 and line.startswith(_BOM):
                text = line[len(_BOM) :]
            try:
                yield number, text.decode("utf-8")
            except UnicodeDecodeError as error:
                tell(_not_utf8(path, number, start + len(line) - len(text) + error.start, text, error))
            start += len(line)


def _not_utf8(path: Path, line: int, offset: int, data: bytes, error: UnicodeDecodeError) -> Problem:
    around = data[max(0, error.start - 20) : error.start + 20]
    return Problem(f"{path}, line {line}, byte {offset} of the file", around, "UTF-8", _ENCODING)


def _whole(path: Path, tell: Told) -> str | None:
    """Return the text of a file, or None after telling where it is no UTF-8."""
    data = path.read_bytes()
    start = len(_BOM) if data.startswith(_BOM) else 0
    try:
        return data[start:].decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, start + error.start) + 1
        tell(_not_utf8(path, line, start + error.start, data[start:], error))
        return None


def _text(path: Path, tell: Told) -> Iterator[Row]:
    text = _whole(path, tell)
    if text is not None and not text.strip():
        tell(Problem(str(path), text[:20], "a text that is not empty", "Remove the file or give it text."))
    elif text is not None:
        yield {"text": text}


def _object(pairs: Sequence[tuple[str, Any]]) -> Row:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedKeyError(next(name for name in names if names.count(name) > 1))
    return made


class _RepeatedKeyError(ValueError):
    """A JSON object with two values for one name; the reader would keep the last one alone."""


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _parse(text: str, where: str, tell: Told, line: int = 0) -> Any:
    """Return the JSON value of a text, or None after telling what is wrong with it; `line` is added to its lines."""
    try:
        return _DECODER.decode(text)
    except _RepeatedKeyError as error:
        tell(Problem(where, short(text), f"one value for each name, {str(error)!r} has two", "Remove one of them."))
    except json.JSONDecodeError as error:
        place = f"{where}, column {error.colno}" if line else f"{where}, line {error.lineno}, column {error.colno}"
        around = text[max(0, error.pos - 40) : error.pos + 40]
        tell(Problem(place, around, "JSON", f"{error.msg}."))
    except ValueError as error:  # a number of more digits than Python reads
        tell(Problem(where, short(text), "JSON that Python can read", f"{error}."))
    except RecursionError:
        tell(Problem(where, short(text), "JSON that is nested less deeply"))
    return None


def _need_row(where: str, value: Any, tell: Told) -> Iterator[Row]:
    if isinstance(value, Mapping):
        yield dict(value)
    else:
        tell(Problem(where, short(value), "a JSON object, one row", "A row has its fields by name."))


def _json_lines(path: Path, tell: Told) -> Iterator[Row]:
    for number, line in _lines(path, tell):
        if line.isspace():
            continue
        broken: list[Problem] = []
        value = _parse(line.rstrip("\r\n"), f"{path}, line {number}", broken.append, number)
        for problem in broken:
            tell(problem)
        if type(value) is dict:
            yield value
        elif not broken:
            yield from _need_row(f"{path}, line {number}", value, tell)


def _json(path: Path, tell: Told) -> Iterator[Row]:
    """Yield the rows of a JSON list, or of JSON Lines under the name of JSON, as many write them."""
    if _starts_with_object(path):
        yield from _json_lines(path, tell)
        return
    text, broken = _whole(path, tell), []
    value = None if text is None else _parse(text, str(path), broken.append)
    for problem in broken:
        tell(problem)
    if text is None or broken:
        return
    if isinstance(value, Mapping):
        lists = [name for name, part in value.items() if isinstance(part, list)]
        remedy = f"Save the list under {lists[0]!r} as a file of its own." if lists else "Put the object into a list."
        tell(Problem(str(path), f"one object with {short(list(value))}", "a list of rows, or JSON Lines", remedy))
    elif not isinstance(value, list):
        tell(Problem(str(path), short(value), "a list of rows, or JSON Lines"))
    else:
        for index, row in enumerate(value):
            yield from _need_row(f"{path}, row {index}", row, tell)


def _starts_with_object(path: Path) -> bool:
    """Return whether the first line that is not blank is a JSON object by itself."""
    with path.open("rb") as file:
        line = next((line for line in file if line.strip(b"\xef\xbb\xbf \t\r\n")), b"").removeprefix(_BOM).strip()
    if not line.startswith(b"{"):
        return False
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


@contextmanager
def _long_cells() -> Iterator[None]:
    """Let cells be longer than the csv module's 131,072 characters, which documents are, and put its limit back."""
    before = csv.field_size_limit(_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _csv(path: Path, tell: Told) -> Iterator[Row]:
    """Yield the rows of a table with a header; rows of another length and cells with open quotes are told."""
    reader = csv.reader(
        (line for _, line in _lines(path, _raise)),
        delimiter="\t" if path.suffix.lower() == ".tsv" else ",",
        strict=True,
    )
    header: list[str] | None = None
    while True:
        started = reader.line_num + 1
        try:
            with _long_cells():
                cells = next(reader, None)
        except csv.Error as error:
            remedy = 'Quotes in a cell are doubled: "".'
            if "new-line" in str(error):
                remedy = "Its lines end with a carriage return alone; save it with line feeds."
            tell(Problem(f"{path}, line {started}", short(str(error)), "cells in CSV", remedy))
            return
        if cells is None:
            break
        if not cells:
            continue
        if header is None:
            header = _header(path, cells)
        elif len(cells) != len(header):
            expected = f"{len(header)} cells, as in the header"
            remedy = f"Its cells are {short(cells)}; a cell with the separator in it stands in quotes."
            tell(Problem(f"{path}, line {started}", f"{len(cells)} cells", expected, remedy))
        else:
            yield dict(zip(header, cells, strict=True))
    if header is None:
        tell(Problem(str(path), "an empty file", "a header and rows"))


def _header(path: Path, names: list[str]) -> list[str]:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated or not all(name.strip() for name in names):
        raise DataError(Problem(f"{path}, line 1", short(names), "a header with a name of its own for each column"))
    return names
