"""What a model will see of some data, and what it will learn from: rows as the collator that trains makes them."""

import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import asdict, evolve, frozen

from fastft.data import columns, inputs, packing
from fastft.data.chat import TrainOn, chat_dataset
from fastft.data.check import whole_number
from fastft.data.mask import IGNORE
from fastft.data.pieces import Pieces
from fastft.data.truncation import LENGTHS, TruncationTable, check_lengths, truncation_table
from fastft.errors import UsageError
from fastft.noise import quiet

STREAMED = 1000  # rows of a stream that are looked at
LEAST = 1024  # tokens of a packed row where no length is given and all rows are shorter


@frozen
class Token:
    """One token of a batch: whether it bears loss, whose text it is (None: unknown), and its position."""

    id: int
    text: str
    learnt: bool
    role: str | None
    position: int


@frozen
class PreviewRow:
    """A row of the data, as a batch holds it; `tokens_cut` were left off at `max_length`."""

    number: int
    tokens: tuple[Token, ...]
    tokens_cut: int

    @property
    def learnt(self) -> int:
        """The number of tokens that bear loss."""
        return sum(token.learnt for token in self.tokens)


@frozen
class Preview:
    """Some rows as they are trained on, and what the whole data would lose at several lengths. It prints itself.

    `recognised` says what the data were taken for. `truncation` and `packing` (`Packing.statistics`) are those of all
    rows; of a stream those of its first 1,000 (`whole` is False). `ids`: print tokens one by one, with their ids.
    """

    source: str
    recognised: str
    train_on: str
    max_length: int | None
    rows: tuple[PreviewRow, ...]
    truncation: TruncationTable
    packing: Mapping[str, Any]
    whole: bool
    ids: bool

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        rows = [{**asdict(row), "learnt": row.learnt} for row in self.rows]
        values = {name: getattr(self, name) for name in ("source", "recognised", "train_on", "max_length", "whole")}
        return {**values, "rows": rows, "truncation": self.truncation.to_dict(), "packing": dict(self.packing)}

    def to_html(self) -> str:
        """Return a page that shows it and needs nothing else."""
        from fastft.data.preview_html import page

        return page(self)

    def save_html(self, path: str | Path) -> None:
        """Write the page to a file. Raises `SaveError`."""
        from fastft.data.preview_html import write

        write(self, Path(path))

    def __str__(self) -> str:
        from fastft.data.preview_text import plain

        return plain(self)

    def _repr_html_(self) -> str:
        return self.to_html()

    def show(self) -> None:
        """Print it, in colours where standard output is a terminal."""
        from fastft.data.preview_text import coloured

        print(coloured(self) if sys.stdout.isatty() else str(self))


def preview(
    data: Any,
    tokenizer: Any,
    rows: int = 3,
    *,
    train_on: TrainOn = "assistant",
    max_length: int | None = None,
    alternate: bool = True,
    ids: bool = False,
    lengths: Sequence[int] = LENGTHS,
    num_proc: int | None = None,
) -> Preview:
    """Return the first `rows` of `data` token by token, as they are trained on; print the result to look at it.

    `data` is what `chat_dataset` and `sft` take, token ids included; `tokenizer` a tokenizer, or the folder or name of
    a model. Every row goes through `chat_dataset` (without cutting) and those shown through the collator that trains,
    cut to `max_length`. `alternate` as there. `lengths` are those of the truncation table; `ids` prints a line for
    each token.

    Raises `UsageError`, `LoadError`, and what `chat_dataset` raises.
    """
    if not whole_number(rows) or rows < 1:
        raise UsageError(f"preview: rows is a number of at least 1, got {rows!r}")
    if max_length is not None and not (whole_number(max_length) and max_length >= 1):
        raise UsageError(f"preview: max_length is a whole number of tokens of at least 1, got {max_length!r}")
    check_lengths(lengths, "preview")
    tokenizer = _tokenizer(tokenizer)
    source = str(data) if isinstance(data, str | Path) else type(data).__name__
    given = inputs.read(data, alternate)
    whole = hasattr(given.rows, "__len__")
    given = given if whole else evolve(given, rows=list(itertools.islice(iter(given.rows), STREAMED)))
    if given.recognised.kind == "input_ids":
        from datasets import Dataset

        tokenised = given.rows if hasattr(given.rows, "column_names") else Dataset.from_list(given.rows)
    else:
        tokenised = chat_dataset(given, tokenizer, train_on, num_proc=num_proc)
    first = [given.row(f"row {row}", given.rows[row]) for row in range(min(rows, len(given.rows)))]
    sizes = columns.lengths(tokenised)
    limit = max_length or max(LEAST, int(sizes.max(initial=0)))
    fill = packing.pack_lengths(np.minimum(sizes, limit), limit).statistics()
    shown = _rows([tokenised[row] for row in range(len(first))], first, tokenizer, max_length)
    wanted = sorted({*lengths, *([max_length] if max_length else [])})
    table = truncation_table(tokenised, wanted)
    return Preview(source, given.recognised.statement, train_on, max_length, shown, table, fill, whole, ids)


