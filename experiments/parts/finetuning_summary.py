"""Table, sentences and pictures of fine-tuning, from the runs alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.parts import optimizers, summary
from experiments.parts.figures import COLOURS, png, style
from experiments.parts.finetuning import BASELINE
from experiments.parts.optimizers import Candidate
from experiments.parts.study import Run

Row = dict[str, Any]

REFERENCE = "lora"
NINTH = "#8B5A2B"
CLAIM = 0.5
"""LoRA-GA is to reach LoRA's final loss after this part of LoRA's steps."""


def table(
    candidates: Sequence[Candidate],
    runs: Mapping[str, Sequence[Run]],
    seconds: Mapping[str, Sequence[float]],
    trained: Mapping[str, int],
    parameters: int,
) -> list[Row]:
    """One line for each method.

    Beside the figures of `summary.row`, less those that are about one target: `trained`, a count of
    parameters; `state_bytes`; `steps_to_lora` and `steps_to_full`, of the mean curve of the seeds
    to the other's mean final loss; `part_of_lora`, the former divided by a run's steps; and
    `first_loss`, the mean final loss on the first text.
    """
    timed = {**seconds, optimizers.BASELINE: seconds[BASELINE]}
    rows = [_row(c, runs[c.name], timed, trained[c.name], parameters) for c in candidates]
    ends = {row["optimizer"]: row["final_loss"] for row in rows}
    for row in rows:
        for other in (REFERENCE, BASELINE):
            row[f"steps_to_{other}"] = steps_to(runs[row["optimizer"]], ends[other])
        steps = runs[row["optimizer"]][0]["steps"][-1]
        reached = row["steps_to_lora"]
        row["part_of_lora"] = None if reached is None else reached / steps
    return rows


def _row(
    candidate: Candidate,
    runs: Sequence[Run],
    seconds: Mapping[str, Sequence[float]],
    trained: int,
    parameters: int,
) -> Row:
    row = summary.row(candidate, runs, None, seconds)
    about_a_target = ("steps_to_target", "seconds_to_target", "seeds_reaching_target")
    row = {name: value for name, value in row.items() if name not in about_a_target}
    finished = [run for run in summary.best_runs(runs) if run["status"] == "finished"]
    on_first = [run["first_loss"][-1] for run in finished]
    return {
        **row,
        "trained": trained,
        "state_bytes": round(row["state_bytes_per_parameter"] * parameters),
        "first_loss": float(np.mean(on_first)) if on_first else None,
    }


def steps_to(runs: Sequence[Run], target: float | None) -> float | None:
    """Steps after which the mean curve at the best rate is at `target`; None if never."""
    best = summary.best_runs(runs)
    if target is None or any(run["status"] != "finished" for run in best):
        return None
    return summary.steps_to(best[0]["steps"], summary.mean_curve(best), target)


def equal_rates(runs: Mapping[str, Sequence[Run]], name: str = "lora-ga") -> list[Row]:
    """LoRA and `name` at each learning rate that both have a run with seed 0 of."""
    found: dict[str, dict[float, Run]] = {
        method: {run["learning_rate"]: run for run in runs.get(method, ()) if run["seed"] == 0}
        for method in (REFERENCE, name)
    }
    rows = []
    for rate in sorted(found[REFERENCE].keys() & found[name].keys()):
        lora, other = found[REFERENCE][rate], found[name][rate]
        if lora["status"] != "finished" or other["status"] != "finished":
            continue
        end = lora["validation_loss"][-1]
        reached = summary.steps_to(other["steps"], other["validation_loss"], end)
        rows.append({
            "learning_rate": rate,
            "lora_final_loss": end,
            "final_loss": other["validation_loss"][-1],
            "part_of_lora": None if reached is None else reached / lora["steps"][-1],
            "moved_as_far": other["moved"][1] / lora["moved"][1],
        })  # fmt: skip
    return rows


def verdict(
    rows: Sequence[Row], same_rate: Sequence[Row], before: tuple[float, float]
) -> list[str]:
    """What the table says, in sentences.

    Args:
      rows: from `table`.
      same_rate: from `equal_rates`.
      before: losses of the pre-trained model on the new text and the first.
    """
    by_name = {row["optimizer"]: row for row in rows}
    full, lora = by_name[BASELINE], by_name[REFERENCE]
    lines = [
        f"Before fine-tuning the model has a loss of {before[0]:.4f} on the new text and "
        f"{before[1]:.4f} on the first."
    ]
    for name in (BASELINE, REFERENCE):
        if by_name[name]["final_loss"] is None:
            return [*lines, f"{name} diverged at every learning rate: there is no loss to reach."]
    gained = (before[0] - lora["final_loss"]) / (before[0] - full["final_loss"])
    lines.append(
        f"With {lora['trained'] / full['trained']:.1%} of the parameters LoRA makes "
        f"{gained:.0%} of full tuning's way ({lora['final_loss']:.4f} against "
        f"{full['final_loss']:.4f}); its loss on the first text changes by "
        f"{lora['first_loss'] - before[1]:+.3f}, full tuning's by "
        f"{full['first_loss'] - before[1]:+.3f}."
    )
    there = [
        row["optimizer"] for row in rows if row is not full and row["steps_to_full"] is not None
    ]
    said = ", ".join(there) if there else "no adapter"
    lines.append(f"Full tuning's final loss is reached by {said}.")
    if "lora-ga" in by_name:
        lines += _claim(by_name["lora-ga"], lora, same_rate)
    for row in rows:
        if row["optimizer"].startswith("lora-ga-") and row["final_loss"] is not None:
            part = row["part_of_lora"]
            said = (
                "is never at LoRA's" if part is None else f"is at LoRA's after {part:.0%} of them"
            )
            lines.append(f"{row['optimizer']} ends at {summary.loss_text(row)} and {said}.")
    finished = [row for row in rows if row["final_loss"] is not None and row is not full]
    lowest = min(finished, key=lambda row: row["final_loss"])
    least = min(finished, key=lambda row: row["first_loss"])
    lines.append(
        f"Of the adapters {lowest['optimizer']} ends lowest ({summary.loss_text(lowest)}), and "
        f"{least['optimizer']} forgets least of the first text."
    )
    for row in rows:
        if row["final_loss"] is None:
            lines.append(f"{row['optimizer']} diverged at every learning rate.")
        elif row["seeds_diverged"]:
            lines.append(
                f"{row['optimizer']}: {row['seeds_diverged']} of {row['seeds']} seeds diverged at "
                "its best rate; its loss is that of the others."
            )
    return [*lines, *summary.edge_warning(rows)]


def memory_verdict(memory: Mapping[str, Any]) -> list[str]:
    """The bytes of a step beside full tuning's, in a sentence."""
    steps = memory["steps"]
    full, ways = steps[BASELINE], ("lora", "lora-factored")
    lora = steps["lora"]
    temporary = [steps[way]["temporary_bytes"] / full["temporary_bytes"] for way in ways]
    return [
        f"At size {memory['size']} and rank {memory['rank']} LoRA trains "
        f"{lora['trained'] / full['trained']:.1%} of the parameters, its optimizer state is "
        f"{full['state_bytes'] / lora['state_bytes']:.0f} times smaller "
        f"({lora['state_bytes'] / 1e6:.1f} MB against {full['state_bytes'] / 1e6:.1f}), and the "
        f"compiled step needs {temporary[0]:.2f} times full tuning's temporary memory "
        f"({full['temporary_bytes'] / 1e9:.2f} GB), {temporary[1]:.2f} times with `factored`."
    ]


