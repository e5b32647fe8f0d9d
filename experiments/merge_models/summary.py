"""What merging keeps: a table and sentences, from the stored results alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.harness.report import Report
from experiments.harness.runs import Row
from experiments.merge_models.charts import kept_table, scale_charts
from experiments.merge_models.methods import BEFORE, MERGES, SCALES, TOGETHER
from experiments.merge_models.pictures import merged
from experiments.merge_models.study import MergeStudy


def report(study: MergeStudy, results: Sequence[Mapping[str, Any]]) -> Report:
    """The outcome."""
    unit, tasks = study.first.loss_unit, list(study.tasks)
    rows = table(results, tasks)
    return Report(
        title="Merged models",
        unit=unit,
        verdict=verdict(rows, tasks),
        caption=f"Losses of each model on {len(tasks)} texts and that of the pre-training; seeds: "
        f"{study.seeds}",
        header=header(tasks),
        units=dict.fromkeys((*tasks, "mean of these", "text of the pre-training"), unit),
        cells=[row_cells(row) for row in rows],
        calls={"each text": study.call(), **{name: text for name, (_, text) in MERGES.items()}},
        method=_method(study),
        charts=scale_charts(results, rows, tasks, unit),
        tables=[kept_table(rows, tasks)],
        pictures={"merged.png": merged(results, rows, tasks, unit)},
        record={"seeds": study.seeds, "learning_rate": study.rate},
        results={"table": rows, "results": results},
    )


def header(tasks: Sequence[str]) -> list[str]:
    """The columns of the table."""
    return ["model", "scale", *tasks, "mean of these", "gain kept", "text of the pre-training"]


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


def row_cells(row: Row) -> list[str]:
    """One row of the table as text, under `header`."""
    *on_tasks, before = (f"{loss:.4f}" for loss in row["losses"].values())
    ends = [f"{end(row['scales']):g}" for end in (min, max)] if row["scales"] else ["-"]
    scale = " to ".join(dict.fromkeys(ends))
    return [row["model"], scale, *on_tasks, loss_text(row), f"{row['kept']:.0%}", before]


def _method(study: MergeStudy) -> list[str]:
    """How it was done, in paragraphs."""
    rules = "; ".join(f"{name}: {text}" for name, (_, text) in MERGES.items())
    return [
        f"The model is pre-trained with AdamW for {study.pretrain_steps} steps. From its weights "
        f"one model is trained on each text for {study.steps} steps ({study.method.text}, Adam at "
        f"a rate of {study.rate:g}), and one on all texts for "
        f"{len(study.tasks)} times as many. The last tenth of each text is held out.",
        f"The average weighs all fine-tuned models alike. The other rules add to the pre-trained "
        f"weights (times the scale): {rules}. Each tries the scales "
        f"{', '.join(f'{scale:g}' for scale in SCALES)} and takes the one with the lowest mean "
        "loss on every second held-out window. All losses of the table are on the other windows.",
        "Gain kept: how far the loss on a text has come from the pre-trained model's to that of "
        "the model fine-tuned on this text alone, mean over the texts.",
    ]
