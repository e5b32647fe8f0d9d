"""The table of a shape: time and memory beside the plain form's."""

from __future__ import annotations

import statistics
from typing import Any

from experiments.bench_cross_entropy.methods import BASE

HEADER = ("code", "pass", "seconds", "time / plain", "temporary MB", "part of plain's")
PASSES = ("forward", "gradient")


def ratio(base: dict[str, Any], run: dict[str, Any]) -> float:
    """The time of `run` as a multiple of `base`'s: the median of the ratios within a round."""
    pairs = zip(run["seconds"], base["seconds"])
    return statistics.median(ours / theirs for ours, theirs in pairs)


def part(base: dict[str, Any], run: dict[str, Any]) -> str:
    """Temporary memory as a part of `base`'s, or as a multiple."""
    times = base["temporary_bytes"] / max(1, run["temporary_bytes"])
    return f"1/{times:.0f}" if times >= 2 else f"{1 / max(times, 1e-9):.1f}"


def rows(measured: dict[str, Any]) -> list[list[str]]:
    """One line a contender and pass."""
    lines = []
    base = measured["results"][BASE]
    for name, result in measured["results"].items():
        for which in PASSES:
            run = result[which]
            lines.append(
                [
                    name,
                    which,
                    f"{statistics.median(run['seconds']):.3g}",
                    f"{ratio(base[which], run):.2f}",
                    f"{run['temporary_bytes'] / 1e6:.1f}",
                    part(base[which], run),
                ]
            )
    return lines