def _claim(row: Row, lora: Row, same_rate: Sequence[Row]) -> list[str]:
    part = row["part_of_lora"]
    if row["final_loss"] is None:
        return ["lora-ga diverged at every learning rate."]
    if part is None:
        said = "lora-ga does not reach LoRA's final loss"
    else:
        said = f"lora-ga is at LoRA's final loss after {part:.0%} of LoRA's steps"
    holds = "at least half" if part is not None and part <= CLAIM else "less than half"
    lines = [
        f"Each at its own best rate ({lora['learning_rate']:g} for LoRA, "
        f"{row['learning_rate']:g} for lora-ga), {said}: it saves {holds} of them (its paper "
        "reports 2 to 4 times fewer)."
    ]
    if same_rate:
        said = "; ".join(
            f"{line['learning_rate']:g}: "
            + ("never" if line["part_of_lora"] is None else f"{line['part_of_lora']:.0%}")
            for line in same_rate
        )
        far = [f"{line['moved_as_far']:.1f}" for line in (same_rate[0], same_rate[-1])]
        lines += [
            "At one rate for both, lora-ga is where LoRA ends after this part of LoRA's steps "
            f"(rate: part): {said}.",
            "After the first twentieth of the steps at one rate it has moved the weights "
            f"{far[0]} times as far as LoRA at the smallest of these rates and {far[1]} times at "
            "the largest: lora_b starts at zero and with it LoRA's speed, which a larger rate "
            "makes up for.",
        ]
    return lines


