"""What an experiment reports: the data, a table on the terminal, a page."""

from __future__ import annotations

from experiments.harness.report.data import Report
from experiments.harness.report.page import html
from experiments.harness.report.terminal import terminal_table

__all__ = ["Report", "html", "terminal_table"]
