"""How many bytes must replicas send to end at the loss of synchronous training?

    python -m experiments.low_communication
    python -m experiments.low_communication --methods diloco,noloco --replicas 4 --sync-every 40
    python -m experiments.low_communication --warm-start 400
    python -m experiments.low_communication --methods diloco --processes 4

Trains a small language model on several replicas, each with its own part of the text, by methods
that send less than all gradients at every step. `README.md` beside this file says what is measured.
Interrupt it at any time; the same command goes on with the runs that are missing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.parts import UserError
from experiments.parts.command_line import Parser, exit_code, positive

if TYPE_CHECKING:
    from experiments.parts.replica_study import ReplicaStudy
    from experiments.parts.study import Run

STEPS = 200
DEFAULT = (
    "sync", "one-bit-adam", "ef21-top1", "ef-int8", "diloco", "noloco", "co2", "gossip"
)  # fmt: skip
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
    "seconds at 100 Gbit/s",
    "at 1 Gbit/s",
    "at 100 Mbit/s",
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = Parser(
        prog="python -m experiments.low_communication",
        description="Train a language model on replicas that send little.",
    )
    p.add_argument(
        "--methods",
        metavar="A,B,...",
        help="names separated by commas (--list shows them); sync is always added",
    )
    p.add_argument("--list", action="store_true", help="list methods and sizes, and end")
    p.add_argument("--replicas", type=positive, default=8, help="copies of the model")
    p.add_argument(
        "--sync-every", type=positive, default=20, metavar="STEPS", help="local steps in a round"
    )
    p.add_argument(
        "--size", default="0.15M", help="of the language model, 0.15M to 100M parameters"
    )
    p.add_argument(
        "--text", metavar="FILE", help="UTF-8 text (the topics of Python's documentation)"
    )
    p.add_argument("--seeds", type=positive, default=2, help="seeds at the best learning rate")
    p.add_argument("--rates", type=positive, default=3, help="learning rates in each search")
    p.add_argument(
        "--budget",
        type=positive,
        default=STEPS,
        metavar="STEPS",
        help="steps of one run, a multiple of 20",
    )
    p.add_argument(
        "--warm-start",
        type=_steps,
        default=0,
        metavar="STEPS",
        help="synchronous steps from whose weights every run starts, a multiple of 20",
    )
    p.add_argument(
        "--processes",
        type=positive,
        metavar="K",
        help="train in K real processes on this machine, with a CPU device for each replica "
        "(default: replicas simulated on one device)",
    )
    p.add_argument(
        "--out",
        type=Path,
        default=Path("results") / "low_communication",
        metavar="DIR",
        help="where results are kept",
    )
    return p


def _steps(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is neither 0 nor a positive whole number")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)

    def action() -> None:
        began = time.monotonic()
        options = parser().parse_args(arguments)
        if options.list:
            _list()
        else:
            _start(options, arguments, began)

    return exit_code("low_communication", action)


def _start(options: argparse.Namespace, arguments: list[str], began: float) -> None:
    from experiments.parts.processes import is_child, join_processes, run_processes

    if not is_child():
        # Importing jax and flax takes seconds on a cold disk; nobody should wonder.
        print("low_communication: loading jax, optax and flax ...", flush=True)
        processes = options.processes
        if processes:
            if options.replicas % processes:
                raise UserError(
                    f"--processes {processes}: does not divide --replicas {options.replicas}"
                )
            devices = options.replicas // processes
            run_processes("experiments.low_communication", arguments, processes, devices)
            return
    join_processes()
    _low_communication(options, arguments, began)


def _low_communication(options: argparse.Namespace, arguments: list[str], began: float) -> None:
    import jax
    from rich.console import Console

    from experiments.parts import communication, replica_study
    from experiments.parts.environment import environment
    from experiments.parts.language_model import SIZES, language_model
    from experiments.parts.optimizers import WEIGHT_DECAY
    from experiments.parts.progress import Progress
    from experiments.parts.store import Store, read_json
    from experiments.parts.training import EVALUATIONS
    from jaxopt_lab.distributed import device_replicas, simulated_replicas

    steps, out = options.budget, options.out
    for option, given in (("--budget", steps), ("--warm-start", options.warm_start)):
        if given % EVALUATIONS:
            raise UserError(
                f"{option} {given}: expected a multiple of {EVALUATIONS}, the number of evaluations"
            )
    setting = communication.Setting(steps, options.replicas, options.sync_every, options.warm_start)
    names = [n.strip() for n in (options.methods or ",".join(DEFAULT)).split(",")]
    # A replica has an eighth of the batch of a single model of this size.
    batch_size = max(1, SIZES[options.size].batch_size // 8) if options.size in SIZES else None
    workload = language_model(options.size, options.text, batch_size)
    found = communication.contenders([name for name in names if name], setting, workload)
    communication.shards(workload, options.replicas)
    origin = environment(arguments)
    settings = {
        **workload.identity,
        **setting._asdict(),
        "processes": options.processes or 0,
        "weight_decay": WEIGHT_DECAY,
        "device": origin["device"],
        **{name: origin["versions"][name] for name in ("jax", "optax", "flax")},
    }
    first = jax.process_index() == 0
    kind = Store if first else replica_study.FollowingStore
    store = kind(out, settings)
    if (out / "results.json").exists():
        read_json(out / "results.json", "low_communication")  # never overwrite what is not ours
    axis = communication.AXIS
    replicas = (
        device_replicas(axis) if options.processes else simulated_replicas(options.replicas, axis)
    )
    study = replica_study.ReplicaStudy(
        workload, found, store, setting=setting, replicas=replicas, rates=options.rates,
        seeds=options.seeds,
    )  # fmt: skip
    console = Console(quiet=not first)
    if not console.is_terminal:
        console.width = 120
    where = f"{options.processes} processes" if options.processes else "one device"
    warm = f" after {options.warm_start} synchronous ones" if options.warm_start else ""
    console.print(
        f"{workload.name}: {settings['parameters']:,} parameters, {options.replicas} replicas on "
        f"{where}, {len(found)} methods x ({options.rates} learning rates + {options.seeds - 1} "
        f"more seeds) x {steps} steps{warm}; results in {out}",
        highlight=False,
        soft_wrap=True,
    )
    with Progress(study.total_steps, console) as progress:
        runs, seconds = study.run(progress), study.time(progress)
    if first:
        _report(study, runs, seconds, {**origin, "settings": settings}, console)
        console.print(f"{time.monotonic() - began:.0f} s in all", highlight=False)


def _report(
    study: ReplicaStudy,
    runs: dict[str, list[Run]],
    seconds: dict[str, list[float]],
    origin: dict[str, Any],
    console: Any,
) -> None:
    from experiments.parts.communication_summary import loss_by_bytes, table, verdict
    from experiments.parts.figures import rate_search
    from experiments.parts.report import html_page, terminal_table
    from experiments.parts.store import write_atomically, write_json

    out, unit, setting = study.store.out, study.workload.loss_unit, study.setting
    wires = study.sent()
    at_once = setting.replicas if study.on_devices else 1
    rows = table(study.candidates, setting, runs, wires, seconds, at_once)
    sentences = verdict(rows)
    cells = [row_cells(row) for row in rows]
    pictures = {
        "bytes.png": loss_by_bytes(rows, setting, runs, wires, unit),
        "rates.png": rate_search(runs, rows, unit),
    }
    captions = (
        "Validation loss of the mean model over steps and over bytes sent, at the best learning "
        "rate: mean of the seeds, their range shaded",
        "Search of the learning rate",
    )
    grids = {c.name: c.grid(study.rates) for c in study.candidates}
    record = {**origin, "rates": study.rates, "seeds": study.seeds, "learning_rates": grids}
    results = {
        "kind": "low_communication",
        **record,
        "warm_start": study.warm_start,
        "verdict": sentences,
        "table": rows,
        "sent_by_kind": {name: wire.by_kind() for name, wire in wires.items()},
        "seconds_per_step": seconds,
        "runs": [run for found in runs.values() for run in found],
    }
    title = "What replicas must send"
    page = html_page(
        title=title,
        verdict=sentences,
        header=HEADER,
        cells=cells,
        method=method(study),
        pictures=dict(zip(captions, pictures.values(), strict=True)),
        record=record,
    )
    for name, picture in pictures.items():
        write_atomically(out / name, picture)
    write_atomically(out / "report.html", page)
    write_json(out / "results.json", results)
    console.print(terminal_table(f"{title} (loss in {unit})", HEADER, cells))
    for line in sentences:
        console.print(line, highlight=False)
    console.print(f"written: {out}/results.json, {', '.join(pictures)}, report.html",
                  highlight=False, soft_wrap=True)  # fmt: skip


def row_cells(row: dict[str, Any]) -> list[str]:
    """One row of the table as text, under `HEADER`."""

    def number(key: str, form: str, scale: float = 1.0) -> str:
        return "-" if row[key] is None else format(row[key] * scale, form)

    percent = row["percent_above_sync"]
    return [
        row["optimizer"],
        number("learning_rate", "g") + ("*" if row["learning_rate_at_edge"] else ""),
        "diverged" if row["final_loss"] is None else number("final_loss", ".4f"),
        "-" if percent is None else f"{percent:+.2f}%",
        number("single_loss", ".4f"),
        number("bytes_per_step", ",.0f"),
        number("bytes_per_step_peak", ",.0f"),
        number("times_fewer_bytes", ".1f"),
        number("seconds_per_step", ".2f", 1e3),
        *(f"{seconds:.3g}" for seconds in row["modelled_seconds"].values()),
    ]


def method(study: ReplicaStudy) -> list[str]:
    """How it was done, in paragraphs."""
    from experiments.parts import communication

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
        f"step: {communication.DILOCO_MOMENTUM}, as 0.9 ended higher in runs of 200 and of 600 "
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
        "a round of it takes the longer of the two. The time of computing is measured, with the "
        f"compiled loops taking turns for 7 rounds: {computing}. It includes packing and "
        "unpacking; one-bit-adam is timed after its warm-up.",
    ]


def _list() -> None:
    from experiments.parts.communication import METHODS
    from experiments.parts.language_model import SIZES

    print("methods:")
    for name, method in METHODS.items():
        print(f"  {name:14} {method.text}")
    print("sizes of the language model: " + ", ".join(SIZES))


if __name__ == "__main__":
    sys.exit(main())
