"""Rows out of files: JSON Lines, JSON, CSV, TSV and plain text, with the line or byte of every mistake.

Cells of a table stay the texts they are: nothing becomes a number, a date or NaN.
"""

import csv
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attrs import evolve

from fastft.data.check import Mistakes, named
from fastft.errors import DataError, Problem, short

TEXT_SUFFIXES = (".txt", ".md")
TABLE_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv")
PARQUET = ".parquet"
SUFFIXES = (*TABLE_SUFFIXES, PARQUET, *TEXT_SUFFIXES)
_BOM = b"\xef\xbb\xbf"
_ENCODING = "Save the file as UTF-8, or put the damaged bytes right."
_CELL = 2**31 - 1  # longest cell of a CSV file, in characters: as good as none
_SEPARATORS = (",", ";", "\t", "|")
Row = dict[str, Any]
Placed = tuple[str, Row]  # a row and where it stands: file and line, or file and number
Told = Callable[[Problem], None]


class BrokenFilesError(DataError):
    """Files of which something is no row: a line that is no JSON, or no object. What is wrong in their rows may follow.

    `rows` are the rows all the same. `before`: of each of the mistakes that are told, how many of them come before it.
    """

    def __init__(self, mistakes: Mistakes, paths: Sequence[Path], rows: Sequence[Row], before: Sequence[int]) -> None:
        super().__init__(*mistakes.told())
        self.mistakes, self.paths, self.rows, self.before = mistakes, paths, rows, before

    def refuse_with(self, wrong_in: Callable[[str, Row], Sequence[Problem]]) -> None:
        """Raise `DataError` with the mistakes and those `wrong_in("row 3", row)`, in the order of the lines."""
        both, own = Mistakes(), list(zip(self.before, self.mistakes.kept, strict=True))
        for index, row in enumerate(self.rows):
            while own and own[0][0] <= index:
                both.add([own.pop(0)[1]])
            both.add(wrong_in(f"row {index}", row))
        for _, problem in own:
            both.add([problem])
        for _ in range(self.mistakes.count - len(self.before)):  # those that are only counted come behind the others
            both.add(self.mistakes.kept[-1:])
        with told_by_file(self.paths):
            both.refuse()


def read_files(paths: Sequence[Path]) -> list[Row]:
    """Return the rows of files in their order. Raises `BrokenFilesError` with the mistakes of all of them together."""
    mistakes, rows, before = Mistakes(), [], []

    def tell(problem: Problem) -> None:
        mistakes.add([problem])
        before.extend([len(rows)] if len(before) < len(mistakes.kept) else [])

    for path in paths:
        for _, row in _rows_of(path, tell):
            rows.append(row)
    if mistakes.count:
        raise BrokenFilesError(mistakes, paths, rows, before)
    return rows


def stream_files(paths: Sequence[Path]) -> Iterator[Row]:
    """Yield the rows of files in their order, a line at a time. Raises `DataError` at the first mistake."""
    for path in paths:
        for _, row in _rows_of(path, _raise):
            yield row


@contextmanager
def told_by_file(paths: Sequence[Path], name: str = "") -> Iterator[None]:
    """Let a `DataError` about rows that came out of files, in their order, name file and line instead of "row 3".

    With a `name` of the data it is those about "train row 3", say. The error stays the one that was raised, with its
    cause; a second one would show all mistakes twice.
    """
    try:
        yield
    except DataError as error:
        row = re.compile(rf"{re.escape(f'{name} ' if name else '')}row (\d+)\b")
        found = [row.match(problem.where) if isinstance(problem, Problem) else None for problem in error.problems]
        places = places_of(paths, {int(match[1]) for match in found if match})
        told = [
            evolve(problem, where=f"{places.get(int(match[1]), match[0])}{problem.where[match.end() :]}")
            if match
            else problem
            for problem, match in zip(error.problems, found, strict=True)
        ]
        error.tell(*told)
        raise


@contextmanager
def told_of(name: str, paths: Sequence[Path] = ()) -> Iterator[None]:
    """Let a `DataError` about rows name file and line where they are out of files, else the data's `name`."""
    try:
        with told_by_file(paths):
            yield
    except DataError as error:
        error.tell(*(named(problem, name) for problem in error.problems))
        raise


