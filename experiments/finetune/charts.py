"""Losses on both texts, and LoRA beside LoRA-GA at equal rates, for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experiments.harness.charts import BEST, STEPS, course
from experiments.harness.report.content import Axis, Chart, Curve, Level, Trace
from experiments.harness.runs import Row, Run

_RATE = Axis("peak learning rate of both", logarithmic=True)


def text_charts(
    runs: Mapping[str, Sequence[Run]],
    rows: Sequence[Row],
    before: tuple[float, float],
    unit: str,
) -> list[Chart]:
    """The losses on the new and the first text over steps or seconds; none where all diverged."""

    def places(row: Row, steps: Sequence[int]) -> Sequence[Sequence[float]]:
        return steps, [step * row["seconds_per_step"] for step in steps]

    axes, level = (STEPS, Axis("training time", "s")), Level("before", before[1])
    on = {text: Axis(f"loss on the {text} text", unit) for text in ("new", "first")}
    return [
        *course(f"Loss on the new text {BEST}", runs, rows, axes, on["new"], places),
        *course(
            f"Loss on the first text, which is no longer trained on, {BEST}",
            runs, rows, axes, on["first"], places, key="first_loss", levels=(level,),
        ),
    ]  # fmt: skip


def equal_rate_charts(same_rate: Sequence[Row], claim: float, unit: str) -> list[Chart]:
    """Where LoRA and LoRA-GA end at each rate, and how much sooner LoRA-GA is at LoRA's loss."""
    if not same_rate:
        return []
    rates = [row["learning_rate"] for row in same_rate]
    losses = {
        name: Trace("seed 0", (rates,), [row[key] for row in same_rate])
        for name, key in (("lora", "lora_final_loss"), ("lora-ga", "final_loss"))
    }
    lower = [f"{row['learning_rate']:g}" for row in same_rate
             if row["final_loss"] < row["lora_final_loss"]]  # fmt: skip
    charts = [
        Chart(
            "LoRA and LoRA-GA at equal learning rates",
            f"LoRA-GA ends lower at {'the rates ' + ', '.join(lower) if lower else 'no rate'}.",
            (_RATE,),
            Axis("final validation loss, seed 0", unit),
            [Curve(name, trace) for name, trace in losses.items()],
        )
    ]
    reached = [row for row in same_rate if row["part_of_lora"] is not None]
    if reached:
        at = [row["learning_rate"] for row in reached]
        parts = [row["part_of_lora"] for row in reached]
        first, last = (f"{parts[i]:.0%} at {at[i]:g}" for i in (0, -1))
        charts.append(
            Chart(
                "Part of LoRA's steps after which LoRA-GA has LoRA's final loss",
                f"It is {first}" + (f" and {last}." if len(at) > 1 else "."),
                (_RATE,),
                Axis("part of LoRA's steps"),
                [Curve("lora-ga", Trace("seed 0", (at,), parts))],
                (Level("as many steps as LoRA", 1), Level("claimed", claim)),
                (0, 1.15),
            )
        )
    return charts
