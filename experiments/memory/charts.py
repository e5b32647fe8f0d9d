"""Validation loss over bytes of optimizer state, for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experiments.harness.report.content import Axis, Chart, Curve, Trace
from experiments.harness.runs import Row, Run, best_runs, final_loss, finished, loss_text


def state_charts(runs: Mapping[str, Sequence[Run]], rows: Sequence[Row], unit: str) -> list[Chart]:
    """Final validation loss over bytes of state; none where all runs diverged."""
    curves = [_curve(runs[row["optimizer"]], row) for row in rows if row["final_loss"] is not None]
    if not curves:
        return []
    return [
        Chart(
            "Final validation loss over bytes of state: mean of the seeds, a bar for their range",
            best_for_their_state(rows),
            (Axis("optimizer state", "bytes per parameter"),),
            Axis("final validation loss", unit),
            curves,
        )
    ]


def best_for_their_state(rows: Sequence[Row]) -> str:
    """What ends lowest for its state, in a sentence."""
    best = sorted(
        (row for row in rows if row["best_for_its_state"]),
        key=lambda row: row["state_bytes_per_parameter"],
    )
    listed = ", ".join(
        f"{row['optimizer']} ({row['state_bytes_per_parameter']:.2f} bytes a parameter, "
        f"{row['final_loss']:.4f})"
        for row in best
    )
    return f"Nothing with as little state ends as low as {listed}."


def _curve(runs: Sequence[Run], row: Row) -> Curve:
    bytes_of_state, best = row["state_bytes_per_parameter"], finished(best_runs(runs))

    def trace(label: str, loss: float) -> Trace:
        return Trace(label, ((bytes_of_state,),), (loss,))

    return Curve(
        row["optimizer"],
        trace(f"mean of {len(best)} seeds", row["final_loss"]),
        loss_text(row),
        [row["final_loss_low"]],
        [row["final_loss_high"]],
        [trace(f"seed {run['seed']}", final_loss(run)) for run in best],
        joined=False,
    )
