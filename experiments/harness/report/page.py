"""The report as one HTML file that needs nothing else: no network, no other file.

matplotlib, which the pictures need anyway, draws the curves as SVG, the browser's own controls and
CSS choose what is shown, and `page.js` only shows the value under the pointer. Of the libraries
that draw in the browser, plotly (4.8 MB) and bokeh (canvas) miss the page's limits, mpld3 has
neither names for screen readers nor a logarithmic switch, and Vega-Altair makes a page of 0.9 MB
for two points that is empty without its script.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from experiments.harness.report import drawing
from experiments.harness.report.content import Axis, Chart, Curve, Page, Section, Table, Trace

_HERE = Path(__file__).parent
_WORDS = 40  # a column with a longer cell is prose, not figures


def html(page: Page) -> str:
    """The page as HTML.

    Args:
      page: what it says.
    """
    charts = [chart for section in page.sections for chart in section.charts]
    names = {id(chart): f"c{number}" for number, chart in enumerate(charts)}
    sections, classes = _with_classes("\n".join(_section(one, names) for one in page.sections))
    style, script = (_HERE / f"page.{kind}" for kind in ("css", "js"))
    code = script.read_text().replace("COLOURS", str(drawing.COLOURS))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(page.title)}</title>
<style>{style.read_text()}{classes}{_choices(charts)}</style></head><body>
<header><h1>{escape(page.title)}</h1></header>
<main>
<div class="verdict">{_paragraphs(page.verdict)}</div>
{sections}
<section><h2>Data and settings</h2>
{_data(page)}
{_scroll("settings, versions and device", f"<pre>{_json(page)}</pre>")}</section>
</main>
<script>{code}</script>
</body></html>
"""


def _with_classes(sections: str) -> tuple[str, str]:
    """The styles of the drawings as classes, which take a third of the room, and their rules."""
    found: dict[str, int] = {}

    def name(style: re.Match[str]) -> str:
        return f'class="s{found.setdefault(style[1], len(found))}"'

    sections = re.sub('style="([^"]*)"', name, sections)
    return sections, "".join(f".s{number} {{{style}}}\n" for style, number in found.items())


def _json(page: Page) -> str:
    return escape(json.dumps(page.record, indent=1), quote=False)


def _data(page: Page) -> str:
    items = "".join(
        f'<li><a href="{escape(file)}">{escape(file)}</a>: {escape(text)}</li>'
        for file, text in page.data.items()
    )
    return f'<ul class="data">{items}</ul>' if items else ""


def _section(section: Section, names: dict[int, str]) -> str:
    parts = [
        _paragraphs(section.text),
        *map(_table, section.tables),
        *(_chart(chart, names[id(chart)]) for chart in section.charts),
    ]
    return f"<section><h2>{escape(section.heading)}</h2>\n" + "\n".join(parts) + "</section>"


def _paragraphs(texts: Iterable[str]) -> str:
    return "\n".join(f"<p>{escape(text)}</p>" for text in texts)


def _scroll(name: str, content: str) -> str:
    """What may be wider than a phone; the arrow keys reach all of it."""
    region = f'class="scroll" tabindex="0" role="region" aria-label="{escape(name)}"'
    return f"<div {region}>{content}</div>"


def _table(table: Table) -> str:
    prose = [any(len(cell) > _WORDS for cell in column) for column in zip(*table.rows)]
    looks = [' class="words"' if words else "" for words in prose] or [""] * len(table.columns)
    head = "".join(
        f'<th scope="col"{look}>{_head(column)}</th>' for column, look in zip(table.columns, looks)
    )
    rows = "\n".join(_row(row, looks) for row in table.rows)
    return _scroll(
        table.caption,
        f"<table><caption><span>{escape(table.caption)}</span></caption>"
        f"<thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table>",
    )


def _head(column: Axis) -> str:
    return escape(column.name) + (f"<span>{escape(column.unit)}</span>" if column.unit else "")


def _row(row: Sequence[str], looks: Sequence[str]) -> str:
    first, *others = map(escape, row)
    cells = "".join(f"<td{look}>{cell}</td>" for cell, look in zip(others, looks[1:]))
    return f'<tr><th scope="row">{first}</th>{cells}</tr>'


