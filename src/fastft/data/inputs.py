"""Whatever users have, read and recognised: the rows as they are, and how each becomes one that can be rendered."""

import itertools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import evolve, frozen

from fastft.data.check import refuse_empty
from fastft.data.convert import Row, convert_row
from fastft.data.files import BrokenFilesError, told_of
from fastft.data.kinds import PLAIN, Kind, Recognised
from fastft.data.recognise import SAMPLE, recognise
from fastft.data.sources import Source, open_source
from fastft.errors import DataError, Problem

READ: tuple[Kind, ...] = (*PLAIN, "sharegpt", "instruction")  # what is rendered, or a text
_BESIDE = ("tools", "chat_template_kwargs")
_OTHERS = {
    "preference": "They are preferences: fine-tune on the chosen answers as 'messages'.",
    "input_ids": "Token ids need no rendering: pass them to sft or the trainer as a datasets.Dataset.",
}


@frozen
class Input:
    """Rows as they are in their source, and what they were recognised as. A picklable value but for the rows.

    `features` are those of the Arrow table that the rows are from, `files` the files. `alternate` refuses two
    assistant turns in a row.
    """

    rows: Any
    recognised: Recognised
    features: Mapping[str, Any] | None = None
    alternate: bool = True
    files: tuple[Path, ...] = ()

    def row(self, where: str, row: Any) -> Row:
        """Return one of the rows in its canonical form. Raises `DataError` with every mistake in it."""
        made, problems = convert_row(where, row, self.recognised, self.features, self.alternate)
        if problems:
            raise DataError(*problems)
        return made


def open_rows(source: Any, alternate: bool = True, kinds: Collection[Kind] = READ) -> Source:
    """Return what `open_source` returns. Of files of which some lines are no rows, what is wrong in the others is told
    with it, where these are of one of the `kinds`.
    """
    try:
        return open_source(source)
    except BrokenFilesError as error:
        try:
            recognised = recognise(error.rows)
        except DataError:
            raise error from None
        if recognised.kind not in kinds:
            raise

        def wrong_in(where: str, row: Row) -> Sequence[Problem]:
            return convert_row(where, row, recognised, None, alternate)[1]

        error.refuse_with(wrong_in)
        raise


def open_named_rows(source: Any, name: str, alternate: bool = True, kinds: Collection[Kind] = READ) -> Source:
    """Return what `open_rows` returns; errors tell the data's `name`."""
    with told_of(name):
        return open_rows(source, alternate, kinds)


def read(source: Any, alternate: bool = True) -> Input:
    """Return the rows of what `open_source` takes or returns, recognised; one line says what becomes something else.

    Of an iterator the first `SAMPLE` rows are read, and come again in `rows`. Raises `DataError` where nothing is
    recognised or more than one kind is.
    """
    source = open_rows(source, alternate)
    rows = source.rows
    if hasattr(rows, "__next__"):
        head = list(itertools.islice(rows, SAMPLE))
        recognised = recognise(head, stream=len(head) == SAMPLE)
        rows = itertools.chain(head, rows)
    else:
        if hasattr(rows, "__len__"):
            refuse_empty(rows)
        recognised = recognise(rows)
    if recognised.kind not in (*PLAIN, *_OTHERS):
        print(f"fastft: {recognised.statement}")
    features = getattr(rows, "features", None)
    if getattr(rows, "column_names", None) is not None and recognised.kind not in _OTHERS:
        used = [*recognised.fields.values(), *(name for name in _BESIDE if name in rows.column_names)]
        rows = rows.select_columns(list(dict.fromkeys(used)))
        rows = rows.with_format(None) if hasattr(rows, "__len__") else rows
    return Input(rows, recognised, features, alternate, source.files)


def refuse_others(given: Input) -> None:
    """Raise `DataError` for rows of a kind that is not rendered."""
    remedy = _OTHERS.get(given.recognised.kind)
    if remedy:
        expected = "conversations, prompts with completions, instructions with answers, or plain text"
        raise DataError(Problem("rows", given.recognised.statement, expected, remedy))


def without_rows(given: Input) -> Input:
    """Return how the rows are read, without them: small, and the same for every process."""
    return evolve(given, rows=None)
