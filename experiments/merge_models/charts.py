"""Mean loss by the scale of each rule, and what is left of each text's gain, for the page."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.harness.charts import said
from experiments.harness.report.content import Axis, Chart, Curve, Level, Table, Trace
from experiments.harness.runs import Row
from experiments.merge_models.methods import BEFORE, MERGES


def scale_charts(
    results: Sequence[Mapping[str, Any]], rows: Sequence[Row], tasks: Sequence[str], unit: str
) -> list[Chart]:
    """Mean loss over the scale of each rule, beside what needs no scale."""
    by_name = {row["model"]: row for row in rows}
    own = statistics.fmean(by_name[task]["losses"][task] for task in tasks)
    levels = [
        *(Level(name, by_name[name]["mean_loss"]) for name in (BEFORE, "average")),
        Level("each on its own text", own),
    ]
    low, high = min(level.y for level in levels), levels[0].y
    room = 0.08 * (high - low)
    curves = [curve for rule in MERGES for curve in _curve(rule, results, by_name[rule])]
    if not curves:
        return []
    ends = {rule: by_name[rule]["mean_loss"] for rule in MERGES}
    return [
        Chart(
            f"Mean loss over the {len(tasks)} texts by the scale of each rule",
            f"At the best scale of each: {said(ends)}",
            (Axis("scale", logarithmic=True),),
            Axis(f"mean loss over the {len(tasks)} texts", unit),
            curves,
            levels,
            (low - room, high + room),
        )
    ]


def _curve(rule: str, results: Sequence[Mapping[str, Any]], row: Row) -> list[Curve]:
    scales, by_seed = results[0]["scales"], [result["mean_by_scale"][rule] for result in results]
    finite = [i for i in range(len(scales)) if all(losses[i] is not None for losses in by_seed)]
    if not finite:
        return []
    at = ([scales[i] for i in finite],)
    seeds = [
        Trace(f"seed {result['seed']}", at, [losses[i] for i in finite])
        for result, losses in zip(results, by_seed, strict=True)
    ]
    mean = [statistics.fmean(losses[i] for losses in by_seed) for i in finite]
    label = f"mean of {len(seeds)} seeds" if len(seeds) > 1 else seeds[0].label
    runs = seeds if len(seeds) > 1 else ()
    return [Curve(rule, Trace(label, at, mean), f"{row['mean_loss']:.4f}", runs=runs)]


def kept_table(rows: Sequence[Row], tasks: Sequence[str]) -> Table:
    """What is left of the gain on each text."""
    return Table(
        "What each model keeps of the gain of fine-tuning on a text alone",
        (Axis("model"), *(Axis(task, "% of the gain") for task in tasks)),
        [
            [row["model"], *(f"{100 * row['kept_by_task'][task]:.0f}" for task in tasks)]
            for row in rows
        ],
    )
