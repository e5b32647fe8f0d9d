"""The table of the schedules, and what is kept of their curves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.plot_schedules.study import META_RATE

HEADER = ("schedule", "first", "highest", "half way", "last", "mean / highest")
SHOWN = 50  # values of each curve that are kept


def table(panels: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line for each schedule."""
    return [row(name, rates) for found in panels.values() for name, rates in found.items()]


def row(name: str, rates: Any) -> dict[str, Any]:
    """One row of the table; only the first entry is no number."""
    return {
        "schedule": name,
        "first": float(rates[0]),
        "highest": float(rates.max()),
        "half_way": float(rates[len(rates) // 2]),
        "last": float(rates[-1]),
        "mean_over_highest": float(rates.mean() / rates.max()),
    }


def row_cells(row: Mapping[str, Any]) -> list[str]:
    """One row of the table as text, under `HEADER`."""
    name, *figures = row.values()
    return [name, *(f"{value:.3f}" for value in figures)]


def record(panels: Mapping[str, Mapping[str, Any]], norms: Any) -> dict[str, Any]:
    """What is kept: the table, and some values of every curve."""
    steps = len(norms)
    every = max(steps // SHOWN, 1)
    return {
        "steps": steps,
        "meta_rate": META_RATE,
        "table": table(panels),
        "updates_shown": list(range(0, steps, every)),
        "gradient_norms": _rounded(norms[::every]),
        "rates": {
            panel: {name: _rounded(rates[::every]) for name, rates in found.items()}
            for panel, found in panels.items()
        },
    }


def _rounded(values: Any) -> list[float]:
    return [float(f"{value:.6g}") for value in values]