def _tokenizer(tokenizer: Any) -> Any:
    """Return the tokenizer, or that of a model. Raises `LoadError`."""
    if not isinstance(tokenizer, str | Path):
        return getattr(tokenizer, "tokenizer", tokenizer)
    from fastft.model.files import locate
    from fastft.model.tokenizer import load_tokenizer

    return load_tokenizer(locate(str(tokenizer), part="tokenizer"))  # says where it looked, where nothing is


def _rows(
    tokenised: Sequence[Mapping[str, Any]], given: Sequence[Any], tokenizer: Any, max_length: int | None
) -> tuple[PreviewRow, ...]:
    """Return rows as the collator that trains makes them."""
    with quiet():  # TRL imports what warns then
        from fastft.data.training_collator import training_collator

    names = ("input_ids", "labels")
    cut = [{name: row[name][:max_length] for name in names if name in row} for row in tokenised]
    batch = training_collator(tokenizer)(cut)
    pieces, made = Pieces(tokenizer), []
    for number, row in enumerate(cut):
        size = int(batch["attention_mask"][number].sum())
        ids, labels = (batch[name][number, :size].tolist() for name in names)
        texts = pieces.of(ids)
        roles = _roles(texts, given[number])
        tokens = [
            Token(token, text, place > 0 and label != IGNORE, role, place)
            for place, (token, text, label, role) in enumerate(zip(ids, texts, labels, roles, strict=True))
        ]
        made.append(PreviewRow(number, tuple(tokens), len(tokenised[number]["input_ids"]) - len(row["input_ids"])))
    return tuple(made)


def _roles(texts: Sequence[str], row: Mapping[str, Any]) -> list[str | None]:
    """Return whose text each token is: a message's role where its content stands, None for what is between."""
    whole, roles, start = "".join(texts), [None] * len(texts), 0
    begins = np.cumsum([0, *map(len, texts)])
    for role, content in _contents(row):
        place = whole.find(content, start) if content else -1
        if place < 0:
            continue
        start = place + len(content)
        low = int(np.searchsorted(begins, place, side="right")) - 1
        high = int(np.searchsorted(begins, start, side="left"))
        roles[low:high] = [role] * (high - low)
    return roles


def _contents(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (role, text) of everything that somebody says in a row, in order."""
    said = []
    for field in ("messages", "prompt", "completion", "text"):
        value = row.get(field)
        if isinstance(value, str):
            said.append((field, value.strip()))
        for message in value if isinstance(value, list) else ():
            for name in ("reasoning_content", "thinking", "reasoning", "content"):
                content = message.get(name)
                parts = content if isinstance(content, list) else [content]
                texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
                said.extend((message["role"], text.strip()) for text in texts if isinstance(text, str))
    return said
