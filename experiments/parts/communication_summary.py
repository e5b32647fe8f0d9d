"""Table, sentences and pictures of the experiment on communication, from its runs alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.parts import summary
from experiments.parts.communication import BASELINE, METHODS, Setting
from experiments.parts.figures import png, style
from experiments.parts.optimizers import Candidate
from experiments.parts.study import Run, final_loss
from jaxopt_lab.distributed import WireBytes

Row = dict[str, Any]

LINKS = {"100 Gbit/s": 12.5e9, "1 Gbit/s": 1.25e8, "100 Mbit/s": 1.25e7}
"""Bytes a second that one replica can send."""
CLAIMS = {"diloco": 2.0, "noloco": 2.0, "one-bit-adam": 1.0, "ef21-top1": 1.0}
"""How many percent above the synchronous loss a method may end to count as equal to it."""


def sent_after(name: str, setting: Setting, wire: WireBytes, step: Any) -> Any:
    """Bytes that one replica has sent after so many steps."""
    return step * wire.least + METHODS[name].peaks(setting, step) * (wire.peak - wire.least)


def wall_seconds(
    name: str, setting: Setting, wire: WireBytes, step_seconds: float, bandwidth: float
) -> float:
    """Modelled seconds of a run: computing and then sending, or both at once where they overlap."""
    steps, every = setting.steps, setting.sync_every
    sending = float(sent_after(name, setting, wire, steps)) / bandwidth
    if not METHODS[name].overlaps:
        return steps * step_seconds + sending
    rounds = steps // every
    one_round = max(every * step_seconds, sending / rounds) if rounds else 0.0
    return rounds * one_round + (steps - rounds * every) * step_seconds


def table(
    candidates: Sequence[Candidate],
    setting: Setting,
    runs: Mapping[str, Sequence[Run]],
    wires: Mapping[str, WireBytes],
    seconds: Mapping[str, Sequence[float]],
    devices_at_once: int,
) -> list[Row]:
    """One line for each method.

    Args:
      candidates: the methods, the synchronous one among them.
      setting: the run's length, replicas and rounds.
      runs: of each method.
      wires: bytes of each method's step.
      seconds: a step of all replicas, for each method and round of timing.
      devices_at_once: replicas that compute at the same time.
    """
    rows = [
        _row(c, setting, runs[c.name], wires[c.name], seconds, setting.replicas / devices_at_once)
        for c in candidates
    ]
    base = next(row for row in rows if row["optimizer"] == BASELINE)
    for row in rows:
        row["percent_above_sync"] = None
        if row["final_loss"] is not None and base["final_loss"] is not None:
            row["percent_above_sync"] = 100 * (row["final_loss"] / base["final_loss"] - 1)
        row["times_fewer_bytes"] = (
            base["bytes_per_step"] / row["bytes_per_step"] if row["bytes_per_step"] else None
        )
    return rows


def _row(
    candidate: Candidate,
    setting: Setting,
    runs: Sequence[Run],
    wire: WireBytes,
    seconds: Mapping[str, Sequence[float]],
    in_turn: float,
) -> Row:
    best = summary.best_runs(runs)
    finished = [run for run in best if run["status"] == "finished"]
    losses = [final_loss(run) for run in finished]
    single = [run["single_loss"] for run in finished]
    rates = sorted({run["learning_rate"] for run in runs if run["seed"] == 0})
    ratio = statistics.median(
        own / base for own, base in zip(seconds[candidate.name], seconds[BASELINE], strict=True)
    )
    step_seconds = ratio * statistics.median(seconds[BASELINE]) / in_turn
    name = candidate.name
    return {
        "optimizer": name,
        "learning_rate": best[0]["learning_rate"] if losses else None,
        "learning_rate_at_edge": bool(losses)
        and len(rates) > 1
        and best[0]["learning_rate"] in (rates[0], rates[-1]),
        "seeds": len(best),
        "seeds_diverged": len(best) - len(losses),
        "final_loss": statistics.fmean(losses) if losses else None,
        "final_loss_spread": statistics.stdev(losses) if len(losses) > 1 else None,
        "final_loss_low": min(losses, default=None),
        "final_loss_high": max(losses, default=None),
        "single_loss": statistics.fmean(single) if single and None not in single else None,
        "bytes_per_step": float(sent_after(name, setting, wire, setting.steps)) / setting.steps,
        "bytes_per_step_peak": wire.peak,
        "bytes_per_step_least": wire.least,
        "seconds_per_step": step_seconds,
        "step_time_ratio": ratio,
        "modelled_seconds": {
            link: wall_seconds(name, setting, wire, step_seconds, bandwidth)
            for link, bandwidth in LINKS.items()
        },
    }


def verdict(rows: Sequence[Row]) -> list[str]:
    """What the table says, in sentences."""
    by_name = {row["optimizer"]: row for row in rows}
    base = by_name[BASELINE]
    if base["final_loss"] is None:
        return [f"{BASELINE} diverged at every learning rate: there is nothing to compare with."]
    spread = base["final_loss_spread"]
    lines = [
        f"{BASELINE} ends at {base['final_loss']:.4f} and sends "
        f"{base['bytes_per_step']:,.0f} bytes a step and replica"
        + ("." if spread is None else
           f"; the standard deviation over its {base['seeds']} seeds is "
           f"{100 * spread / base['final_loss']:.2f}%.")
    ]  # fmt: skip
    for name, percent in CLAIMS.items():
        if name not in by_name:
            continue
        row = by_name[name]
        if row["final_loss"] is None:
            lines.append(f"{name} diverged at every learning rate.")
            continue
        holds = row["percent_above_sync"] <= percent
        lines.append(
            f"{name} ends {'within' if holds else 'not within'} {percent:g}% of {BASELINE}: "
            f"{row['percent_above_sync']:+.2f}%, with {row['times_fewer_bytes']:.1f} times fewer "
            "bytes."
        )
    trained = [row for row in rows if row["final_loss"] is not None]
    for link in LINKS:
        fastest = min(trained, key=lambda row: row["modelled_seconds"][link])
        lines.append(
            f"At {link} {fastest['optimizer']} would end its steps first, after "
            f"{fastest['modelled_seconds'][link]:.3g} s ({BASELINE}: "
            f"{base['modelled_seconds'][link]:.3g} s)."
        )
    for row in rows:
        if row["seeds_diverged"] and row["final_loss"] is not None:
            lines.append(
                f"{row['optimizer']}: {row['seeds_diverged']} of {row['seeds']} seeds diverged at "
                "its best rate; its loss is that of the others."
            )
    return [*lines, *summary.edge_warning(rows)]


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
        shown = [run for run in summary.best_runs(runs[name]) if run["status"] == "finished"]
        if not shown:
            continue
        losses, steps = np.array([r["validation_loss"] for r in shown]), shown[0]["steps"]
        steps = np.array(steps)
        sent = sent_after(name, setting, wires[name], steps)
        label = f"{name}: {summary.loss_text(row)}"
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
