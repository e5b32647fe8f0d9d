"""Validation loss over bytes of optimizer state."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter
from matplotlib.transforms import Bbox

from experiments.harness.figures import logarithmic, style
from experiments.harness.runs import Row

LABEL_BACKGROUND = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}


def loss_by_state(rows: Sequence[Row], unit: str) -> Figure:
    """Final validation loss over bytes of state: mean of the seeds, and a bar for their range.

    The labels are annotations.
    """
    figure = Figure(figsize=(9, 5.8), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("symlog", base=2, linthresh=1, linscale=0.7)
    logarithmic(axes)
    axes.margins(0.12)
    axes.set_xlabel("bytes of optimizer state per parameter (linear below 1)")
    axes.set_ylabel(f"final validation loss ({unit})")
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.grid(alpha=0.3, which="both")
    shown = [(index, row) for index, row in enumerate(rows) if row["final_loss"] is not None]
    for index, row in shown:
        x, y = row["state_bytes_per_parameter"], row["final_loss"]
        bar = [[y - row["final_loss_low"]], [row["final_loss_high"] - y]]
        look = {**style(index), "linestyle": "none"}
        axes.errorbar(x, y, bar, capsize=3, markersize=7, zorder=3, **look)
    points = [(row["state_bytes_per_parameter"], row["final_loss"]) for _, row in shown]
    best = sorted(at for at, (_, row) in zip(points, shown) if row["best_for_its_state"])
    if best:
        axes.plot(*zip(*best), color="0.7", lw=1, drawstyle="steps-post", zorder=1)
        figure.draw_without_rendering()  # lays out, so that places are known
        _label(axes, points, [row["optimizer"] for _, row in shown])
    return figure


def _label(axes: Axes, points: Sequence[tuple[float, float]], labels: Sequence[str]) -> None:
    """Puts each label at the nearest free place around its point."""
    taken = [
        Bbox.from_extents(x - 9, y - 9, x + 9, y + 9) for x, y in axes.transData.transform(points)
    ]
    frame = axes.get_window_extent()
    directions = [(1, 0), (0, 1), (0, -1), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)]
    for point, label in zip(points, labels, strict=True):
        for distance, (right, up) in itertools.product(range(9, 200, 6), directions):
            offset = (right * distance, up * distance)
            look = {
                "textcoords": "offset points",
                "ha": ("center", "left", "right")[right],
                "va": ("center", "bottom", "top")[up],
                "fontsize": 9,
            }
            text = axes.annotate(label, point, offset, **look, bbox=LABEL_BACKGROUND)
            box = text.get_window_extent().padded(2)
            inside = frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1)
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                if distance > 15:
                    line = {"arrowstyle": "-", "color": "0.6", "lw": 0.6}
                    axes.annotate("", point, offset, **look, arrowprops=line)
                break
            text.remove()
