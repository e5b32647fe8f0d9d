"""Prints tables of what was tested: a test records title, row and column of its cell."""

from __future__ import annotations

from typing import Any

_MARKS = {"passed": "ok", "failed": "FAILED", "skipped": "skipped"}


def pytest_terminal_summary(terminalreporter: Any) -> None:
    tables: dict[str, dict[str, dict[str, str]]] = {}
    for outcome, mark in _MARKS.items():
        for report in terminalreporter.getreports(outcome):
            for name, value in getattr(report, "user_properties", ()):
                if name == "cell" and report.when == "call":
                    title, row, column = value
                    tables.setdefault(title, {}).setdefault(row, {})[column] = mark
    for title, rows in tables.items():
        terminalreporter.section(title)
        columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
        width = max(map(len, rows))
        terminalreporter.write_line(" ".join(["".ljust(width), *(f"{c:>15}" for c in columns)]))
        for row, cells in sorted(rows.items()):
            marks = (f"{cells.get(column, '-'):>15}" for column in columns)
            terminalreporter.write_line(" ".join([row.ljust(width), *marks]))
