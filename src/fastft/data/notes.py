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

    def anew(self) -> None:
        """Forget what was counted, but not which kinds were told."""
        for counted in (self._rows, self._found, self._first):
            counted.clear()

    def lines(
        self, total: int, files: Sequence[Path] = (), *, whole: str | None = None, written: bool = False
    ) -> Iterator[str]:
        """Yield a line for each kind that was not asked for before, of `total` rows, which are named `whole`.

        Rows that came out of `files`, in their order, are named as in errors, by file and line. `written`: the rows are
        texts that are not rendered. Special tokens in half of them or more are the format that the user has written
        there, and no accident.
        """
        whole = whole or f"{total:,} row{'s' * (total != 1)}"
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


class StreamNotes:
    """Notes of a stream, told while it is read: each kind once, of the rows read since the reading began.

    It begins with a look at the first rows, and anew where rows come that do not follow on those before: when the
    stream is read from its start, goes on after a resume, or is read by a worker of a loader. A worker numbers its own
    rows and has its own copy of this; only the first one tells.
    """

    def __init__(self) -> None:
        self._notes = Notes()
        self._begin = 0
        self._next = (None, 0)  # the worker and the number of the row that goes on with those before

    def lines(
        self, numbers: Sequence[int], noted: Sequence[Mapping[str, Note]], files: Sequence[Path], *, written: bool
    ) -> Iterator[str]:
        """Yield as `Notes.lines` does, with what was `noted` of more rows, whose `numbers` follow one another."""
        from torch.utils.data import get_worker_info

        worker = getattr(get_worker_info(), "id", None)
        if worker:
            return
        if (worker, numbers[0]) != self._next:
            self._notes.anew()
            self._begin = numbers[0]
        end = numbers[-1] + 1
        self._next = (worker, end)
        for number, notes in zip(numbers, noted, strict=True):
            self._notes.add(number, notes)
        total, of = end - self._begin, "" if worker is None else " of one worker"
        rows = f"{total:,} rows{of}"
        whole = f"the {rows} from row {self._begin} on" if self._begin else f"the first {rows}"
        yield from self._notes.lines(total, files, whole=whole, written=written)
