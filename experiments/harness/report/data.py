"""What is reported, before it is a table on the terminal, a page or a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.harness.report.content import Axis, Chart, Page, Section, Table


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of an experiment.

    Attributes:
      title: heading.
      unit: of the losses.
      verdict: what the table says, in sentences.
      caption: what the table holds, with budget and seeds.
      header: names of the columns.
      units: of the columns whose name does not say it.
      cells: the lines of the table.
      calls: contender -> how it is made, in full.
      method: paragraphs on how the figures were measured.
      charts: what the page draws.
      pictures: name of a file -> PNG.
      record: settings beside those of the experiment, shown on the page and kept.
      results: what else is kept.
      tables: what the page has beside the table.
    """

    title: str
    unit: str
    verdict: Sequence[str]
    caption: str
    header: Sequence[str]
    units: Mapping[str, str]
    cells: Sequence[Sequence[str]]
    calls: Mapping[str, str]
    method: Sequence[str]
    charts: Sequence[Chart]
    pictures: Mapping[str, bytes]
    record: Mapping[str, Any]
    results: Mapping[str, Any]
    tables: Sequence[Table] = ()

    def page(self, record: Mapping[str, Any]) -> Page:
        """The page of it; `record` is what it shows as settings."""
        columns = [Axis(name, self.units.get(name, "")) for name in self.header]
        calls = Table(
            "Full calls with every default; learning_rate is the schedule, whose peak is the rate",
            (Axis(self.header[0]), Axis("call")),
            list(self.calls.items()),
        )
        return Page(
            self.title,
            self.verdict,
            (
                Section(
                    "Results",
                    tables=(Table(self.caption, columns, self.cells), *self.tables),
                    charts=self.charts,
                ),
                Section("What was compared", tables=(calls,)),
                Section("How it was measured", self.method),
            ),
            {
                "results.json": "the table, every run, settings and versions",
                **dict.fromkeys(self.pictures, "picture"),
            },
            record,
        )
