"""A table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table


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
