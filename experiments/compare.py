"""Which optimizer reaches the target loss first, and at what cost?

    python -m experiments.compare
    python -m experiments.compare --workload digits --seeds 5
    python -m experiments.compare --optimizers adamw,lion --optimizer-from my_module:my_optimizer

Trains a small model on real data with every optimizer: a learning-rate search under an equal
budget, then several seeds at the best rate. `README.md` beside this file says what is measured.
Interrupt it at any time; the same command goes on with the runs that are missing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.parts import UserError
from experiments.parts.command_line import Parser, exit_code, positive

if TYPE_CHECKING:
    import argparse

    from experiments.parts.study import Run, Study
    from experiments.parts.workload import Workload

DEFAULT_OPTIMIZERS = "adamw,lion,adabelief,adamp,muon"
HEADER = (
    "optimizer",
    "best rate",
    "final loss",
    "steps to target",
    "seconds to target",
    "ms per step",
    "time / adamw",
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
    "The compiled loops take turns for 7 rounds; the time of a step relative to adamw's is the "
    "median of the ratios within a round, and seconds are that ratio times adamw's median, without "
    "compilation and evaluation. State is counted from the arrays of the optimizer's state.",
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = Parser(
        prog="python -m experiments.compare",
        description="Train a model with several optimizers: which reaches the target loss first?",
    )
    p.add_argument(
        "--optimizers",
        default=DEFAULT_OPTIMIZERS,
        metavar="A,B,...",
        help="names separated by commas (--list shows them); adamw is always added",
    )
    p.add_argument(
        "--optimizer-from",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION",
        help="your own: function(learning_rate) -> optax.GradientTransformation, where "
        "learning_rate is an optax schedule; repeatable",
    )
    p.add_argument("--list", action="store_true", help="list optimizers and sizes, and end")
    p.add_argument("--workload", choices=("language_model", "digits"), default="language_model")
    p.add_argument("--size", help="of the language model, 0.15M to 100M parameters (0.15M)")
    p.add_argument(
        "--text",
        metavar="FILE",
        help="UTF-8 text for the language model (the topics of Python's documentation)",
    )
    p.add_argument("--seeds", type=positive, default=2, help="seeds at the best learning rate")
    p.add_argument("--rates", type=positive, default=3, help="learning rates in each search")
    p.add_argument(
        "--budget",
        type=positive,
        metavar="STEPS",
        help="steps of one run, a multiple of 20 (language_model 400, digits 300)",
    )
    p.add_argument("--batch-size", type=positive, help="examples per step (by size)")
    p.add_argument(
        "--target",
        type=float,
        metavar="LOSS",
        help="target loss (adamw's own after 90%% of its budget)",
    )
    p.add_argument(
        "--out", type=Path, metavar="DIR", help="where results are kept (results/compare-WORKLOAD)"
    )
    return p  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)

    def action() -> None:
        began = time.monotonic()
        options = parser().parse_args(arguments)
        # Importing jax and flax takes seconds on a cold disk; nobody should wonder.
        print("compare: loading jax, optax and flax ...", flush=True)
        if options.list:
            _list()
        else:
            _compare(options, arguments, began)

    return exit_code("compare", action)


def _compare(options: argparse.Namespace, arguments: list[str], began: float) -> None:
    from rich.console import Console

    from experiments.parts.environment import environment
    from experiments.parts.optimizers import WEIGHT_DECAY, candidates
    from experiments.parts.progress import Progress
    from experiments.parts.store import Store, read_json
    from experiments.parts.study import Study
    from experiments.parts.training import EVALUATIONS

    workload = _workload(options)
    steps = options.budget or workload.steps
    if steps % EVALUATIONS:
        raise UserError(
            f"--budget {steps}: expected a multiple of {EVALUATIONS}, the number of evaluations"
        )
    names = [name.strip() for name in options.optimizers.split(",") if name.strip()]
    contenders = candidates(names, options.optimizer_from, workload)
    origin = environment(arguments)
    settings = {
        **workload.identity,
        "steps": steps,
        "weight_decay": WEIGHT_DECAY,
        "device": origin["device"],
        **{name: origin["versions"][name] for name in ("jax", "optax", "flax")},
    }
    out = options.out or Path("results") / f"compare-{options.workload}"
    store = Store(out, settings)
    if (out / "results.json").exists():
        read_json(out / "results.json", "compare")  # never overwrite what is not ours
    study = Study(
        workload, contenders, store, steps=steps, rates=options.rates, seeds=options.seeds
    )
    console = Console()
    if not console.is_terminal:
        console.width = 100
    console.print(
        f"{workload.name}: {settings['parameters']:,} parameters, {len(contenders)} optimizers x "
        f"({options.rates} learning rates + {options.seeds - 1} more seeds) x {steps} steps; "
        f"results in {out}",
        highlight=False,
        soft_wrap=True,
    )
    with Progress(study.total_steps, console) as progress:
        runs, seconds = study.run(progress), study.time(progress)
    _report(study, runs, seconds, options.target, {**origin, "settings": settings}, console)
    console.print(f"{time.monotonic() - began:.0f} s in all", highlight=False)


def _workload(options: argparse.Namespace) -> Workload:
    if options.workload == "digits":
        for name in ("size", "text"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name} is for the language model, not for digits")
        from experiments.parts.digits import digits

        return digits(options.batch_size)
    from experiments.parts.language_model import language_model

    return language_model(options.size or "0.15M", options.text, options.batch_size)


def _report(
    study: Study,
    runs: dict[str, list[Run]],
    seconds: dict[str, list[float]],
    target: float | None,
    origin: dict[str, Any],
    console: Any,
) -> None:
    from experiments.parts.figures import loss_curves, rate_search
    from experiments.parts.optimizers import BASELINE
    from experiments.parts.report import html_page, terminal_table
    from experiments.parts.store import write_atomically, write_json
    from experiments.parts.summary import default_target, row, verdict

    out, unit = study.store.out, study.workload.loss_unit
    target = default_target(runs[BASELINE]) if target is None else target
    rows = [row(c, runs[c.name], target, seconds) for c in study.candidates]
    sentences = verdict(rows, target, unit)
    cells = [row_cells(r) for r in rows]
    curves = loss_curves(runs, rows, target, unit)
    search = rate_search(runs, rows, unit)
    grids = {
        c.name: {"learning_rates": c.grid(study.rates), "centre": c.reason}
        for c in study.candidates
    }
    record = {**origin, "rates": study.rates, "seeds": study.seeds, "grids": grids}
    results = {
        "kind": "compare",
        **record,
        "target": target,
        "verdict": sentences,
        "table": rows,
        "seconds_per_step": seconds,
        "runs": [run for found in runs.values() for run in found],
    }
    title = f"Optimizers on {study.workload.name}"
    pictures = {
        "Validation loss at the best learning rate: mean of the seeds, their range shaded": curves,
        "Search of the learning rate": search,
    }
    page = html_page(title=title, verdict=sentences, header=HEADER, cells=cells, method=METHOD,
                     pictures=pictures, record=record)  # fmt: skip
    write_atomically(out / "curves.png", curves)
    write_atomically(out / "rates.png", search)
    write_atomically(out / "report.html", page)
    write_json(out / "results.json", results)
    console.print(terminal_table(f"{title} (loss in {unit})", HEADER, cells))
    for line in sentences:
        console.print(line, highlight=False)
    console.print(f"written: {out}/results.json, curves.png, rates.png, report.html",
                  highlight=False, soft_wrap=True)  # fmt: skip


def row_cells(row: dict[str, Any]) -> list[str]:
    """One row of the table as text, under `HEADER`."""
    from experiments.parts.summary import loss_text

    def number(key: str, form: str, scale: float = 1.0) -> str:
        return "-" if row[key] is None else format(row[key] * scale, form)

    edge = "*" if row["learning_rate_at_edge"] else ""
    return [
        row["optimizer"],
        number("learning_rate", "g") + edge,
        loss_text(row),
        number("steps_to_target", ".0f"),
        number("seconds_to_target", ".3g"),
        number("seconds_per_step", ".2f", 1e3),
        number("step_time_ratio", ".2f"),
        number("state_bytes_per_parameter", ".2f"),
    ]


def _list() -> None:
    from experiments.parts.language_model import SIZES
    from experiments.parts.optimizers import KNOWN

    print("optimizers (centre of the grid, relative to adamw's):")
    for name, known in KNOWN.items():
        print(f"  {name:10} {known.rate_factor:<8.3g} {known.reason}")
    print("sizes of the language model (adamw's centre):")
    for name, size in SIZES.items():
        print(f"  {name:6} {size.layers} layers, width {size.width}, context {size.context}, "
              f"batch {size.batch_size}, learning rate {size.learning_rate:g}")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