def curves(
    runs: Mapping[str, Sequence[Run]],
    rows: Sequence[Row],
    before: tuple[float, float],
    unit: str,
) -> bytes:
    """Losses on both texts over steps: mean of the seeds, their range shaded, names at the ends."""
    figure = Figure(figsize=(12, 5.6), layout="constrained")
    new, first = figure.subplots(1, 2)
    for axes, key in ((new, "validation_loss"), (first, "first_loss")):
        ends = []
        for index, row in enumerate(rows):
            name = row["optimizer"]
            shown = [r for r in summary.best_runs(runs[name]) if r["status"] == "finished"]
            if not shown:
                continue
            losses, steps = np.array([run[key] for run in shown]), np.array(shown[0]["steps"])
            look = _look(index)
            axes.plot(steps, losses.mean(0), **look, lw=1.8)
            axes.fill_between(
                steps, losses.min(0), losses.max(0), color=look["color"], alpha=0.15, lw=0
            )
            ends.append((float(losses.mean(0)[-1]), f"{name} {losses.mean(0)[-1]:.3f}", look))
        axes.set_xlabel("steps")
        axes.grid(alpha=0.3)
        if axes is new:
            _cut(axes, runs)
        if ends:
            _name_ends(axes, ends, runs[rows[0]["optimizer"]][0]["steps"][-1])
    new.set_ylabel(f"validation loss ({unit})")
    new.set_title("the new text")
    first.set_title("the first text, which is no longer trained on")
    first.axhline(before[1], color="0.5", lw=1)
    first.annotate(
        f"before {before[1]:.3f}", (0, before[1]), (4, 4), textcoords="offset points", color="0.4"
    )
    return png(figure)


