"""Charts as SVG: one drawing for each horizontal axis, vertical scale and width of the screen.

A browser shows one of them. They share classes, and colours are left to the page: a curve's are
`series-0`, `series-1`, ... and `var(--series-0)`, ..., text and frame have the colour of the page's
text.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    EngFormatter,
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullLocator,
)

from experiments.harness.report.content import Chart, Curve

COLOURS = 8
"""Curves with neighbouring numbers differ in colour, dash and marker."""
MARKERS = "osD^vPX*<>ph"
DASHES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
SIZES = {"wide": (720, 400), "narrow": (360, 330)}
"""Width and height in pixels of a page on a large and on a small screen."""
INK = "#abffff"
"""Stands for the colour of the text; `_series` makes the colours that stand for curves."""

_PLACEHOLDER = re.compile("#ab([0-9a-f]{4})")
_NUMBER = re.compile(r"-?\d+\.\d+")
_STYLE: dict[Any, Any] = {
    "font.size": 12,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "svg.fonttype": "none",
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color",
         "grid.color"), INK
    ),
}  # fmt: skip
_FEW = 8


@dataclass(frozen=True)
class View:
    """One drawing of a chart.

    Attributes:
      axis: number of its horizontal axis.
      scale: "linear" or "log", of the vertical axis.
      width: of the screen, a name in `SIZES`.
      svg: the elements within `<svg>`.
      x: of the frame, the values at its left and right, and where they are in pixels.
      y: the same of bottom and top; pixels are counted from the top.
    """

    axis: int
    scale: str
    width: str
    svg: str
    x: tuple[float, float, float, float]
    y: tuple[float, float, float, float]


def scales(chart: Chart) -> list[str]:
    """The vertical scales that a chart can have."""
    lines = [line for curve in chart.curves for line in (curve.mean, *curve.runs)]
    positive = all(y > 0 for line in lines for y in line.y)
    return ["linear", "log"] if positive else ["linear"]


def views(chart: Chart, name: str) -> Iterator[View]:
    """All drawings of a chart; `name` makes their identifiers unique on the page."""
    for axis in range(len(chart.x)):
        for scale in scales(chart):
            for width in SIZES:
                yield _draw(chart, axis, scale, width, f"{name}-{axis}{scale[1]}{width[0]}")


def swatch(index: int, joined: bool, name: str) -> str:
    """The line and marker of a curve for the legend, as the elements within an SVG of 32 x 12."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(32 / 72, 12 / 72), facecolor="none")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set(xlim=(0, 2), ylim=(0, 2))
        axes.plot([0.1, 1, 1.9], [1, 1, 1], **_look(index, joined), markevery=[1])
        return _svg(figure, name)


def _draw(chart: Chart, axis: int, scale: str, width: str, name: str) -> View:
    pixels = SIZES[width]
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(pixels[0] / 72, pixels[1] / 72), dpi=72, facecolor="none")
        figure.set_layout_engine("constrained")
        axes = figure.subplots()
        axes.set_facecolor("none")
        for index, curve in enumerate(chart.curves):
            _add(axes, curve, axis, index)
        _set_up(axes, chart, axis, scale, narrow=width == "narrow")
        figure.draw_without_rendering()  # lays out, so that places are known,
        figure.set_layout_engine("none")  # and stay when it is saved
        (left, bottom), (right, top) = axes.get_window_extent().get_points()
        return View(
            axis,
            scale,
            width,
            _svg(figure, name),
            (*axes.get_xlim(), _tenth(left), _tenth(right)),
            (*axes.get_ylim(), _tenth(pixels[1] - bottom), _tenth(pixels[1] - top)),
        )


