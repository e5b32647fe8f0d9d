"""Ratios of the steps, between refreshes and on average over a period."""

from __future__ import annotations

import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.bench_update.methods import GAP, RATIOS

GALORE_GAPS = (10, 50, GAP)


def ratio(runs: dict[str, Any], name: str) -> float | None:
    """The median over rounds of the ratio of two steps between refreshes."""
    base = RATIOS.get(name)
    if base is None or base not in runs:
        return None
    pairs = zip(runs[name]["seconds"], runs[base]["seconds"])
    return statistics.median(ours / theirs for ours, theirs in pairs)


def average_seconds(run: dict[str, Any], gap: int = GAP) -> float:
    """A step's time on average over a period between two refreshes."""
    ordinary = statistics.median(run["seconds"])
    if not run["refresh_seconds"]:
        return ordinary
    return ordinary + (statistics.median(run["refresh_seconds"]) - ordinary) / gap


def average_ratio(runs: dict[str, Any], name: str, gap: int = GAP) -> float | None:
    base = RATIOS.get(name)
    if base is None or base not in runs or not runs[name]["refresh_seconds"]:
        return None
    return average_seconds(runs[name], gap) / average_seconds(runs[base], gap)


def galore_ratios(runs: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The average ratios of GaLore by gap: the steps are the same, the refreshes more or fewer."""
    return {
        name: {str(gap): found for gap in GALORE_GAPS if (found := average_ratio(runs, name, gap))}
        for name in runs
        if name.startswith("galore") and RATIOS[name] in runs
    }


def show(runs: dict[str, Any], console: Console) -> None:
    """Prints the tables."""
    table = Table("optimizer", "median ms", "ratio", "on average", "to", "temporary MB", "copies")
    for name, run in runs.items():
        found = ratio(runs, name)
        table.add_row(
            name,
            f"{1e3 * statistics.median(run['seconds']):.1f}",
            "" if found is None else f"{found:.2f}",
            "" if (average := average_ratio(runs, name)) is None else f"{average:.2f}",
            "" if found is None else RATIOS[name],
            f"{run['temporary_bytes'] / 1e6:.1f}",
            str(run["copies"]),
        )
    console.print(table)
    galore = galore_ratios(runs)
    if galore:
        by_gap = Table("of optax.contrib.galore", *(f"gap {gap}" for gap in GALORE_GAPS))
        for name, ratios in galore.items():
            by_gap.add_row(name, *(f"{found:.2f}" for found in ratios.values()))
        console.print(by_gap)


def record(runs: dict[str, Any]) -> dict[str, Any]:
    """What is kept of the runs."""
    ratios, averages = (
        {name: found for name in runs if (found := of(runs, name)) is not None}
        for of in (ratio, average_ratio)
    )
    return {
        "ratios": ratios,
        "average_ratios": averages,
        "galore_ratios_by_gap": galore_ratios(runs),
        "update_gap": GAP,
        "runs": runs,
    }
