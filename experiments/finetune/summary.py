"""What fine-tuning shows: a table and sentences, from the runs alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.finetune import charts, methods, pictures
from experiments.finetune.calls import calls
from experiments.finetune.methods import BASELINE
from experiments.finetune.study import FineTuneStudy
from experiments.harness import timing
from experiments.harness.candidates import Candidate
from experiments.harness.charts import rate_charts
from experiments.harness.figures import rate_search
from experiments.harness.report import Report
from experiments.harness.runs import (
    Row,
    Run,
    Timing,
    best_runs,
    diverged_seeds,
    edge_warning,
    finished,
    loss_text,
    mean_curve,
    number,
    rate_text,
    ratio_text,
    row_of,
    steps_to,
)

REFERENCE = "lora"
CLAIM = 0.5
"""LoRA-GA is to reach LoRA's final loss after this part of LoRA's steps."""
HEADER = (
    "method",
    "parameters trained",
    "state bytes",
    "best rate",
    "loss on the new text",
    "part of lora's steps",
    "steps to full's loss",
    "loss on the first text",
    "ms per step",
    "time / full (quartiles)",
)


def report(
    study: FineTuneStudy,
    runs: Mapping[str, Sequence[Run]],
    small: Mapping[str, Sequence[Run]],
    measured: Timing,
    trained: Mapping[str, int],
    memory: Mapping[str, Any] | None,
) -> Report:
    """The outcome.

    Args:
      study: what was done.
      runs: of the search and the seeds.
      small: those at equal small rates.
      measured: seconds of a step.
      trained: how many parameters each method trains.
      memory: of a step at another size.
    """
    unit, before = study.workload.loss_unit, study.before
    parameters = study.workload.identity["parameters"]
    rows = table(study.candidates, runs, measured, trained, parameters)
    every = {name: [*found, *small.get(name, [])] for name, found in runs.items()}
    same_rate = equal_rates(every)
    drawn = {
        "curves.png": pictures.curves(runs, rows, before, unit),
        "rates.png": rate_search(runs, rows, unit),
    }
    if same_rate:
        drawn["equal_rates.png"] = pictures.shared_rates(same_rate, CLAIM, unit)
    return Report(
        title="Fine-tuning by adapters",
        unit=unit,
        verdict=verdict(rows, same_rate, before)
        + ([] if memory is None else memory_verdict(memory)),
        caption=study.caption("methods") + f", rank {study.rank}",
        header=HEADER,
        units=dict.fromkeys(("loss on the new text", "loss on the first text"), unit),
        cells=[row_cells(row) for row in rows],
        calls=calls(study.candidates, study.rank),
        method=_method(study),
        charts=[
            *charts.text_charts(runs, rows, before, unit),
            *rate_charts(runs, rows, unit),
            *charts.equal_rate_charts(same_rate, CLAIM, unit),
        ],
        pictures=drawn,
        record=study.record(),
        results={
            "equal_rates": same_rate,
            "memory": memory,
            "pretraining": study.pretraining,
            **study.results(rows, every, measured),
        },
    )


def table(
    candidates: Sequence[Candidate],
    runs: Mapping[str, Sequence[Run]],
    measured: Timing,
    trained: Mapping[str, int],
    parameters: int,
) -> list[Row]:
    """One line for each method.

    Beside the figures of `runs.row_of`: `trained`, a count of parameters; `state_bytes`;
    `steps_to_lora` and `steps_to_full`, of the mean curve of the seeds to the other's mean final
    loss; `part_of_lora`, the former divided by a run's steps; and `first_loss`, the mean final loss
    on the first text.
    """
    rows = [_row(c.name, runs[c.name], measured, trained[c.name], parameters) for c in candidates]
    ends = {row["optimizer"]: row["final_loss"] for row in rows}
    for row in rows:
        for other in (REFERENCE, BASELINE):
            row[f"steps_to_{other}"] = _steps_to(runs[row["optimizer"]], ends[other])
        steps = runs[row["optimizer"]][0]["steps"][-1]
        reached = row["steps_to_lora"]
        row["part_of_lora"] = None if reached is None else reached / steps
    return rows


def _row(name: str, runs: Sequence[Run], measured: Timing, trained: int, parameters: int) -> Row:
    found = row_of(name, runs, measured, BASELINE)
    on_first = [run["first_loss"][-1] for run in finished(best_runs(runs))]
    return {
        **found,
        "trained": trained,
        "state_bytes": round(found["state_bytes_per_parameter"] * parameters),
        "first_loss": statistics.fmean(on_first) if on_first else None,
    }


def _steps_to(runs: Sequence[Run], target: float | None) -> float | None:
    """Steps after which the mean curve at the best rate is at `target`; None if never."""
    best = best_runs(runs)
    if target is None or any(run["status"] != "finished" for run in best):
        return None
    return steps_to(best[0]["steps"], mean_curve(best), target)


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
        reached = steps_to(other["steps"], other["validation_loss"], end)
        rows.append({
            "learning_rate": rate,
            "lora_final_loss": end,
            "final_loss": other["validation_loss"][-1],
            "part_of_lora": None if reached is None else reached / lora["steps"][-1],
            "moved_as_far": other["moved"][1] / lora["moved"][1],
        })  # fmt: skip
    return rows


def row_cells(row: Row) -> list[str]:
    """One row of the table as text, under `HEADER`."""
    return [
        row["optimizer"],
        number(row, "trained", ",d", 1),
        number(row, "state_bytes", ",d", 1),
        rate_text(row),
        loss_text(row),
        number(row, "part_of_lora", ".2f"),
        number(row, "steps_to_full", ".0f"),
        number(row, "first_loss", ".4f"),
        number(row, "seconds_per_step", ".2f", 1e3),
        ratio_text(row),
    ]


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
            lines.append(f"{row['optimizer']} ends at {loss_text(row)} and {said}.")
    others = [row for row in rows if row["final_loss"] is not None and row is not full]
    lowest = min(others, key=lambda row: row["final_loss"])
    least = min(others, key=lambda row: row["first_loss"])
    lines.append(
        f"Of the adapters {lowest['optimizer']} ends lowest ({loss_text(lowest)}), and "
        f"{least['optimizer']} forgets least of the first text."
    )
    return [*lines, *diverged_seeds(rows), *edge_warning(rows)]


def memory_verdict(memory: Mapping[str, Any] | None) -> list[str]:
    """The bytes of a step beside full tuning's, in a sentence, if they were asked for."""
    if memory is None:
        return []
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


