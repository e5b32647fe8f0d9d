"""What is reported, before it is a table, a page or a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of an experiment.

    Attributes:
      title: heading.
      unit: of the losses.
      verdict: what the table says, in sentences.
      header: names of the columns.
      cells: the lines of the table.
      method: paragraphs on how the figures were measured.
      pictures: name of a file -> its caption and PNG.
      record: settings beside those of the experiment, shown on the page and kept.
      results: what else is kept.
    """

    title: str
    unit: str
    verdict: Sequence[str]
    header: Sequence[str]
    cells: Sequence[Sequence[str]]
    method: Sequence[str]
    pictures: Mapping[str, tuple[str, bytes]]
    record: Mapping[str, Any]
    results: Mapping[str, Any]