def _add(axes: Axes, curve: Curve, axis: int, index: int) -> None:
    own: dict[str, Any] = {"gid": f"series-{index}"}
    x, y, joined = curve.mean.x[axis], curve.mean.y, curve.joined
    faint: dict[str, Any] = {"color": _series(index), "alpha": 0.35, "lw": 0.8, **own}
    for run in curve.runs:
        dots: dict[str, Any] = (
            {} if joined else {"linestyle": "none", "marker": ".", "markersize": 4}
        )
        axes.plot(run.x[axis], run.y, **faint, **dots)
    if curve.low is not None and curve.high is not None:
        if joined:
            band = {"color": _series(index), "alpha": 0.15, "lw": 0, **own}
            axes.fill_between(x, curve.low, curve.high, **band)
        else:
            axes.vlines(x, curve.low, curve.high, color=_series(index), lw=1.2, **own)
    every = max(1, len(y) // 5)
    axes.plot(x, y, **_look(index, joined), markevery=every, **own)


def _look(index: int, joined: bool) -> dict[str, Any]:
    return {
        "color": _series(index),
        "linestyle": DASHES[index % len(DASHES)] if joined else "none",
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 5 if joined else 7,
        "lw": 1.6,
    }


def _series(index: int) -> str:
    return f"#ab{index:04x}"


def _set_up(axes: Axes, chart: Chart, axis: int, scale: str, *, narrow: bool) -> None:
    axes.set_xlabel(str(chart.x[axis]))
    # A long name is higher than a narrow chart; it stands beside the switch, too.
    axes.set_ylabel(chart.y.unit if narrow and chart.y.unit else str(chart.y))
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    for index, level in enumerate(chart.levels):
        axes.axhline(level.y, color=INK, lw=1, ls="--", alpha=0.7)
        # Left and right in turn, as levels may be close together.
        end = (
            {"xy": (0, level.y), "xytext": (4, 4), "ha": "left"}
            if index % 2
            else {"xy": (1, level.y), "xytext": (-4, 4), "ha": "right"}
        )
        axes.annotate(
            f"{level.name} {number(level.y)}", **end, xycoords=("axes fraction", "data"),
            textcoords="offset points", fontsize=10,
        )  # fmt: skip
    axes.set_yscale(scale)
    axes.yaxis.set_major_locator(MaxNLocator(5 if narrow else 8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: number(y)))
    axes.yaxis.set_minor_locator(NullLocator())
    if chart.y_range is not None:
        low, high = chart.y_range
        axes.set_ylim(low if low > 0 or scale == "linear" else None, high)
    if chart.x[axis].logarithmic:
        axes.set_xscale("log", nonpositive="mask")
        axes.xaxis.set_minor_locator(NullLocator())
        places = {x for curve in chart.curves for x in curve.mean.x[axis] if x > 0}
        axes.xaxis.set_major_locator(
            FixedLocator(sorted(places)[:: 2 if narrow and len(places) > _FEW // 2 else 1])
            if len(places) <= _FEW
            else LogLocator(numticks=4 if narrow else 8)
        )
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4 if narrow else 8))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short(x)))


def number(value: float) -> str:
    """A figure with at most five digits, or all digits of a large one."""
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.5g}"


def _short(value: float) -> str:
    return f"{value:g}" if abs(value) < 1e4 else EngFormatter(sep="")(value)


def _svg(figure: Figure, name: str) -> str:
    """The elements of the figure, as HTML takes them, with colours and classes for the page."""
    file = io.StringIO()
    figure.savefig(
        file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    root = ElementTree.fromstring(file.getvalue())
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        _for_html(element, name)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in ("metadata", "style"):
                parent.remove(child)
    text = "".join(ElementTree.tostring(child, encoding="unicode", short_empty_elements=False)
                   for child in root)  # fmt: skip
    return re.sub(r">\s+<", "><", text).strip()


def _for_html(element: ElementTree.Element, name: str) -> None:
    """Removes the identifiers that nothing refers to, and makes the others unique on the page."""
    found = dict(element.attrib)
    element.attrib.clear()
    for key, value in found.items():
        key = key.rpartition("}")[2]
        if key == "id" and value.startswith("series-"):
            element.set("class", value)
        elif key == "id" and element.tag in ("path", "clipPath"):
            element.set("id", f"{name}-{value}")
        elif key == "href":
            element.set("href", f"#{name}-{value[1:]}")
        elif key == "clip-path":
            element.set("clip-path", value.replace("url(#", f"url(#{name}-"))
        elif key == "style":
            element.set(
                "style", _PLACEHOLDER.sub(_colour, re.sub("font-family:[^;]*;?", "", value))
            )
        elif key == "d":
            element.set("d", _path(value))
        elif key != "id":
            element.set(key, _NUMBER.sub(lambda at: f"{_tenth(float(at[0])):g}", value))


def _path(data: str) -> str:
    """A path to a tenth of a pixel, its lines relative to the point before, which are shorter."""
    if not set(re.findall("[A-Za-z]", data)) <= set("MLz"):
        return _NUMBER.sub(lambda at: f"{_tenth(float(at[0])):g}", " ".join(data.split()))
    here, parts = (0, 0), []
    for command, x, y in re.findall(r"([MLz])(?:\s+(\S+)\s+(\S+))?", data):
        if command == "z":
            parts.append("z")
            continue
        at = round(10 * float(x)), round(10 * float(y))  # whole, so that roundings do not add up
        dx, dy = (at[i] - here[i] if command == "L" else at[i] for i in (0, 1))
        parts.append(f"{'l' if command == 'L' else 'M'}{dx / 10:g} {dy / 10:g}")
        here = at
    return "".join(parts)


def _tenth(value: float) -> float:
    return round(float(value), 1)


def _colour(found: re.Match[str]) -> str:
    if found[0] == INK:
        return "currentColor"
    return f"var(--series-{int(found[1], 16) % COLOURS})"
