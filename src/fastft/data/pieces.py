"""The text of single tokens, as they stand in the middle of a text."""

from collections.abc import Sequence
from typing import Any

from attrs import define, field

ANCHOR = "a"
BROKEN = "\ufffd"  # what a part of a character is decoded to


@define
class Pieces:
    """Token ids -> the text that each of them adds; joined, the pieces of a row are its text.

    A tokenizer may drop blanks at the start of what it decodes: every token is decoded behind another one. Of tokens
    that make a character together the first has the text.
    """

    tokenizer: Any
    _known: dict[int, str] = field(factory=dict)

    def of(self, ids: Sequence[int]) -> list[str]:
        """Return the piece of every token of a row."""
        pieces = [self._piece(token) for token in ids]
        start = 0
        while start < len(pieces):
            end = start
            while end < len(pieces) and BROKEN in pieces[end]:
                end += 1
            if end > start + 1:
                pieces[start:end] = [self._behind(list(ids[start:end])), *[""] * (end - start - 1)]
            start = end + 1
        return pieces

    def _piece(self, token: int) -> str:
        piece = self._known.get(token)
        if piece is None:
            piece = self._known[token] = self._behind([token])
        return piece

    def _behind(self, ids: list[int]) -> str:
        anchor = self.tokenizer.encode(ANCHOR, add_special_tokens=False)[-1:]
        return self._decode([*anchor, *ids]).removeprefix(self._decode(anchor))

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
