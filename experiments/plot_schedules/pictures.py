"""Six panels of learning rates over a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.harness.figures import LINES, style


def figure(panels: dict[str, dict[str, Any]], norms: Any) -> Figure:
    """Six panels; the names stand in a legend each."""
    drawn = Figure(figsize=(14, 9), layout="constrained")
    grid = drawn.subplots(2, 3).ravel()
    for axes, (panel, found) in zip(grid, panels.items(), strict=True):
        for index, (name, rates) in enumerate(found.items()):
            look = {**style(index), "marker": "", "linestyle": LINES[index % len(LINES)]}
            axes.plot(rates, label=name, lw=0.8 if "not smoothed" in name else 1.6, **look)
        axes.set_title(panel, fontsize=11)
        axes.set_xlabel("update")
        axes.grid(alpha=0.3)
        axes.set_xlim(0, len(norms) - 1)
        axes.set_ylim(0, 1.05)
    for axes in grid[::3]:
        axes.set_ylabel("learning rate / peak")
    _finish(grid, norms)
    for axes in grid:
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.15), "ncols": 2}
        axes.legend(fontsize=9, frameon=False, **below)
    return drawn


def _finish(grid: Sequence[Axes], norms: Any) -> None:
    """The norms behind the refined schedules, and a logarithmic axis for rates of any size."""
    refined, adaptive = grid[4], grid[5]
    refined.plot(norms / norms.max(), color="0.75", lw=0.8, zorder=0, label="gradient norm / max.")
    adaptive.set_yscale("log")
    adaptive.autoscale(axis="y")
    adaptive.set_ylabel("learning rate")
