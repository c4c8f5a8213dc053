"""A preview as one HTML page that needs no other file, script or network."""

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from fastft.data.preview_text import foot, head, title
from fastft.errors import SaveError

if TYPE_CHECKING:
    from fastft.data.preview import Preview, PreviewRow, Token

STYLE = """
:root { color-scheme: light dark; --learnt: #bfe8c4; --other: #f0f0f0; --faint: #777; }
@media (prefers-color-scheme: dark) { :root { --learnt: #1e5c2b; --other: #2b2b2b; --faint: #999; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
pre { font: 14px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
pre span { border-radius: 3px; background: var(--other); margin-right: 1px; }
pre span.learnt { background: var(--learnt); font-weight: 600; }
pre span.scaffold { color: var(--faint); }
sub { color: var(--faint); font-size: 10px; }
table { border-collapse: collapse; }
th, td { text-align: right; padding: 0.2rem 0.8rem; border-bottom: 1px solid var(--faint); }
"""


def page(preview: "Preview") -> str:
    """Return the page; every token tells its id, role and position when pointed at."""
    table = preview.truncation
    cells = ("max_length", "rows cut", "rows left with nothing to learn", "loss-bearing tokens lost")
    lines = [
        (
            f"{loss.length:,}",
            f"{loss.rows_cut:,}",
            f"{loss.rows_lost:,}",
            f"{loss.bearing_lost:,} ({loss.bearing_lost / max(1, table.bearing):.1%})",
        )
        for loss in table.losses
    ]
    rows = "\n".join(_row(row, preview.ids) for row in preview.rows)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in lines)
    name = escape(f"Preview of {preview.source}")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{name}</h1>
<p>{escape(head(preview, "on green")).replace(chr(10), "<br>")}</p>
{rows}
<h2>What cutting would lose</h2>
<p>{escape(str(table).splitlines()[0])}</p>
<table>
<tr>{"".join(f"<th>{cell}</th>" for cell in cells)}</tr>
{body}
</table>
<p>{escape(foot(preview))}</p>
</body>
</html>
"""


def write(preview: "Preview", path: Path) -> None:
    """Write the page to `path`. Raises `SaveError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page(preview), encoding="utf-8", errors="replace")
    except OSError as error:
        raise SaveError(f"{path} cannot be written: {error.strerror or error}") from error


def _row(row: "PreviewRow", ids: bool) -> str:
    tokens = "".join(_token(token, ids) for token in row.tokens)
    return f"<h2>{escape(title(row))}</h2>\n<pre>{tokens}</pre>"


def _token(token: "Token", ids: bool) -> str:
    kind = "learnt" if token.learnt else "given" if token.role else "scaffold"
    about = (
        f"{token.position}: id {token.id}, {token.role or 'template'}, {'bears loss' if token.learnt else 'no loss'}"
    )
    number = f"<sub>{token.id}</sub>" if ids else ""
    return f'<span class="{kind}" title="{escape(about)}">{escape(token.text)}{number}</span>'