def places_of(paths: Sequence[Path], wanted: Collection[int]) -> dict[int, str]:
    """Return where rows stand ("a.jsonl, line 3"), by their numbers over all files; nothing for rows out of none.

    The files are read again up to the last row that is wanted.
    """
    if not paths or not wanted:
        return {}
    placed = itertools.islice((place for path in paths for place in _places_in(path)), max(wanted) + 1)
    return {index: place for index, place in enumerate(placed) if index in wanted}


def _places_in(path: Path) -> Iterator[str]:
    if path.suffix.lower() == PARQUET:
        from pyarrow.parquet import ParquetFile

        return (f"{path}, row {number}" for number in range(ParquetFile(path).metadata.num_rows))
    return (place for place, _ in _rows_of(path, lambda problem: None))  # what is no row has been told


def _raise(problem: Problem) -> None:
    raise DataError(problem)


def _rows_of(path: Path, tell: Told) -> Iterator[Placed]:
    if path.suffix.lower() in TEXT_SUFFIXES:
        yield from _text(path, tell)
    elif path.suffix.lower() in (".json", ".jsonl"):
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


def _text(path: Path, tell: Told) -> Iterator[Placed]:
    text = _whole(path, tell)
    if text is not None and not text.strip():
        tell(Problem(str(path), text[:20], "a text that is not empty", "Remove the file or give it text."))
    elif text is not None:
        yield str(path), {"text": text}


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


def _need_row(where: str, value: Any, tell: Told) -> Iterator[Placed]:
    if isinstance(value, Mapping):
        yield where, dict(value)
    else:
        tell(Problem(where, short(value), "a JSON object, one row", "A row has its fields by name."))


def _json_lines(path: Path, tell: Told) -> Iterator[Placed]:
    for number, line in _lines(path, tell):
        if line.isspace():
            continue
        broken: list[Problem] = []
        where = f"{path}, line {number}"
        value = _parse(line.rstrip("\r\n"), where, broken.append, number)
        for problem in broken:
            tell(problem)
        if not broken:
            yield from _need_row(where, value, tell)


def _json(path: Path, tell: Told) -> Iterator[Placed]:
    """Yield the rows of JSON Lines or of one JSON list, which both stand under either name: no line is a list."""
    if not _is_one_value(path):
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


def _is_one_value(path: Path) -> bool:
    """Say whether a file is one JSON value rather than lines of JSON, by its name and first line that is not blank.

    Under the name of JSON it is, unless that line is an object by itself; under that of JSON Lines, where that line
    begins a list: one that ends further down, or that stands there alone.
    """
    with path.open("rb") as file:
        lines = (line.removeprefix(_BOM).strip() for line in file)
        line = next((line for line in lines if line), b"")
        alone = not any(lines)
    if path.suffix.lower() == ".json":
        return not (line.startswith(b"{") and _is_json(line))
    return line.startswith(b"[") and (alone or not _is_json(line))


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
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


def _csv(path: Path, tell: Told) -> Iterator[Placed]:
    """Yield the rows of a table with a header; rows of another length and cells with open quotes are told."""
    lines = (line for _, line in _lines(path, _raise))
    head: list[str] = []  # up to the first line that is not blank
    while not head or head[-1].isspace():
        head.append(next(lines, ""))
    reader = csv.reader(itertools.chain(head, lines), delimiter=_separator(path, head[-1]), strict=True)
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
            remedy = "A cell with the separator in it stands in quotes."
            tell(Problem(f"{path}, line {started}", f"{len(cells)} cells, {short(cells)}", expected, remedy))
        else:
            yield f"{path}, line {started}", dict(zip(header, cells, strict=True))
    if header is None:
        tell(Problem(str(path), "an empty file", "a header and rows"))


def _separator(path: Path, header: str) -> str:
    """Return what separates the cells of a table: the mark its suffix names, or the only other one in its header."""
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    line = header.splitlines()[:1]
    with _long_cells():
        names = {mark: next(csv.reader(line, delimiter=mark), []) for mark in _SEPARATORS}
    found = [mark for mark, cells in names.items() if len(cells) > 1 and all(cell.strip() for cell in cells)]
    if usual in found or not found:
        return usual
    if len(found) > 1:
        remedy = f"Save the file with {usual!r} between the cells."
        raise DataError(Problem(f"{path}, line 1", short(header), f"one separator, found {found}", remedy))
    return found[0]


def _header(path: Path, names: list[str]) -> list[str]:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated or not all(name.strip() for name in names):
        raise DataError(Problem(f"{path}, line 1", short(names), "a header with a name of its own for each column"))
    return names
