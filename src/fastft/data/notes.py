"""What is told of rows that are used as they are, though it may not be what was meant: one line a kind, not a row."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fastft.data.files import places_of

_LINES = {
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


class Notes:
    """Counts the rows of each kind, and keeps the first of them."""

    def __init__(self) -> None:
        self._rows: Counter[str] = Counter()
        self._first: dict[str, tuple[int, str]] = {}

    def add(self, number: int, notes: Mapping[str, str]) -> None:
        """Count what was noted of a row, kind -> what was found; rows come in their order."""
        for kind, found in notes.items():
            self._rows[kind] += 1
            self._first.setdefault(kind, (number, found))

    def lines(
        self, total: int, files: Sequence[Path] = (), *, streamed: bool = False, written: bool = False
    ) -> Iterable[str]:
        """Return a line for each kind, of `total` rows, which if `streamed` are the first ones.

        Rows that came out of `files`, in their order, are named as in errors, by file and line. `written`: the rows are
        texts that are not rendered. Special tokens in half of them or more are the format that the user has written
        there, and no accident.
        """
        whole = f"the first {total:,} rows" if streamed else f"{total:,} row{'s' * (total != 1)}"
        kinds = [kind for kind in _LINES if self._rows[kind]]
        if written and 2 * self._rows["control"] >= total:
            kinds = [kind for kind in kinds if kind != "control"]
        places = places_of(files, {self._first[kind][0] for kind in kinds})
        for kind in kinds:
            number, found = self._first[kind]
            first = f"{places.get(number, f'row {number}')}, {found!r}"
            yield _LINES[kind].format(of=f"{self._rows[kind]:,} of {whole} (the first: {first})")
