"""One self-contained HTML page, without any reference to the outside."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from experiments.harness.report.data import Report

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


def html_page(report: Report, record: Mapping[str, Any]) -> str:
    """Sentences, table, pictures and how it was made; `record` is shown as JSON."""
    head = "".join(f"<th scope=col>{escape(name)}</th>" for name in report.header)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>"
        for line in report.cells
    )
    figures = "\n".join(
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,'
        f'{base64.b64encode(picture).decode()}"><figcaption>{escape(caption)}</figcaption></figure>'
        for caption, picture in report.pictures.values()
    )
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(report.title)}</title><style>{STYLE}</style></head><body>
<h1>{escape(report.title)}</h1>
{_paragraphs(report.verdict)}
<div class="scroll"><table><thead><tr>{head}</tr></thead>
<tbody>{body}</tbody></table></div>
{figures}
<h2>How it was measured</h2>
{_paragraphs(report.method)}
<h2>Settings</h2>
<pre>{escape(json.dumps(record, indent=1))}</pre>
</body></html>
"""


def _paragraphs(texts: Sequence[str]) -> str:
    return "\n".join(f"<p>{escape(text)}</p>" for text in texts)