def _method(study: FineTuneStudy) -> list[str]:
    """How it was done, in paragraphs."""
    return [
        f"The model is pre-trained with AdamW for {study.pretrain_steps} steps on the first text. "
        "Its alphabet is the characters that this text has at least ten times, and one more for "
        "all others. Every method starts from these weights, sees the same batches of the new text "
        "under the same schedule (linear warm-up over a tenth of the steps, then a cosine to a "
        "tenth of the peak) and tries the same number of learning rates, a factor of 3 apart "
        "around a centre of its own, with seed 0; the best rate is trained with the other seeds "
        "too. A seed decides the batches and what is drawn at the start. The optimizer is Adam "
        "without weight decay. The last tenth of each text is held out.",
        f"Adapters are on all kernels but those of embeddings and output layer. LoRA has rank "
        f"{study.rank}, the same for all that have factors; bone has blocks of {2 * study.rank} "
        f"rows, which are as many parameters. LoRA, LoRA-GA and LoRA+ scale by "
        f"{methods.ALPHA} / sqrt(r); PiSSA, OLoRA and CorDA by 1, as their authors do. LoRA-GA "
        f"takes the mean gradient of {methods.ESTIMATION_BATCHES} batches of the new text at "
        f"gamma {methods.GAMMA}, CorDA the moments of as many. That is not counted as steps. "
        f"LoRA+ trains lora_b {methods.RATIO} times as fast.",
        "Part of lora's steps: where the mean curve of the seeds, interpolated between its 20 "
        "evaluations, is first at LoRA's mean final loss, as a part of a run; a dash says never. "
        "Steps to full's loss likewise.",
        "LoRA and LoRA-GA are also trained at equal small rates with seed 0; the table leaves them "
        "out; charts of their own show them.",
        timing.how(BASELINE),
    ]
