"""What is told of rows that are used, though not all of it is learnt or may have been meant: one line a kind.

Sets and streams tell the same, in the same words: of a set it is told when all of it is read, of a stream when a row
of the kind first comes up.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from attrs import astuple, frozen

from fastft.data.files import places_of

_LINES = {
    "media": ("{count} images or the like become the chat template's markers in {of}: the model sees none of them."),
    "unlearnt": (
        "{count} earlier answers bear no loss in {of}: the chat template leaves out the reasoning that a model writes "
        "before them."
    ),
    "control": (
        "special tokens in the texts of {of}: the model reads them as the tokens themselves, such as the end of a "
        "turn. If that is not meant, take them out or put a space into them."
    ),
    "unasked": (
        "an answer before any other turn in {of}: it is trained on as what opens a conversation. If a question was "
        "lost, add it, or take the answer out."
    ),
    "unanswered": (
        "no answer to the last turn of {of}: what follows the last answer is not learnt. If the answer was lost, add "
        "it, or take the turn out."
    ),
    "uncalled": (
        "a tool's result behind no turn of the assistant in {of}: no call is learnt that it would be the result of. "
        "Put the call before it, or make it a user's turn."
    ),
}


@frozen
class Note:
    """What was found in one row, of one kind: the first, and how many there are."""

    found: str
    count: int = 1


def packed(notes: Mapping[str, Note]) -> str | None:
    """Return the notes of a row, by their kinds, as JSON; None where there are none."""
    return json.dumps({kind: astuple(note) for kind, note in notes.items()}) if notes else None


def unpacked(data: str) -> dict[str, Note]:
    """Return the notes that `packed` has written."""
    return {kind: Note(*parts) for kind, parts in json.loads(data).items()}


class Notes:
    """Counts the rows of each kind and what was found in them, keeps the first, and tells each kind once."""

    def __init__(self) -> None:
        self._rows: Counter[str] = Counter()
        self._found: Counter[str] = Counter()
        self._first: dict[str, tuple[int, str]] = {}
        self._settled: set[str] = set()

    def add(self, number: int, notes: Mapping[str, Note]) -> None:
        """Count what was noted of a row, by its kinds; rows come in their order."""
        for kind, note in notes.items():
            self._rows[kind] += 1
            self._found[kind] += note.count
            self._first.setdefault(kind, (number, note.found))

    def lines(
        self, total: int, files: Sequence[Path] = (), *, streamed: bool = False, written: bool = False
    ) -> Iterator[str]:
        """Yield a line for each kind that was not asked for before, of `total` rows, if `streamed` the first ones.

        Rows that came out of `files`, in their order, are named as in errors, by file and line. `written`: the rows are
        texts that are not rendered. Special tokens in half of them or more are the format that the user has written
        there, and no accident.
        """
        whole = f"the first {total:,} rows" if streamed else f"{total:,} row{'s' * (total != 1)}"
        kinds = [kind for kind in _LINES if self._rows[kind] and kind not in self._settled]
        self._settled.update(kinds)
        if written and 2 * self._rows["control"] >= total:
            kinds = [kind for kind in kinds if kind != "control"]
        places = places_of(files, {self._first[kind][0] for kind in kinds})
        for kind in kinds:
            number, found = self._first[kind]
            first = f"{places.get(number, f'row {number}')}, {found!r}"
            of = f"{self._rows[kind]:,} of {whole} (the first: {first})"
            yield _LINES[kind].format(of=of, count=f"{self._found[kind]:,}")
