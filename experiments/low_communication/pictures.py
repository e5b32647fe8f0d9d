"""Validation loss over steps and over bytes sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from experiments.harness.figures import png, style
from experiments.harness.runs import Row, Run, best_runs, finished, loss_text
from experiments.low_communication.methods import Setting, sent_after
from jaxopt_lab.distributed import WireBytes


def loss_by_bytes(
    rows: Sequence[Row],
    setting: Setting,
    runs: Mapping[str, Sequence[Run]],
    wires: Mapping[str, WireBytes],
    unit: str,
) -> bytes:
    """Validation loss over steps and over bytes sent: mean of the seeds, their range shaded."""
    figure = Figure(figsize=(12, 5.8), layout="constrained")
    by_step, by_byte = figure.subplots(1, 2, sharey=True)
    early = []
    for index, row in enumerate(rows):
        name = row["optimizer"]
        shown = finished(best_runs(runs[name]))
        if not shown:
            continue
        losses, steps = np.array([r["validation_loss"] for r in shown]), shown[0]["steps"]
        steps = np.array(steps)
        sent = sent_after(name, setting, wires[name], steps)
        label = f"{name}: {loss_text(row)}"
        early.append(losses.mean(0)[len(steps) // 5])
        for axes, x in ((by_step, steps), (by_byte, sent)):
            some = x > 0  # before the first exchange nothing was sent, which no log axis has
            look = {"markersize": 4, "markevery": 4, **style(index)}
            axes.plot(x[some], losses.mean(0)[some], **look, label=label)
            low, high = losses.min(0)[some], losses.max(0)[some]
            axes.fill_between(x[some], low, high, color=look["color"], alpha=0.2, lw=0)
    by_step.set_xlabel("steps")
    by_byte.set_xlabel("bytes sent by one replica")
    by_byte.set_xscale("log")
    by_step.set_ylabel(f"validation loss of the mean model ({unit})")
    ends = [row["final_loss"] for row in rows if row["final_loss"] is not None]
    if ends:
        by_step.set_ylim(min(ends) / 1.03, max(*early, *ends) * 1.03)
    for axes in (by_step, by_byte):
        axes.grid(alpha=0.3, which="both")
    figure.legend(
        *by_step.get_legend_handles_labels(),
        title="final validation loss, mean ± standard deviation over seeds",
        loc="outside lower center",
        ncols=4,
    )
    return png(figure)
