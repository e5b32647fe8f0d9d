"""What the comparison says: its table, and sentences, from the runs alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experiments.harness import charts, figures, timing
from experiments.harness.candidates import BASELINE, Candidate
from experiments.harness.report import Report
from experiments.harness.runs import (
    Row,
    Run,
    Timing,
    best_runs,
    edge_warning,
    fastest,
    finished,
    loss_text,
    mean_curve,
    number,
    rate_text,
    ratio_text,
    row_of,
    steps_to,
)
from experiments.harness.study import Study

TARGET_SHARE = 0.9
HEADER = (
    "optimizer",
    "best rate",
    "final loss",
    "steps to target",
    "seconds to target",
    "ms per step",
    "time / adamw (quartiles)",
    "CPU time / adamw (quartiles)",
    "state bytes / param.",
)
METHOD = (
    "Every optimizer trains from the same initial weights, on the same batches, under the same "
    "schedule (linear warm-up over a tenth of the steps, then a cosine to a tenth of the peak) and "
    "with the same number of learning rates, a factor of 3 apart around a centre of its own. The "
    "rate whose run with seed 0 ends lowest is trained with the other seeds too.",
    "Weight decay applies to leaves with two or more axes; rate times decay is the same for every "
    "optimizer at the centre of its grid.",
    "The target, unless given by --target, is adamw's own loss after 90% of its budget at its best "
    "rate (mean over seeds). The mean curve of the seeds counts, interpolated linearly "
    "between the 20 evaluations of a run; a dash says that it does not get there.",
    timing.how(BASELINE),
    "State is counted from the arrays of the optimizer's state.",
)


def report(
    study: Study, runs: Mapping[str, Sequence[Run]], measured: Timing, target: float | None
) -> Report:
    """The outcome; the default target is the baseline's."""
    unit = study.workload.loss_unit
    target = default_target(runs[BASELINE]) if target is None else target
    rows = table(study.candidates, runs, target, measured)
    return Report(
        title=f"Optimizers on {study.workload.name}",
        unit=unit,
        verdict=verdict(rows, target, unit),
        caption=study.caption("optimizers"),
        header=HEADER,
        units={"final loss": unit},
        cells=[row_cells(r) for r in rows],
        calls=study.calls(),
        method=METHOD,
        charts=[
            *charts.loss_charts(runs, rows, unit, target),
            *charts.rate_charts(runs, rows, unit),
        ],
        pictures={
            "curves.png": figures.loss_curves(runs, rows, target, unit),
            "rates.png": figures.rate_search(runs, rows, unit),
        },
        record=study.record(),
        results={"target": target, **study.results(rows, runs, measured)},
    )


def default_target(baseline_runs: Sequence[Run]) -> float | None:
    """The baseline's validation loss after 90% of its steps, mean over its seeds.

    A rule and not a number, because the loss that can be reached depends on text, size and budget;
    None if the baseline diverged.
    """
    runs = finished(best_runs(baseline_runs))
    if not runs:
        return None
    curve = mean_curve(runs)
    return curve[round(TARGET_SHARE * (len(curve) - 1))]


def table(
    candidates: Sequence[Candidate],
    runs: Mapping[str, Sequence[Run]],
    target: float | None,
    measured: Timing,
) -> list[Row]:
    """One line for each contender.

    Beside the figures of `runs.row_of`: steps to the target, those of the mean curve and None if a
    seed diverged; seconds to it, so many times those of a step; and how many seeds reach it.
    """
    return [_row(c.name, runs[c.name], target, measured) for c in candidates]


def _row(name: str, runs: Sequence[Run], target: float | None, measured: Timing) -> Row:
    found = row_of(name, runs, measured, BASELINE)
    best = best_runs(runs)
    there = finished(best)
    steps, reaching = None, 0
    if target is not None and there:
        at = there[0]["steps"]
        reached = [steps_to(at, run["validation_loss"], target) for run in there]
        reaching = sum(one is not None for one in reached)
        if len(there) == len(best):
            steps = steps_to(at, mean_curve(there), target)
    return {
        **found,
        "seeds_reaching_target": reaching,
        "steps_to_target": steps,
        "seconds_to_target": None if steps is None else steps * found["seconds_per_step"],
    }


def row_cells(row: Row) -> list[str]:
    """One row of the table as text, under `HEADER`."""
    return [
        row["optimizer"],
        rate_text(row),
        loss_text(row),
        number(row, "steps_to_target", ".0f"),
        number(row, "seconds_to_target", ".3g"),
        number(row, "seconds_per_step", ".2f", 1e3),
        ratio_text(row),
        ratio_text(row, "cpu"),
        number(row, "state_bytes_per_parameter", ".2f"),
    ]


def verdict(rows: Sequence[Row], target: float | None, unit: str) -> list[str]:
    """What the table says, in sentences."""
    if target is None:
        return [f"{BASELINE} diverged at every learning rate, so that there is no target loss."]
    lines = []
    there = [r for r in rows if r["steps_to_target"] is not None]
    baseline = next(r for r in rows if r["optimizer"] == BASELINE)
    if there:
        first = min(there, key=lambda r: r["steps_to_target"])
        lines.append(
            f"{first['optimizer']} reaches the target of {target:.4f} {unit} in the fewest "
            f"steps: {first['steps_to_target']:.0f}{_against(first, baseline, 'steps', '.0f')}."
        )
        lines.append(_seconds(there, baseline))
    trained = [r for r in rows if r["final_loss"] is not None]
    if baseline not in trained:
        return [*lines, f"{BASELINE} diverged at every learning rate."]
    lowest = min(trained, key=lambda r: r["final_loss"])
    lines.append(f"The lowest final loss is that of {lowest['optimizer']}: {loss_text(lowest)}.")
    worse, alike = [], []
    for r in trained:
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


def _seconds(rows: Sequence[Row], baseline: Row) -> str:
    """Which of these, which all reach the target, needs the fewest seconds, if that can be said."""
    by_name = {r["optimizer"]: r for r in rows}
    per_ratio = baseline["seconds_per_step"]
    spans = {
        name: tuple(
            r["steps_to_target"] * per_ratio * ratio
            for ratio in (r["step_time_quartiles"][0], r["step_time_ratio"],
                          r["step_time_quartiles"][1])
        )
        for name, r in by_name.items()
    }  # fmt: skip
    name, reason = fastest(spans)
    if reason is not None:
        return f"Nothing is said about the fewest seconds: {reason}."
    first = by_name[name]
    seconds = f"{first['seconds_to_target']:.3g}{_against(first, baseline, 'seconds', '.3g')}"
    return f"{name} reaches it in the fewest seconds: {seconds}."


def _against(first: Row, baseline: Row, quantity: str, form: str) -> str:
    own = baseline[f"{quantity}_to_target"]
    return "" if first is baseline or own is None else f" ({BASELINE}: {own:{form}})"
