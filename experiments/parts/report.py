"""The table on the terminal and one self-contained HTML page."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rich import box
from rich.table import Table

Row = Mapping[str, Any]

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff;
       max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #ccc; }
th { vertical-align: bottom; border-bottom: 2px solid #222; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; } pre { overflow-x: auto; background: #f4f4f4; padding: 1rem; }
.scroll { overflow-x: auto; }
"""


def terminal_table(title: str, header: Sequence[str], cells: Sequence[Sequence[str]]) -> Table:
    """A rich table; the first column is text, the others are figures."""
    table = Table(
        title=title, box=box.SIMPLE_HEAD, padding=0, pad_edge=False, collapse_padding=True
    )
    for index, name in enumerate(header):
        words = name.replace(" / ", " /\N{NO-BREAK SPACE}").replace(" ", "\n")
        table.add_column(words, justify="left" if index == 0 else "right", vertical="bottom")
    for line in cells:
        table.add_row(*line)
    return table


def html_page(
    *,
    title: str,
    verdict: Sequence[str],
    header: Sequence[str],
    cells: Sequence[Sequence[str]],
    method: Sequence[str],
    pictures: Mapping[str, bytes],
    record: Mapping[str, Any],
) -> str:
    """A page without any reference to the outside: table, pictures (PNG) and how it was made.

    Args:
      title: heading.
      verdict: sentences above the table.
      header: names of the columns.
      cells: the lines of the table.
      method: paragraphs on how the figures were measured.
      pictures: caption -> PNG.
      record: settings, versions and device, shown as JSON.
    """
    head = "".join(f"<th scope=col>{escape(name)}</th>" for name in header)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in cells
    )
    figures = "\n".join(
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,'
        f'{base64.b64encode(picture).decode()}"><figcaption>{escape(caption)}</figcaption></figure>'
        for caption, picture in pictures.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{escape(title)}</h1>
{_paragraphs(verdict)}
<div class="scroll"><table><thead><tr>{head}</tr></thead>
<tbody>{body}</tbody></table></div>
{figures}
<h2>How it was measured</h2>
{_paragraphs(method)}
<h2>Settings</h2>
<pre>{escape(json.dumps(record, indent=1))}</pre>
</body></html>
"""


def _paragraphs(texts: Sequence[str]) -> str:
    return "\n".join(f"<p>{escape(text)}</p>" for text in texts)
