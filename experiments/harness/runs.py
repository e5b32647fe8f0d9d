"""Finished runs of candidates, and the figures that every table has, from what is stored alone."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Run = dict[str, Any]
Row = dict[str, Any]


WIDE = 0.2
"""Quartiles further apart than this part of their median allow no sentence about time."""


class Timing(NamedTuple):
    """Seconds per step of each candidate, one figure a round; the candidates took turns."""

    wall: Mapping[str, Sequence[float]]
    cpu: Mapping[str, Sequence[float]]  # of all threads; empty where it was not measured


def final_loss(run: Run) -> float:
    """Validation loss at the end of the run; infinite if it diverged."""
    return run["validation_loss"][-1] if run["status"] == "finished" else math.inf


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


def finished(runs: Sequence[Run]) -> list[Run]:
    """Those that did not diverge."""
    return [run for run in runs if run["status"] == "finished"]


def row_of(name: str, runs: Sequence[Run], timing: Timing, baseline: str) -> Row:
    """What every table says of a candidate.

    `final_loss` is the mean over the seeds that did not diverge, `final_loss_spread` their sample
    standard deviation, `final_loss_low` and `final_loss_high` the lowest and the highest.
    """
    best = best_runs(runs)
    losses = [final_loss(run) for run in finished(best)]
    rates = sorted({run["learning_rate"] for run in runs if run["seed"] == 0})
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
        "state_bytes_per_parameter": best[0]["state_bytes_per_parameter"],
        **times(name, timing, baseline),
    }


def times(name: str, timing: Timing, baseline: str) -> Row:
    """The time of a step beside the baseline's: medians and quartiles of the ratios in a round.

    Seconds are the median ratio times the baseline's median: other work on the machine during one
    run, or at one turn, does not count against it.
    """
    low, ratio, high = ratio_quartiles(timing.wall[name], timing.wall[baseline])
    found: Row = {
        "seconds_per_step": ratio * statistics.median(timing.wall[baseline]),
        "step_time_ratio": ratio,
        "step_time_quartiles": [low, high],
        "timing_rounds": len(timing.wall[name]),
        "cpu_time_ratio": None,
        "cpu_time_quartiles": None,
    }
    if timing.cpu:
        low, ratio, high = ratio_quartiles(timing.cpu[name], timing.cpu[baseline])
        found |= {"cpu_time_ratio": ratio, "cpu_time_quartiles": [low, high]}
    return found


def ratio_quartiles(own: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of the ratios within a round."""
    ratios = np.array(own) / np.array(base)
    low, middle, high = np.percentile(ratios, (25, 50, 75))
    return float(low), float(middle), float(high)


def fastest(spans: Mapping[str, tuple[float, float, float]]) -> tuple[str, str | None]:
    """Which of several takes the least time, and why that cannot be said, if it cannot.

    Args:
      spans: lower quartile, median and upper quartile of the time of each.

    Returns:
      The name with the lowest median. None beside it if its quartiles are within `WIDE` of the
      median of each other and below those of all others; else the reason, as a clause.
    """
    first = min(spans, key=lambda name: spans[name][1])
    low, middle, high = spans[first]
    if high - low > WIDE * middle:
        return first, (
            f"the middle half of the times of {first} spans {low / middle:.2f} to "
            f"{high / middle:.2f} of their median, more than {WIDE:.0%} of it"
        )
    alike = [name for name, span in spans.items() if name != first and span[0] <= high]
    if alike:
        return first, f"the middle halves of the times of {', '.join([first, *alike])} overlap"
    return first, None


def edge_warning(rows: Sequence[Row]) -> list[str]:
    """A sentence if a best rate is the first or last of its grid, else none."""
    edges = [r["optimizer"] for r in rows if r["learning_rate_at_edge"]]
    if not edges:
        return []
    return [
        f"* Best rate at the edge of the grid, so perhaps not the best there is: "
        f"{', '.join(edges)}. A larger --rates widens the grid and keeps the finished runs."
    ]


def diverged_seeds(rows: Sequence[Row]) -> list[str]:
    """A sentence for each row that some or all seeds diverged of."""
    lines = []
    for r in rows:
        if r["final_loss"] is None:
            lines.append(f"{r['optimizer']} diverged at every learning rate.")
        elif r["seeds_diverged"]:
            lines.append(
                f"{r['optimizer']}: {r['seeds_diverged']} of {r['seeds']} seeds diverged at its "
                "best rate; its loss is that of the others."
            )
    return lines


def loss_text(row: Mapping[str, Any]) -> str:
    """Final loss and spread over seeds, or "diverged"."""
    if row["final_loss"] is None:
        return "diverged"
    spread = row["final_loss_spread"]
    return f"{row['final_loss']:.4f}" + ("" if spread is None else f" ± {spread:.4f}")


def number(row: Row, key: str, form: str, scale: float = 1.0) -> str:
    """A figure of a row as text, a dash for None."""
    return "-" if row[key] is None else format(row[key] * scale, form)


def rate_text(row: Row) -> str:
    """The best learning rate, with a star where it is at the edge of the grid."""
    return number(row, "learning_rate", "g") + ("*" if row["learning_rate_at_edge"] else "")


def ratio_text(row: Row, kind: str = "step") -> str:
    """The ratio of times with its quartiles; `kind` is "step" for wall time, or "cpu"."""
    if row[f"{kind}_time_ratio"] is None:
        return "-"
    low, high = row[f"{kind}_time_quartiles"]
    return f"{row[f'{kind}_time_ratio']:.2f} ({low:.2f} to {high:.2f})"