def shared_rates(same_rate: Sequence[Row], unit: str) -> bytes:
    """LoRA and LoRA-GA at equal rates: where they end, and LoRA-GA's part of LoRA's steps."""
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    losses, parts = figure.subplots(1, 2)
    rates = [row["learning_rate"] for row in same_rate]
    for index, (name, key) in enumerate((("lora", "lora_final_loss"), ("lora-ga", "final_loss"))):
        y = [row[key] for row in same_rate]
        losses.plot(rates, y, **style(index + 1), label=name)
    losses.legend()
    losses.set_ylabel(f"final validation loss, seed 0 ({unit})")
    reached = [row for row in same_rate if row["part_of_lora"] is not None]
    parts.plot(
        [row["learning_rate"] for row in reached],
        [row["part_of_lora"] for row in reached],
        **style(2),
    )
    for row in reached:
        at = row["learning_rate"], row["part_of_lora"]
        parts.annotate(f"{at[1]:.0%}", at, (0, 8), textcoords="offset points", ha="center")
    for row in same_rate:
        if row["part_of_lora"] is None:
            parts.annotate("never", (row["learning_rate"], 1), (0, 4), ha="center",
                           textcoords="offset points", color=style(2)["color"])  # fmt: skip
    for level, text in ((1.0, "as many steps as LoRA"), (CLAIM, "half of them")):
        parts.axhline(level, color="0.5", lw=1, linestyle="-" if level == 1 else "--")
        parts.annotate(text, (0.02, level), (0, 4), xycoords=("axes fraction", "data"),
                       textcoords="offset points", color="0.3", fontsize=9)  # fmt: skip
    parts.set_ylim(0, 1.15)
    parts.set_ylabel("part of LoRA's steps to LoRA's final loss")
    for axes in (losses, parts):
        axes.set_xscale("log")
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.minorticks_off()
        axes.set_xlabel("peak learning rate of both")
        axes.grid(alpha=0.3, which="both")
    if rates:
        parts.set_xlim(losses.get_xlim())
    return png(figure)


def _look(index: int) -> dict[str, Any]:
    """Colour and dash of a method; the ninth would have the first one's colour."""
    return {**style(index), "marker": "", **({"color": NINTH} if index == len(COLOURS) else {})}


def _name_ends(axes: Axes, ends: Sequence[tuple[float, str, Mapping[str, Any]]], last: int) -> None:
    """Writes each name beside the end of its curve, moved apart where curves end together."""
    low, high = axes.get_ylim()
    apart = 0.042 * (high - low)
    ordered = sorted(ends, key=lambda end: end[0])
    places = spread([end[0] for end in ordered], apart, low + apart, high - apart)
    for (loss, text, look), place in zip(ordered, places, strict=True):
        line = {"color": look["color"], "lw": 0.8, "clip_on": False}
        axes.plot([last, 1.03 * last], [loss, place], **line)
        axes.text(1.04 * last, place, text, va="center", color=look["color"], fontsize=9)
    axes.set_xlim(0, last)
    axes.set_ylim(low, high)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def spread(values: Sequence[float], apart: float, low: float, high: float) -> list[float]:
    """The nearest places to increasing `values` that are at least `apart` from each other."""
    # Neighbours that are too near become one group, evenly spaced around the mean of its values.
    groups: list[list[float]] = []
    for value in values:
        groups.append([value])
        while len(groups) > 1 and _top(groups[-2], apart) + apart > _bottom(groups[-1], apart):
            groups[-2:] = [groups[-2] + groups[-1]]
    places = [_bottom(group, apart) + i * apart for group in groups for i in range(len(group))]
    if places and len(places) * apart <= high - low + apart:
        places[0] = max(places[0], low)
        for i in range(1, len(places)):
            places[i] = max(places[i], places[i - 1] + apart)
        places[-1] = min(places[-1], high)
        for i in range(len(places) - 2, -1, -1):
            places[i] = min(places[i], places[i + 1] - apart)
    return places


def _bottom(group: Sequence[float], apart: float) -> float:
    return sum(group) / len(group) - (len(group) - 1) * apart / 2


def _top(group: Sequence[float], apart: float) -> float:
    return _bottom(group, apart) + (len(group) - 1) * apart


def _cut(axes: Axes, runs: Mapping[str, Sequence[Run]]) -> None:
    """Leaves out the fall from the pre-trained loss, which would flatten all differences."""
    curves = [
        run["validation_loss"]
        for found in runs.values()
        for run in summary.best_runs(found)
        if run["status"] == "finished"
    ]
    if curves:
        low = min(min(curve) for curve in curves)
        high = max(max(curve[len(curve) // 8 :]) for curve in curves)
        axes.set_ylim(low - 0.08 * (high - low), high)
