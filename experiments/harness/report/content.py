"""What a report says, as plain data: sections of text, tables and charts.

`page.html` makes HTML of it. Nothing here knows how anything looks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Axis:
    """A quantity with its unit.

    Attributes:
      name: what is measured, as "validation loss".
      unit: of its values; empty for counts.
      logarithmic: whether a chart spaces it so. Of the vertical axis the reader decides.
    """

    name: str
    unit: str = ""
    logarithmic: bool = False

    def __str__(self) -> str:
        return f"{self.name} ({self.unit})" if self.unit else self.name


@dataclass(frozen=True)
class Trace:
    """The points of one line.

    Attributes:
      label: what it is beside its curve's name, as "rate 0.006, seed 1".
      x: for each horizontal axis of the chart, the places of the points; increasing.
      y: their values; finite.
    """

    label: str
    x: Sequence[Sequence[float]]
    y: Sequence[float]

    def __post_init__(self):
        if any(len(places) != len(self.y) for places in self.x) or not len(self.y):
            lengths = [len(places) for places in self.x]
            raise ValueError(f"{self.label}: {len(self.y)} values at {lengths} places")
        if not all(map(math.isfinite, (*self.y, *(at for places in self.x for at in places)))):
            raise ValueError(f"{self.label}: expected finite numbers")


@dataclass(frozen=True)
class Curve:
    """What one contender did.

    Attributes:
      name: in the legend.
      mean: the line that stands for it.
      result: its outcome beside the name in the legend, as "1.7004 ± 0.0032".
      low: lower ends of the range of `mean.y`, if there is one.
      high: upper ends.
      runs: the lines that are faint.
      joined: False where the points are no course of one thing.
    """

    name: str
    mean: Trace
    result: str = ""
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    runs: Sequence[Trace] = ()
    joined: bool = True


@dataclass(frozen=True)
class Level:
    """A value to compare with, drawn across the chart."""

    name: str
    y: float


@dataclass(frozen=True)
class Chart:
    """Curves over one of several horizontal axes.

    Attributes:
      caption: what is drawn.
      result: what it shows, in a sentence that also a reader who does not see it can use.
      x: the horizontal axes to choose from; the first one is shown first.
      y: the vertical axis.
      curves: at least one.
      levels: values to compare with.
      y_range: the part of the vertical axis that is shown, where not all.
    """

    caption: str
    result: str
    x: Sequence[Axis]
    y: Axis
    curves: Sequence[Curve]
    levels: Sequence[Level] = ()
    y_range: tuple[float, float] | None = None

    def __post_init__(self):
        if not self.curves:
            raise ValueError(f"{self.caption}: expected at least one curve")
        for curve in self.curves:
            for trace in (curve.mean, *curve.runs):
                if len(trace.x) != len(self.x):
                    raise ValueError(
                        f"{self.caption}: {curve.name}, {trace.label}: expected places on "
                        f"{len(self.x)} axes, got {len(trace.x)}"
                    )


@dataclass(frozen=True)
class Table:
    """Rows of text under columns with units; the first column names the row."""

    caption: str
    columns: Sequence[Axis]
    rows: Sequence[Sequence[str]]

    def __post_init__(self):
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"{self.caption}: expected {len(self.columns)} cells, got {list(row)}"
                )


@dataclass(frozen=True)
class Section:
    """A heading, and below it paragraphs, tables and charts in this order."""

    heading: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
      title: heading and title.
      verdict: the sentences that answer the question.
      sections: in the order of the page.
      data: file beside the page -> what is in it.
      record: settings, versions and device, shown as JSON.
    """

    title: str
    verdict: Sequence[str]
    sections: Sequence[Section]
    data: Mapping[str, str] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