def _chart(chart: Chart, name: str) -> str:
    drawn = list(drawing.views(chart, name))
    caption, described = escape(chart.caption), escape(f"{chart.caption}. {chart.result}")
    pictures = "\n".join(
        f'<svg id="{_view(name, view)}" class="view x{view.axis} {view.scale} {view.width}" '
        f'viewBox="0 0 {drawing.SIZES[view.width][0]} {drawing.SIZES[view.width][1]}" role="img" '
        f'aria-label="{described}">{view.svg}</svg>'
        for view in drawn
    )
    controls = [
        _radios("over", f"{name}-x", [(f"x{i}", axis.name) for i, axis in enumerate(chart.x)]),
        _radios(chart.y.name, f"{name}-y", [(scale, scale) for scale in drawing.scales(chart)]),
    ]
    keys = "".join(_key(index, curve, name) for index, curve in enumerate(chart.curves))
    return f"""<figure class="chart" id="{name}">
<figcaption><strong>{caption}.</strong> {escape(chart.result)}</figcaption>
<div class="controls">{"".join(controls)}</div>
<div class="plot" tabindex="0" role="group" aria-label="{caption}: values by arrow keys">
{pictures}
<div class="mark" hidden></div><output hidden></output></div>
<fieldset class="key"><legend>Show</legend>{keys}</fieldset>
{_values(chart)}
<script type="application/json">{_points(chart, name, drawn)}</script>
</figure>"""


def _view(name: str, view: drawing.View) -> str:
    return f"{name}-{view.axis}-{view.scale}-{view.width}"


def _radios(legend: str, name: str, choices: Sequence[tuple[str, str]]) -> str:
    """A switch; where there is no choice only its value, for the rules of `_choices`."""
    inputs = [
        f'<input type="radio" name="{name}" value="{value}" autocomplete="off"'
        + (" checked" if index == 0 else "")
        for index, (value, _) in enumerate(choices)
    ]
    if len(choices) == 1:
        return f"{inputs[0]} hidden>"
    labels = "".join(
        f"<label>{start}>{escape(text)}</label>"
        for start, (_, text) in zip(inputs, choices, strict=True)
    )
    return f"<fieldset><legend>{escape(legend)}</legend>{labels}</fieldset>"


def _key(index: int, curve: Curve, chart: str) -> str:
    swatch = drawing.swatch(index, curve.joined, f"{chart}-key{index}")
    return (
        f'<label><input type="checkbox" value="{index}" autocomplete="off" checked>'
        f'<svg viewBox="0 0 32 12" aria-hidden="true">{swatch}</svg>'
        f"<span>{escape(curve.name)} <small>{escape(curve.result)}</small></span></label>"
    )


def _choices(charts: Sequence[Chart]) -> str:
    """The rules by which switches and legends act, without a script."""
    curves = max((len(chart.curves) for chart in charts), default=0)
    axes = max((len(chart.x) for chart in charts), default=0)
    rules = [
        f"figure:has(.key [value='{i}']:not(:checked)) .series-{i} {{ display: none; }}"
        for i in range(curves)
    ]
    rules += [
        f"figure:has([value=x{axis}]:checked):has([value={scale}]:checked) .x{axis}.{scale} "
        "{ display: block; }"
        for axis in range(axes)
        for scale in ("linear", "log")
    ]
    return "\n".join(rules)


def _points(chart: Chart, name: str, drawn: Sequence[drawing.View]) -> str:
    """For `page.js`: all points, and how they are placed on each drawing."""
    at: dict[tuple[float, ...], int] = {}  # places that many traces share

    def trace(series: int, one: Trace, curve: Curve | None = None) -> dict[str, Any]:
        x = [at.setdefault(tuple(map(_short, places)), len(at)) for places in one.x]
        found = {"series": series, "label": one.label, "x": x, "y": [*map(_short, one.y)]}
        if curve is not None and curve.low is not None and curve.high is not None:
            found |= {"low": [*map(_short, curve.low)], "high": [*map(_short, curve.high)]}
        return found

    means = [trace(index, curve.mean, curve) for index, curve in enumerate(chart.curves)]
    runs = [trace(index, run) for index, curve in enumerate(chart.curves) for run in curve.runs]
    content = {
        "axes": [dataclasses.asdict(axis) for axis in chart.x],
        "y": dataclasses.asdict(chart.y),
        "names": [curve.name for curve in chart.curves],
        "traces": [*means, *runs],
        "places": list(at),
        "views": {
            _view(name, view): {
                "axis": view.axis, "logarithmic": view.scale == "log", "x": view.x, "y": view.y
            }
            for view in drawn
        },
    }  # fmt: skip
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")


def _short(value: float) -> float:
    """As exact as it is shown."""
    return float(f"{value:.5g}") if abs(value) < 1e4 else round(value)


def _values(chart: Chart) -> str:
    """The curves as a table, for those who do not see them or want to copy a figure."""
    if not all(curve.joined for curve in chart.curves):
        return ""
    places = sorted({x for curve in chart.curves for x in curve.mean.x[0]})
    by_curve = [dict(zip(curve.mean.x[0], curve.mean.y)) for curve in chart.curves]
    table = Table(
        str(chart.y),
        (chart.x[0], *(Axis(curve.name) for curve in chart.curves)),
        [
            [drawing.number(x), *(drawing.number(ys[x]) if x in ys else "" for ys in by_curve)]
            for x in places
        ],
    )
    return f"<details><summary>Values</summary>{_table(table)}</details>"
