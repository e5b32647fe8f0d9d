"""The charts of the report page that several questions have, from the runs alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from experiments.harness.report.content import Axis, Chart, Curve, Level, Trace
from experiments.harness.runs import Row, Run, best_runs, final_loss, finished, loss_text

Places = Callable[[Row, Sequence[int]], Sequence[Sequence[float]]]
STEPS = Axis("steps")
BEST = "at the best learning rate: mean of the seeds, their range shaded, all other runs faint"


def loss_charts(
    runs: Mapping[str, Sequence[Run]],
    rows: Sequence[Row],
    unit: str,
    target: float | None = None,
) -> list[Chart]:
    """Validation loss over steps or over seconds of training; none where all runs diverged."""

    def places(row: Row, steps: Sequence[int]) -> Sequence[Sequence[float]]:
        return steps, [step * row["seconds_per_step"] for step in steps]

    axes = STEPS, Axis("training time", "s")
    loss = Axis("validation loss", unit)
    levels = () if target is None else (Level("target", target),)
    return course(f"Validation loss {BEST}", runs, rows, axes, loss, places, levels=levels)


def course(
    caption: str,
    runs: Mapping[str, Sequence[Run]],
    rows: Sequence[Row],
    axes: Sequence[Axis],
    loss: Axis,
    places: Places,
    *,
    key: str = "validation_loss",
    levels: Sequence[Level] = (),
) -> list[Chart]:
    """A loss in the course of training, without the fall at the start; none where all diverged.

    Args:
      caption: what is drawn.
      runs: of each contender.
      rows: its line of the table.
      axes: the horizontal axes.
      loss: the vertical axis.
      places: (row, steps) -> the places of these steps on each of the axes.
      key: of the losses in a run.
      levels: values to compare with.
    """
    curves, ends = [], {}
    for row in rows:
        found, name = runs[row["optimizer"]], row["optimizer"]
        best = finished(best_runs(found))
        if not best:
            continue
        losses = np.array([run[key] for run in best])
        ends[name] = float(losses.mean(0)[-1])
        result = loss_text(row) if key == "validation_loss" else f"{ends[name]:.4f}"
        at = places(row, best[0]["steps"])
        mean = Trace(_mean_label(best), at, losses.mean(0).tolist())
        low = high = None
        if len(best) > 1:
            low, high = losses.min(0).tolist(), losses.max(0).tolist()
        others = [run for run in found if len(best) > 1 or run is not best[0]]
        faint = [trace for run in others for trace in _trace(run, key, places, row)]
        curves.append(Curve(name, mean, result, low, high, faint))
    if not curves:
        return []
    shown = [curve.mean.y for curve in curves] + [curve.high for curve in curves if curve.high]
    values = [level.y for level in levels]
    lowest = min([min(y) for y in shown] + values)
    highest = max([max(y[len(y) // 5 :]) for y in shown] + values)
    room = 0.04 * (highest - lowest) or 0.04 * abs(highest)
    result = said(ends, {row["optimizer"] for row in rows} - ends.keys())
    y_range = (lowest - room, highest + room)
    return [Chart(caption, result, axes, loss, curves, levels, y_range)]


def rate_charts(runs: Mapping[str, Sequence[Run]], rows: Sequence[Row], unit: str) -> list[Chart]:
    """Final validation loss of every rate of the search; none where all runs diverged."""
    curves, best = [], []
    for row in rows:
        name = row["optimizer"]
        search = [run for run in runs[name] if run["seed"] == 0]
        search.sort(key=lambda run: run["learning_rate"])
        ended = finished(search)
        lost = [f"{r['learning_rate']:g}" for r in search if r["status"] != "finished"]
        if ended:
            rates = [run["learning_rate"] for run in ended]
            mean = Trace("seed 0", (rates,), [final_loss(run) for run in ended])
            result = f"diverged at {', '.join(lost)}" if lost else ""
            curves.append(Curve(name, mean, result))
            best.append(f"{name} {row['learning_rate']:g}")
    if not curves:
        return []
    return [
        Chart(
            "Search of the learning rate",
            f"The lowest loss is at: {', '.join(best)}.",
            (Axis("peak learning rate", logarithmic=True),),
            Axis("final validation loss, seed 0", unit),
            curves,
        )
    ]


def said(ends: Mapping[str, float], diverged: Iterable[str] = ()) -> str:
    """Which curve ends lowest, which highest, and what diverged, in sentences."""
    low, high = min(ends, key=ends.__getitem__), max(ends, key=ends.__getitem__)
    text = f"{low} ends lowest at {ends[low]:.4f}"
    if high != low:
        text += f", {high} highest at {ends[high]:.4f}"
    lost = ", ".join(sorted(diverged))
    return f"{text}. Diverged: {lost}." if lost else f"{text}."


def _mean_label(best: Sequence[Run]) -> str:
    rate = f"rate {best[0]['learning_rate']:g}"
    return (
        f"{rate}, mean of {len(best)} seeds" if len(best) > 1 else f"{rate}, seed {best[0]['seed']}"
    )


def _trace(run: Run, key: str, places: Places, row: Row) -> list[Trace]:
    """The run up to where it diverged, if it got past the start."""
    losses = run[key]
    length = losses.index(None) if None in losses else len(losses)
    if length < 2:
        return []
    label = f"rate {run['learning_rate']:g}, seed {run['seed']}"
    return [Trace(label, places(row, run["steps"][:length]), losses[:length])]
