"""Mean loss by the scale of each rule, and what is left of each text's gain."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.harness.figures import png, style
from experiments.harness.runs import Row
from experiments.merge_models.methods import BEFORE, MERGES


def merged(
    results: Sequence[Mapping[str, Any]], rows: Sequence[Row], tasks: Sequence[str], unit: str
) -> bytes:
    """Mean loss over the scale of each rule, and what is left of the gain on each text."""
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    by_scale, kept = figure.subplots(1, 2)
    by_name = {row["model"]: row for row in rows}
    levels = [
        (BEFORE, by_name[BEFORE]["mean_loss"]),
        ("average", by_name["average"]["mean_loss"]),
        ("each on its own text", statistics.fmean(by_name[t]["losses"][t] for t in tasks)),
    ]
    scales = np.array(results[0]["scales"])
    low, high = min(level for _, level in levels), levels[0][1]
    for index, rule in enumerate(MERGES):
        found = [[np.nan if x is None else x for x in r["mean_by_scale"][rule]] for r in results]
        mean = np.mean(found, 0)
        by_scale.plot(scales, mean, **style(index + 1), markersize=4, label=rule)
    by_scale.set_xscale("log")
    by_scale.set_xticks(scales, [f"{scale:g}" for scale in scales], minor=False)
    by_scale.minorticks_off()
    by_scale.set_xlabel("scale")
    by_scale.set_ylabel(f"mean loss over the {len(tasks)} texts ({unit})")
    by_scale.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))
    for text, level in levels:
        by_scale.axhline(level, color="0.5", lw=1)
        by_scale.annotate(
            text, (1, level), (4, 0), xycoords=("axes fraction", "data"), va="center",
            textcoords="offset points", color="0.3", fontsize=9, annotation_clip=False,
        )  # fmt: skip
    by_scale.grid(alpha=0.3)
    figure.legend(
        *by_scale.get_legend_handles_labels(), loc="outside lower left", ncols=3, fontsize=9
    )
    names = [row["model"] for row in rows if row["model"] not in (BEFORE, *tasks)]
    for index, task in enumerate(tasks):
        values = [by_name[name]["kept_by_task"][task] for name in names]
        look = {**style(index), "linestyle": "none"}
        places = np.arange(len(names)) + 0.14 * (index - (len(tasks) - 1) / 2)
        kept.plot(values, places, **look, markersize=7, label=task)
    kept.set_yticks(range(len(names)), names)
    kept.invert_yaxis()
    kept.axvline(0, color="0.5", lw=1)
    kept.axvline(1, color="0.5", lw=1)
    kept.set_xlabel("part of the gain of fine-tuning on the text alone")
    kept.grid(alpha=0.3, axis="x")
    figure.legend(
        *kept.get_legend_handles_labels(), loc="outside lower right", ncols=4, title="text",
        fontsize=9,
    )  # fmt: skip
    return png(figure)
