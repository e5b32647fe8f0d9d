"""PNG pictures of runs, drawn from the results alone."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, MaxNLocator, NullLocator

from experiments.harness.runs import Run, best_runs, final_loss, finished, loss_text

# Okabe and Ito's colours, told apart with every kind of colour vision, and a grey.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2", "#888888")
MARKERS = "osD^vPX*<>ph"
LINES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))


def style(index: int) -> dict[str, Any]:
    """Colour, dash and marker of the contender number `index`."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": LINES[index % len(LINES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def loss_curves(
    runs: Mapping[str, Sequence[Run]],
    rows: Sequence[Mapping[str, Any]],
    target: float | None,
    unit: str,
) -> bytes:
    """Validation loss over steps and over seconds: mean of the seeds, and their range shaded."""
    figure = Figure(figsize=(12, 5.8), layout="constrained")
    by_step, by_second = figure.subplots(1, 2, sharey=True)
    for index, row in enumerate(rows):
        shown = finished(best_runs(runs[row["optimizer"]]))
        if not shown:
            continue
        losses = np.array([run["validation_loss"] for run in shown])
        steps = np.array(shown[0]["steps"])
        label = f"{row['optimizer']}: {loss_text(row)}"
        for axes, x in ((by_step, steps), (by_second, steps * row["seconds_per_step"])):
            axes.plot(x, losses.mean(0), **style(index), markersize=4, markevery=4, label=label)
            colour = style(index)["color"]
            axes.fill_between(x, losses.min(0), losses.max(0), color=colour, alpha=0.2, lw=0)
    for axes, title in ((by_step, "steps"), (by_second, "training time (seconds)")):
        axes.set_xlabel(title)
        axes.grid(alpha=0.3, which="both")
        if target is not None:
            axes.axhline(target, color="0.4", lw=1)
            axes.annotate(f"target {target:.3f}", (0, target), (4, -11), textcoords="offset points")
    logarithmic(by_step)
    by_step.set_ylabel(f"validation loss ({unit})")
    _cut_start(by_step, runs)
    handles, labels = by_step.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        title="final validation loss, mean ± standard deviation over seeds",
        loc="outside lower center",
        ncols=4,
    )
    return png(figure)


def rate_search(
    runs: Mapping[str, Sequence[Run]], rows: Sequence[Mapping[str, Any]], unit: str
) -> bytes:
    """Final validation loss of every rate of the search; a cross at the top is a diverged run."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    for index, row in enumerate(rows):
        search = sorted(
            (run for run in runs[row["optimizer"]] if run["seed"] == 0),
            key=lambda run: run["learning_rate"],
        )
        finite = finished(search)
        axes.plot(
            [run["learning_rate"] for run in finite],
            [final_loss(run) for run in finite],
            **style(index),
            label=row["optimizer"],
        )
        diverged = [run["learning_rate"] for run in search if run["status"] == "diverged"]
        axes.plot(
            diverged, [0.98] * len(diverged), "x", color=style(index)["color"], markersize=9,
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip
    axes.set_xscale("log")
    logarithmic(axes)
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel(f"final validation loss, seed 0 ({unit})")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=9)
    return png(figure)


def logarithmic(axes: Axes) -> None:
    """A logarithmic loss axis with round numbers also where it spans less than a decade."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(MaxNLocator(8))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_locator(NullLocator())


def _cut_start(axes: Axes, runs: Mapping[str, Sequence[Run]]) -> None:
    """Leaves out the fall from the untrained loss, which would flatten all differences."""
    curves = [run["validation_loss"] for found in runs.values() for run in best_runs(found)]
    finished = [curve for curve in curves if None not in curve]
    if finished:
        low = min(min(curve) for curve in finished)
        high = max(curve[len(curve) // 5] for curve in finished)
        axes.set_ylim(low / 1.03, high * 1.03)
