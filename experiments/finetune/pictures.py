"""Losses over steps on both texts, and LoRA beside LoRA-GA at equal rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.harness.figures import COLOURS, png, style
from experiments.harness.runs import Row, Run, best_runs, finished

NINTH = "#8B5A2B"


def curves(
    runs: Mapping[str, Sequence[Run]],
    rows: Sequence[Row],
    before: tuple[float, float],
    unit: str,
) -> bytes:
    """Losses on both texts over steps: mean of the seeds, their range shaded, names at the ends."""
    figure = Figure(figsize=(12, 5.6), layout="constrained")
    new, first = figure.subplots(1, 2)
    for axes, key in ((new, "validation_loss"), (first, "first_loss")):
        ends = []
        for index, row in enumerate(rows):
            name = row["optimizer"]
            shown = finished(best_runs(runs[name]))
            if not shown:
                continue
            losses, steps = np.array([run[key] for run in shown]), np.array(shown[0]["steps"])
            look = _look(index)
            axes.plot(steps, losses.mean(0), **look, lw=1.8)
            axes.fill_between(
                steps, losses.min(0), losses.max(0), color=look["color"], alpha=0.15, lw=0
            )
            ends.append((float(losses.mean(0)[-1]), f"{name} {losses.mean(0)[-1]:.3f}", look))
        axes.set_xlabel("steps")
        axes.grid(alpha=0.3)
        if axes is new:
            _cut(axes, runs)
        if ends:
            _name_ends(axes, ends, runs[rows[0]["optimizer"]][0]["steps"][-1])
    new.set_ylabel(f"validation loss ({unit})")
    new.set_title("the new text")
    first.set_title("the first text, which is no longer trained on")
    first.axhline(before[1], color="0.5", lw=1)
    first.annotate(
        f"before {before[1]:.3f}", (0, before[1]), (4, 4), textcoords="offset points", color="0.4"
    )
    return png(figure)


def shared_rates(same_rate: Sequence[Row], claim: float, unit: str) -> bytes:
    """LoRA and LoRA-GA at equal rates: where they end, and LoRA-GA's part of LoRA's steps."""
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    losses, parts = figure.subplots(1, 2)
    rates = [row["learning_rate"] for row in same_rate]
    for index, (name, key) in enumerate((("lora", "lora_final_loss"), ("lora-ga", "final_loss"))):
        y = [row[key] for row in same_rate]
        losses.plot(rates, y, **style(index + 1), label=name)
    losses.legend()
    losses.set_ylabel(f"final validation loss, seed 0 ({unit})")
    reached = [row for row in same_rate if row["part_of_lora"] is not None]
    parts.plot(
        [row["learning_rate"] for row in reached],
        [row["part_of_lora"] for row in reached],
        **style(2),
    )
    for row in reached:
        at = row["learning_rate"], row["part_of_lora"]
        parts.annotate(f"{at[1]:.0%}", at, (0, 8), textcoords="offset points", ha="center")
    for row in same_rate:
        if row["part_of_lora"] is None:
            parts.annotate("never", (row["learning_rate"], 1), (0, 4), ha="center",
                           textcoords="offset points", color=style(2)["color"])  # fmt: skip
    for level, text in ((1.0, "as many steps as LoRA"), (claim, f"{claim:.0%} of them")):
        parts.axhline(level, color="0.5", lw=1, linestyle="-" if level == 1 else "--")
        parts.annotate(text, (0.02, level), (0, 4), xycoords=("axes fraction", "data"),
                       textcoords="offset points", color="0.3", fontsize=9)  # fmt: skip
    parts.set_ylim(0, 1.15)
    parts.set_ylabel("part of LoRA's steps to LoRA's final loss")
    for axes in (losses, parts):
        axes.set_xscale("log")
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.minorticks_off()
        axes.set_xlabel("peak learning rate of both")
        axes.grid(alpha=0.3, which="both")
    if rates:
        parts.set_xlim(losses.get_xlim())
    return png(figure)


def _look(index: int) -> dict[str, Any]:
    """Colour and dash of a method; the ninth would have the first one's colour."""
    return {**style(index), "marker": "", **({"color": NINTH} if index == len(COLOURS) else {})}


def _name_ends(axes: Axes, ends: Sequence[tuple[float, str, Mapping[str, Any]]], last: int) -> None:
    """Writes each name beside the end of its curve, moved apart where curves end together."""
    low, high = axes.get_ylim()
    apart = 0.042 * (high - low)
    ordered = sorted(ends, key=lambda end: end[0])
    places = spread([end[0] for end in ordered], apart, low + apart, high - apart)
    for (loss, text, look), place in zip(ordered, places, strict=True):
        line = {"color": look["color"], "lw": 0.8, "clip_on": False}
        axes.plot([last, 1.03 * last], [loss, place], **line)
        axes.text(1.04 * last, place, text, va="center", color=look["color"], fontsize=9)
    axes.set_xlim(0, last)
    axes.set_ylim(low, high)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def spread(values: Sequence[float], apart: float, low: float, high: float) -> list[float]:
    """The nearest places to increasing `values` that are at least `apart` from each other."""
    # Neighbours that are too near become one group, evenly spaced around the mean of its values.
    groups: list[list[float]] = []
    for value in values:
        groups.append([value])
        while len(groups) > 1 and _top(groups[-2], apart) + apart > _bottom(groups[-1], apart):
            groups[-2:] = [groups[-2] + groups[-1]]
    places = [_bottom(group, apart) + i * apart for group in groups for i in range(len(group))]
    if places and len(places) * apart <= high - low + apart:
        places[0] = max(places[0], low)
        for i in range(1, len(places)):
            places[i] = max(places[i], places[i - 1] + apart)
        places[-1] = min(places[-1], high)
        for i in range(len(places) - 2, -1, -1):
            places[i] = min(places[i], places[i + 1] - apart)
    return places


def _bottom(group: Sequence[float], apart: float) -> float:
    return sum(group) / len(group) - (len(group) - 1) * apart / 2


def _top(group: Sequence[float], apart: float) -> float:
    return _bottom(group, apart) + (len(group) - 1) * apart


def _cut(axes: Axes, runs: Mapping[str, Sequence[Run]]) -> None:
    """Leaves out the fall from the pre-trained loss, which would flatten all differences."""
    shown = [run for found in runs.values() for run in finished(best_runs(found))]
    curves = [run["validation_loss"] for run in shown]
    if curves:
        low = min(min(curve) for curve in curves)
        high = max(max(curve[len(curve) // 8 :]) for curve in curves)
        axes.set_ylim(low - 0.08 * (high - low), high)
