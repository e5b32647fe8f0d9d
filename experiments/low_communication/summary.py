"""What communication costs: a table and sentences, from the runs alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from experiments.harness import charts, timing
from experiments.harness.candidates import Candidate
from experiments.harness.figures import rate_search
from experiments.harness.report import Report
from experiments.harness.report.content import Axis, Chart
from experiments.harness.runs import (
    Row,
    Run,
    Timing,
    best_runs,
    diverged_seeds,
    edge_warning,
    fastest,
    finished,
    number,
    rate_text,
    ratio_text,
    row_of,
)
from experiments.low_communication.methods import (
    BASELINE,
    DILOCO_MOMENTUM,
    METHODS,
    Setting,
    sent_after,
)
from experiments.low_communication.pictures import loss_by_bytes
from experiments.low_communication.study import ReplicaStudy
from jaxopt_lab.distributed import WireBytes

LINKS = {"100 Gbit/s": 12.5e9, "1 Gbit/s": 1.25e8, "100 Mbit/s": 1.25e7}
"""Bytes a second that one replica can send."""
CLAIMS = {"diloco": 2.0, "noloco": 2.0, "one-bit-adam": 1.0, "ef21-top1": 1.0}
"""How many percent above the synchronous loss a method may end to count as equal to it."""
HEADER = (
    "method",
    "best rate",
    "loss of mean model",
    "above sync",
    "single models",
    "bytes / step",
    "peak",
    "fewer",
    "ms per step",
    "time / sync (quartiles)",
    "seconds at 100 Gbit/s",
    "at 1 Gbit/s",
    "at 100 Mbit/s",
)


def report(study: ReplicaStudy, runs: Mapping[str, Sequence[Run]], measured: Timing) -> Report:
    """The outcome."""
    unit, setting, wires = study.workload.loss_unit, study.setting, study.sent()
    at_once = setting.replicas if study.on_devices else 1
    rows = table(study.candidates, setting, runs, wires, measured, at_once)
    return Report(
        title="What replicas must send",
        unit=unit,
        verdict=verdict(rows),
        caption=study.caption("methods") + f", {setting.replicas} replicas",
        header=HEADER,
        units={
            **dict.fromkeys(("loss of mean model", "single models"), unit),
            "peak": "bytes / step",
            "fewer": "times",
            **dict.fromkeys(("at 1 Gbit/s", "at 100 Mbit/s"), "seconds"),
        },
        cells=[row_cells(row) for row in rows],
        calls=study.calls(),
        method=_method(study),
        charts=[
            *byte_charts(rows, setting, runs, wires, unit),
            *charts.rate_charts(runs, rows, unit),
        ],
        pictures={
            "bytes.png": loss_by_bytes(rows, setting, runs, wires, unit),
            "rates.png": rate_search(runs, rows, unit),
        },
        record=study.record(),
        results={
            "warm_start": study.warm_start,
            "sent_by_kind": {name: wire.by_kind() for name, wire in wires.items()},
            **study.results(rows, runs, measured),
        },
    )


def byte_charts(
    rows: Sequence[Row],
    setting: Setting,
    runs: Mapping[str, Sequence[Run]],
    wires: Mapping[str, WireBytes],
    unit: str,
) -> list[Chart]:
    """Validation loss over steps or over bytes sent; none where all runs diverged."""

    def places(row: Row, steps: Sequence[int]) -> Sequence[Sequence[float]]:
        name = row["optimizer"]
        return steps, [float(sent_after(name, setting, wires[name], step)) for step in steps]

    axes = charts.STEPS, Axis("sent by one replica", "bytes", logarithmic=True)
    loss = Axis("validation loss of the mean model", unit)
    return charts.course(f"{loss.name} {charts.BEST}".capitalize(), runs, rows, axes, loss, places)


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
    measured: Timing,
    devices_at_once: int,
) -> list[Row]:
    """One line for each method.

    Args:
      candidates: the methods, the synchronous one among them.
      setting: the run's length, replicas and rounds.
      runs: of each method.
      wires: bytes of each method's step.
      measured: seconds of a step of all replicas.
      devices_at_once: replicas that compute at the same time.
    """
    rows = [
        _row(c.name, setting, runs[c.name], wires[c.name], measured, devices_at_once)
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
    name: str,
    setting: Setting,
    runs: Sequence[Run],
    wire: WireBytes,
    measured: Timing,
    devices_at_once: int,
) -> Row:
    found = row_of(name, runs, measured, BASELINE)
    single = [run["single_loss"] for run in finished(best_runs(runs))]
    in_turn = setting.replicas / devices_at_once
    seconds = found["seconds_per_step"] / in_turn
    of_baseline = seconds / found["step_time_ratio"]

    def modelled(step_seconds: float) -> dict[str, float]:
        return {
            link: wall_seconds(name, setting, wire, step_seconds, bandwidth)
            for link, bandwidth in LINKS.items()
        }

    low, high = (modelled(ratio * of_baseline) for ratio in found["step_time_quartiles"])
    return {
        **found,
        "single_loss": statistics.fmean(single) if single and None not in single else None,
        "bytes_per_step": float(sent_after(name, setting, wire, setting.steps)) / setting.steps,
        "bytes_per_step_peak": wire.peak,
        "bytes_per_step_least": wire.least,
        "seconds_per_step": seconds,
        "modelled_seconds": modelled(seconds),
        "modelled_quartiles": {link: [low[link], high[link]] for link in LINKS},
    }


def row_cells(row: Row) -> list[str]:
    """One row of the table as text, under `HEADER`."""
    percent = row["percent_above_sync"]
    return [
        row["optimizer"],
        rate_text(row),
        "diverged" if row["final_loss"] is None else number(row, "final_loss", ".4f"),
        "-" if percent is None else f"{percent:+.2f}%",
        number(row, "single_loss", ".4f"),
        number(row, "bytes_per_step", ",.0f"),
        number(row, "bytes_per_step_peak", ",.0f"),
        number(row, "times_fewer_bytes", ".1f"),
        number(row, "seconds_per_step", ".2f", 1e3),
        ratio_text(row),
        *(f"{seconds:.3g}" for seconds in row["modelled_seconds"].values()),
    ]


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
            continue
        holds = row["percent_above_sync"] <= percent
        lines.append(
            f"{name} ends {'within' if holds else 'not within'} {percent:g}% of {BASELINE}: "
            f"{row['percent_above_sync']:+.2f}%, with {row['times_fewer_bytes']:.1f} times fewer "
            "bytes."
        )
    trained = [row for row in rows if row["final_loss"] is not None]
    lines += [_first(trained, base, link) for link in LINKS]
    return [*lines, *diverged_seeds(rows), *edge_warning(rows)]


def _first(rows: Sequence[Row], base: Row, link: str) -> str:
    """Which of these would end its steps first over a link, if that can be said."""
    spans = {}
    for row in rows:
        low, high = row["modelled_quartiles"][link]
        spans[row["optimizer"]] = (low, row["modelled_seconds"][link], high)
    name, reason = fastest(spans)
    if reason is not None:
        return f"At {link} nothing is said about which ends its steps first: {reason}."
    return (
        f"At {link} {name} would end its steps first, after {spans[name][1]:.3g} s ({BASELINE}: "
        f"{base['modelled_seconds'][link]:.3g} s)."
    )


def _method(study: ReplicaStudy) -> list[str]:
    """How it was done, in paragraphs."""
    setting, warm = study.setting, study.warm_start
    start = "" if warm is None else (
        f"They are those of a warm start, as in DiLoCo's paper: {warm['steps']} steps of sync "
        f"with seed 0, at a rate of {warm['learning_rate']:g} and with a schedule of its own, end "
        f"at {warm['validation_loss']:.4f}. All seeds start from there, with fresh optimizer "
        "states and other batches; all methods search learning rates around a third of that rate. "
        "Steps and bytes are those after it. "
    )  # fmt: skip
    computing = "a step of the simulation divided by the number of replicas"
    if study.on_devices:
        computing = "a step of the processes, which share this machine and exchange over loopback"
    return [
        f"{setting.replicas} replicas start from the same weights. {start}They train on "
        f"{study.workload.identity['batch_size']} windows a step each, from their own contiguous "
        "slice of the text. All methods see the same batches, schedule (linear warm-up over a "
        "tenth of the steps, then a cosine to a tenth of the peak), AdamW and weight decay, and "
        "search the same learning rates with seed 0; the best rate is trained with the other seeds "
        "too. Everything else is each method's default, but for the momentum of DiLoCo's outer "
        f"step: {DILOCO_MOMENTUM}, as 0.9 ended higher in runs of 200 and of 600 "
        "steps.",
        f"Local methods exchange every {setting.sync_every} steps. one-bit-adam is AdamW for "
        f"{setting.freeze_step} steps and then sends signs. ef21-top1 sends 1% of the entries. "
        "ef-int8 averages in two phases.",
        "The loss is that of the mean of all models on held-out text; beside it stands the mean of "
        "the single models' own losses. co2 ends one round behind: what the last round changed is "
        "never averaged in.",
        "Bytes are those that one replica sends, counted in the traced step of one replica "
        "(`wire_bytes`) with ring algorithms: average over a run, and in the step that sends most.",
        "Seconds are a model: steps x time of computing + bytes / bandwidth, where a replica "
        "computes, then sends, and latency is nothing. co2 sends while the next round computes, so "
        "a round of it takes the longer of the two. The time of computing is measured: "
        f"{computing}. It includes packing and unpacking; one-bit-adam is timed after its warm-up. "
        + timing.how(BASELINE),
    ]
