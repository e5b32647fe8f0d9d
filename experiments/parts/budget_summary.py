"""What the bytes of state bought: lines of the table and sentences, from the runs alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.parts import summary
from experiments.parts.optimizers import BASELINE, Candidate
from experiments.parts.study import Run, final_loss

Row = dict[str, Any]

COMPACT = ("adamw-int8", "adamw-bf16")


def table(
    candidates: Sequence[Candidate],
    runs: Mapping[str, Sequence[Run]],
    seconds: Mapping[str, Sequence[float]],
) -> list[Row]:
    """One line for each contender.

    Beside the figures of `summary.row`, less those that are about a target: `final_loss_low` and
    `final_loss_high` over the seeds; `excess`, the final loss less the baseline's;
    `excess_in_spreads`, the same in sample standard deviations of the baseline's seeds; and
    `best_for_its_state`: nothing with as little state ends as low.
    """
    rows = [_row(candidate, runs[candidate.name], seconds) for candidate in candidates]
    base = next(row for row in rows if row["optimizer"] == BASELINE)
    for row in rows:
        row["excess"] = row["excess_in_spreads"] = None
        if row["final_loss"] is not None and base["final_loss"] is not None:
            row["excess"] = row["final_loss"] - base["final_loss"]
            if base["final_loss_spread"]:
                row["excess_in_spreads"] = row["excess"] / base["final_loss_spread"]
        row["best_for_its_state"] = row["final_loss"] is not None and not any(
            _dominates(other, row) for other in rows
        )
    return rows


def _dominates(other: Row, row: Row) -> bool:
    """Whether `other` ends as low with as little state, and is better in one of the two."""
    if other["final_loss"] is None:
        return False
    names = ("final_loss", "state_bytes_per_parameter")
    own, others = [row[name] for name in names], [other[name] for name in names]
    return others != own and all(a <= b for a, b in zip(others, own))


def _row(candidate: Candidate, runs: Sequence[Run], seconds: Mapping[str, Sequence[float]]) -> Row:
    row = summary.row(candidate, runs, None, seconds)
    about_a_target = ("steps_to_target", "seconds_to_target", "seeds_reaching_target")
    row = {name: value for name, value in row.items() if name not in about_a_target}
    best = summary.best_runs(runs)
    losses = [final_loss(run) for run in best if run["status"] == "finished"]
    row["final_loss_low"] = min(losses, default=None)
    row["final_loss_high"] = max(losses, default=None)
    return row


def verdict(rows: Sequence[Row]) -> list[str]:
    """What the table says, in sentences.

    A difference counts if it exceeds the baseline's spread, the sample standard deviation over its
    seeds.
    """
    by_name = {row["optimizer"]: row for row in rows}
    base = by_name[BASELINE]
    if base["final_loss"] is None:
        return [f"{BASELINE} diverged at every learning rate: there is nothing to compare with."]
    lines = []
    if base["final_loss_spread"] is None:
        lines.append(
            f"One seed of {BASELINE} has no spread, so that no difference can be judged: "
            "--seeds 3 or more."
        )
    else:
        lines.append(
            f"{BASELINE} ends at {base['final_loss']:.4f}; its spread over {_finished(base)} seeds "
            f"(standard deviation) is {base['final_loss_spread']:.4f}."
        )
        lines += [_reaches(by_name[name], base) for name in COMPACT if name in by_name]
    for name, row in by_name.items():
        rival = by_name.get(name.replace("frugal-", "galore-"))
        if name.startswith("frugal-") and rival is not None:
            lines.append(_between(base, row, rival))
    best = sorted(
        (row for row in rows if row["best_for_its_state"]),
        key=lambda row: row["state_bytes_per_parameter"],
    )
    listed = ", ".join(
        f"{row['optimizer']} ({row['state_bytes_per_parameter']:.2f} bytes a parameter, "
        f"{row['final_loss']:.4f})"
        for row in best
    )
    lines.append(f"Nothing with as little state ends as low as {listed}.")
    for row in rows:
        if row["final_loss"] is None:
            lines.append(f"{row['optimizer']} diverged at every learning rate.")
        elif row["seeds_diverged"]:
            lines.append(
                f"{row['optimizer']}: {row['seeds_diverged']} of {row['seeds']} seeds diverged at "
                "its best rate; its loss is that of the others."
            )
    return [*lines, *summary.edge_warning(rows)]


def _finished(row: Row) -> int:
    return row["seeds"] - row["seeds_diverged"]


def _reaches(row: Row, base: Row) -> str:
    """Whether compact state costs anything."""
    name, spread = row["optimizer"], base["final_loss_spread"]
    if row["final_loss"] is None:
        return f"{name} does not reach {BASELINE}'s loss: it diverged."
    figures = f"{row['final_loss']:.4f}, a difference of {row['excess']:+.4f}"
    if row["excess"] > spread:
        return f"{name} does not reach {BASELINE}'s loss within its spread over seeds: {figures}."
    if row["excess"] < -spread:
        return f"{name} ends below {BASELINE} by more than its spread over seeds: {figures}."
    return f"{name} reaches {BASELINE}'s loss within its spread over seeds: {figures}."


def _between(base: Row, frugal: Row, galore: Row) -> str:
    """Whether FRUGAL lies between GaLore with the same moments and full AdamW, as in its paper."""
    names = frugal["optimizer"], galore["optimizer"]
    claim = f"its paper's order {BASELINE}, {names[0]}, {names[1]}"
    if frugal["final_loss"] is None or galore["final_loss"] is None:
        return f"Of {claim} nothing can be said: one of them diverged."
    above_base = frugal["final_loss"] - base["final_loss"]
    below_galore = galore["final_loss"] - frugal["final_loss"]
    figures = (
        f"{base['final_loss']:.4f}, {frugal['final_loss']:.4f}, {galore['final_loss']:.4f} "
        f"with {base['state_bytes_per_parameter']:.2f}, "
        f"{frugal['state_bytes_per_parameter']:.2f} and "
        f"{galore['state_bytes_per_parameter']:.2f} bytes a parameter"
    )
    if above_base >= 0 and below_galore >= 0:
        text = f"{names[0]} lies between {names[1]} and full {BASELINE}, as in its paper: {figures}"
    else:
        faults = [f"below full {BASELINE}"] if above_base < 0 else []
        faults += [f"above {names[1]}"] if below_galore < 0 else []
        text = (
            f"{names[0]} does not lie between {names[1]} and full {BASELINE}, as it does in its "
            f"paper: it ends {' and '.join(faults)} ({figures})"
        )
    spread = base["final_loss_spread"]
    pairs = ((above_base, BASELINE), (below_galore, names[1]))
    alike = [name for gap, name in pairs if spread is not None and abs(gap) <= spread]
    return text + (
        f"; the difference to {' and to '.join(alike)} is within the spread." if alike else "."
    )
