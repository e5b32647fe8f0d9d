"""From runs to the figures of the table; pure functions of what the store holds."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.parts.optimizers import BASELINE, Candidate
from experiments.parts.study import Run, final_loss

TARGET_SHARE = 0.9


def steps_to(steps: Sequence[int], losses: Sequence[float], target: float) -> float | None:
    """Steps after which `losses`, measured after `steps`, is first at or below `target`.

    Interpolates linearly between two evaluations; None if the target is not reached.
    """
    if losses[0] <= target:
        return 0.0
    for (step0, loss0), (step1, loss1) in itertools.pairwise(zip(steps, losses, strict=True)):
        if loss1 <= target:
            return step0 + (step1 - step0) * (loss0 - target) / (loss0 - loss1)
    return None


def mean_curve(runs: Sequence[Run]) -> list[float]:
    """Validation loss over the evaluations, mean of `runs`, of which none diverged."""
    return [statistics.fmean(losses) for losses in zip(*(r["validation_loss"] for r in runs))]


def best_runs(runs: Sequence[Run]) -> list[Run]:
    """The runs of all seeds at the learning rate whose run with seed 0 ended lowest."""
    rate = min((run for run in runs if run["seed"] == 0), key=final_loss)["learning_rate"]
    return [run for run in runs if run["learning_rate"] == rate]


def default_target(baseline_runs: Sequence[Run]) -> float | None:
    """The baseline's validation loss after 90% of its steps, mean over its seeds.

    A rule and not a number, because the loss that can be reached depends on text, size and budget;
    None if the baseline diverged.
    """
    runs = [run for run in best_runs(baseline_runs) if run["status"] == "finished"]
    if not runs:
        return None
    curve = mean_curve(runs)
    return curve[round(TARGET_SHARE * (len(curve) - 1))]


def row(
    candidate: Candidate,
    runs: Sequence[Run],
    target: float | None,
    seconds: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """One line of the table.

    `final_loss` is the mean over the seeds that did not diverge, `final_loss_spread` their sample
    standard deviation. Steps to the target are those of the mean curve, None if a seed diverged.
    `step_time_ratio` is the median of the ratios to the baseline within a round, and seconds are
    that ratio times the baseline's median: other work on the machine during one run, or at one
    turn, does not count against it.
    """
    best = best_runs(runs)
    finished = [run for run in best if run["status"] == "finished"]
    losses = [final_loss(run) for run in finished]
    steps, reaching = None, 0
    if target is not None and finished:
        measured = finished[0]["steps"]
        reached = [steps_to(measured, run["validation_loss"], target) for run in finished]
        reaching = sum(found is not None for found in reached)
        if len(finished) == len(best):
            steps = steps_to(measured, mean_curve(finished), target)
    baseline = seconds[BASELINE]
    ratio = statistics.median(
        own / base for own, base in zip(seconds[candidate.name], baseline, strict=True)
    )
    per_step = ratio * statistics.median(baseline)
    rates = sorted({run["learning_rate"] for run in runs if run["seed"] == 0})
    return {
        "optimizer": candidate.name,
        "learning_rate": best[0]["learning_rate"] if losses else None,
        "learning_rate_at_edge": bool(losses)
        and len(rates) > 1
        and best[0]["learning_rate"] in (rates[0], rates[-1]),
        "seeds": len(best),
        "seeds_diverged": len(best) - len(losses),
        "seeds_reaching_target": reaching,
        "final_loss": statistics.fmean(losses) if losses else None,
        "final_loss_spread": statistics.stdev(losses) if len(losses) > 1 else None,
        "steps_to_target": steps,
        "seconds_to_target": None if steps is None else steps * per_step,
        "seconds_per_step": per_step,
        "step_time_ratio": ratio,
        "state_bytes_per_parameter": best[0]["state_bytes_per_parameter"],
    }


def verdict(rows: Sequence[Mapping[str, Any]], target: float | None, unit: str) -> list[str]:
    """What the table says, in sentences."""
    if target is None:
        return [f"{BASELINE} diverged at every learning rate, so that there is no target loss."]
    lines = []
    there = [r for r in rows if r["steps_to_target"] is not None]
    baseline = next(r for r in rows if r["optimizer"] == BASELINE)
    for quantity, form in (("steps", ".0f"), ("seconds", ".3g")):
        key = f"{quantity}_to_target"
        if there:
            first = min(there, key=lambda r: r[key])
            own = baseline[key]
            against = "" if first is baseline or own is None else f" ({BASELINE}: {own:{form}})"
            lines.append(
                f"{first['optimizer']} reaches the target of {target:.4f} {unit} in the fewest "
                f"{quantity}: {first[key]:{form}}{against}."
            )
    finished = [r for r in rows if r["final_loss"] is not None]
    if baseline not in finished:
        return [*lines, f"{BASELINE} diverged at every learning rate."]
    lowest = min(finished, key=lambda r: r["final_loss"])
    lines.append(f"The lowest final loss is that of {lowest['optimizer']}: {loss_text(lowest)}.")
    worse, alike = [], []
    for r in finished:
        if r is not baseline:
            gap = r["final_loss"] - baseline["final_loss"]
            margin = (r["final_loss_spread"] or 0.0) + (baseline["final_loss_spread"] or 0.0)
            if abs(gap) <= margin:
                alike.append(r["optimizer"])
            elif gap > 0:
                worse.append(r["optimizer"])
    if alike:
        lines.append(f"Within the spread of the seeds of {BASELINE}: {', '.join(alike)}.")
    if worse:
        lines.append(f"Worse than {BASELINE} in final loss: {', '.join(worse)}.")
    return [*lines, *edge_warning(rows)]


def edge_warning(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence if a best rate is the first or last of its grid, else none."""
    edges = [r["optimizer"] for r in rows if r["learning_rate_at_edge"]]
    if not edges:
        return []
    return [
        f"* Best rate at the edge of the grid, so perhaps not the best there is: "
        f"{', '.join(edges)}. A larger --rates widens the grid and keeps the finished runs."
    ]


def loss_text(row: Mapping[str, Any]) -> str:
    """Final loss and spread over seeds, or "diverged"."""
    if row["final_loss"] is None:
        return "diverged"
    spread = row["final_loss_spread"]
    return f"{row['final_loss']:.4f}" + ("" if spread is None else f" ± {spread:.4f}")
