"""Table, sentences and picture of merging, from the stored results alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.parts.figures import png, style
from experiments.parts.merging import BEFORE, MERGES, TOGETHER

Row = dict[str, Any]


def table(results: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> list[Row]:
    """One line for each model, means over the seeds.

    `kept` is the part of the gain that is left: how far the model's loss on a text lies from the
    pre-trained one's towards that of the model fine-tuned on this text, mean over the texts.
    """
    return [_row(model, results, tasks) for model in results[0]["losses"]]


def _row(model: str, results: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> Row:
    losses = [result["losses"][model] for result in results]
    means = [statistics.fmean(of_seed[task] for task in tasks) for of_seed in losses]
    kept = [_kept(result["losses"], model, tasks) for result in results]
    scales = [result["chosen"][model] for result in results if model in result["chosen"]]
    return {
        "model": model,
        "scales": scales,
        "losses": {name: statistics.fmean(x[name] for x in losses) for name in (*tasks, BEFORE)},
        "mean_loss": statistics.fmean(means),
        "mean_loss_spread": statistics.stdev(means) if len(means) > 1 else None,
        "kept_by_task": {
            task: statistics.fmean(of_seed[task] for of_seed in kept) for task in tasks
        },
        "kept": statistics.fmean(statistics.fmean(of_seed.values()) for of_seed in kept),
    }


def _kept(
    losses: Mapping[str, Mapping[str, float]], model: str, tasks: Sequence[str]
) -> dict[str, float]:
    found = {}
    for task in tasks:
        before, own = losses[BEFORE][task], losses[task][task]
        found[task] = (before - losses[model][task]) / (before - own)
    return found


def verdict(rows: Sequence[Row], tasks: Sequence[str]) -> list[str]:
    """What the table says, in sentences."""
    by_name = {row["model"]: row for row in rows}
    average, together = by_name["average"], by_name[TOGETHER]
    merged = [by_name[rule] for rule in ("average", *MERGES)]
    best = min(merged, key=lambda row: row["mean_loss"])
    single = min((by_name[task] for task in tasks), key=lambda row: row["mean_loss"])
    lines = [
        f"Of the merged models {best['model']} has the lowest mean loss over the {len(tasks)} "
        f"texts: {loss_text(best)}, which keeps {best['kept']:.0%} of what fine-tuning on each "
        f"text alone gains; the plain average is at {loss_text(average)} ({average['kept']:.0%}).",
        f"The best single fine-tuned model, that of {single['model']}, has a mean loss of "
        f"{loss_text(single)}; one model trained on all texts, with as many steps as all "
        f"of them, has {loss_text(together)} ({together['kept']:.0%}).",
    ]
    beaten = [row["model"] for row in merged if row["mean_loss"] > single["mean_loss"]]
    if beaten:
        lines.append(f"Not better than the best single model: {', '.join(beaten)}.")
    worse = [
        row["model"]
        for row in merged[1:]
        if row["mean_loss"] > average["mean_loss"] + (average["mean_loss_spread"] or 0)
    ]
    if worse:
        lines.append(f"Worse than the plain average: {', '.join(worse)}.")
    before, forgets = by_name[BEFORE]["losses"][BEFORE], best["losses"][BEFORE]
    lines.append(
        f"On the text of the pre-training {best['model']} is at {forgets:.4f}, the pre-trained "
        f"model at {before:.4f}."
    )
    return lines


def loss_text(row: Row) -> str:
    """Mean loss and spread over seeds."""
    spread = row["mean_loss_spread"]
    return f"{row['mean_loss']:.4f}" + ("" if spread is None else f" ± {spread:.4f}")


def picture(
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
