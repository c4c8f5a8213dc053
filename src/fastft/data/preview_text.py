"""A preview as text: what bears loss in colour on a terminal, and between marks anywhere else."""

import io
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastft.data.preview import Preview, PreviewRow

OPEN, CLOSE = "[[", "]]"
_PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
_PICTURES |= {0x7F: "\u2421", **{code: "\ufffd" for code in range(0x80, 0xA0)}}


def plain(preview: "Preview") -> str:
    """Return a preview as text without colours."""
    parts = [head(preview, f"between {OPEN} and {CLOSE}")]
    for row in preview.rows:
        parts.append(title(row))
        if preview.ids:
            parts.append(_lines(row))
        else:
            runs = groupby(row.tokens, key=lambda token: token.learnt)
            texts = [(learnt, _harmless("".join(token.text for token in tokens))) for learnt, tokens in runs]
            parts.append("".join(f"{OPEN}{text}{CLOSE}" if learnt else text for learnt, text in texts).rstrip("\n"))
    return "\n\n".join([*parts, str(preview.truncation), foot(preview)])


def coloured(preview: "Preview") -> str:
    """Return a preview with the escape codes of a terminal."""
    from rich.console import Console
    from rich.text import Text

    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=10_000, highlight=False)
    console.print(Text(head(preview, "in green")))
    for row in preview.rows:
        console.print(Text("\n" + title(row), style="bold"))
        if preview.ids:
            for token, line in zip(row.tokens, _lines(row).splitlines()[1:], strict=True):
                console.print(Text(line, style="bold green" if token.learnt else "default"))
            continue
        text = Text()
        for token in row.tokens:
            style = "bold green" if token.learnt else "default" if token.role else "dim"
            text.append(_harmless(token.text), style=style)
        console.print(text)
    console.print(Text("\n" + str(preview.truncation)))
    console.print(Text("\n" + foot(preview)))
    return out.getvalue().rstrip("\n")


def _harmless(text: str) -> str:
    """Return a text with pictures of the control characters, which a terminal would obey."""
    return text.translate(_PICTURES)


def head(preview: "Preview", how: str) -> str:
    """Return the first lines: what is shown."""
    cut = f", cut to {preview.max_length:,} tokens" if preview.max_length else ""
    seen = "" if preview.whole else f"; a stream: its first {preview.truncation.rows:,} rows"
    what = f'{preview.source}: {preview.recognised}\ntrain_on="{preview.train_on}"{cut}{seen}'
    return f"{what}\nWhat bears loss stands {how}."


def title(row: "PreviewRow") -> str:
    """Return the line above a row."""
    cut = f", {row.tokens_cut:,} more were cut" if row.tokens_cut else ""
    return f"row {row.number}: {len(row.tokens):,} tokens, {row.learnt:,} of them bear loss{cut}"


def foot(preview: "Preview") -> str:
    """Return the last line: how full rows would be."""
    kept: Any = preview.packing
    return (
        f"packed into {kept['max_length']:,} tokens: {kept['packed_rows']:,} rows, {kept['fill']:.1%} full; "
        f"padded to the longest: {kept['fill_padded']:.1%}"
    )


def _lines(row: "PreviewRow") -> str:
    """Return a table with a line for each token."""
    width = max(len(token.role or "") for token in row.tokens)
    lines = [f"{'place':>6} {'id':>7}  {'role':{width}}  loss  text"]
    for token in row.tokens:
        loss = "loss" if token.learnt else ""
        lines.append(f"{token.position:>6} {token.id:>7}  {token.role or '':{width}}  {loss:4}  {token.text!r}")
    return "\n".join(lines)
