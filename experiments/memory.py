"""What does each byte of optimizer state buy?

    python -m experiments.memory
    python -m experiments.memory --contenders adamw,frugal-0.5,galore-0.5 --seeds 5
    python -m experiments.memory --text my.txt --size 10M --budget 2000

Trains a small language model with budgets of optimizer state from none to AdamW's: a learning-rate
search under an equal budget, then several seeds at the best rate. `README.md` beside this file says
what is measured. Interrupt it at any time; the same command goes on with the runs that are missing.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.parts import UserError
from experiments.parts.command_line import Parser, exit_code, positive

if TYPE_CHECKING:
    import argparse

    from experiments.parts.budgets import Shape
    from experiments.parts.study import Run, Study
    from experiments.parts.workload import Workload

STEPS = 300
HEADER = (
    "optimizer",
    "best rate",
    "final loss",
    "lowest to highest seed",
    "difference in spreads of adamw",
    "state bytes / param.",
    "ms per step",
    "time / adamw",
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = Parser(
        prog="python -m experiments.memory",
        description="Train a language model under several budgets of optimizer state.",
    )
    p.add_argument(
        "--contenders",
        metavar="A,B,...",
        help="names separated by commas (--list shows them); adamw is always added",
    )
    p.add_argument("--list", action="store_true", help="list contenders and sizes, and end")
    p.add_argument(
        "--size", default="0.15M", help="of the language model, 0.15M to 100M parameters"
    )
    p.add_argument(
        "--text", metavar="FILE", help="UTF-8 text (the topics of Python's documentation)"
    )
    p.add_argument("--seeds", type=positive, default=3, help="seeds at the best learning rate")
    p.add_argument("--rates", type=positive, default=3, help="learning rates in each search")
    p.add_argument(
        "--budget",
        type=positive,
        default=STEPS,
        metavar="STEPS",
        help="steps of one run, a multiple of 20",
    )
    p.add_argument("--batch-size", type=positive, help="windows per step (by size)")
    p.add_argument(
        "--out",
        type=Path,
        default=Path("results") / "memory",
        metavar="DIR",
        help="where results are kept",
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)

    def action() -> None:
        began = time.monotonic()
        options = parser().parse_args(arguments)
        # Importing jax and flax takes seconds on a cold disk; nobody should wonder.
        print("memory: loading jax, optax and flax ...", flush=True)
        if options.list:
            _list()
        else:
            _memory(options, arguments, began)

    return exit_code("memory", action)


def _memory(options: argparse.Namespace, arguments: list[str], began: float) -> None:
    from rich.console import Console

    from experiments.parts.budgets import DEFAULT, Shape, contenders
    from experiments.parts.environment import environment
    from experiments.parts.language_model import SIZES, language_model
    from experiments.parts.optimizers import WEIGHT_DECAY
    from experiments.parts.progress import Progress
    from experiments.parts.store import Store, read_json
    from experiments.parts.study import Study
    from experiments.parts.training import EVALUATIONS

    steps, out = options.budget, options.out
    if steps % EVALUATIONS:
        raise UserError(
            f"--budget {steps}: expected a multiple of {EVALUATIONS}, the number of evaluations"
        )
    names = [name.strip() for name in (options.contenders or ",".join(DEFAULT)).split(",")]
    workload = language_model(options.size, options.text, options.batch_size)
    shape = Shape(steps, SIZES[options.size].width)
    found = contenders([name for name in names if name], workload, shape)
    origin = environment(arguments)
    settings = {
        **workload.identity,
        "steps": steps,
        "weight_decay": WEIGHT_DECAY,
        "device": origin["device"],
        **{name: origin["versions"][name] for name in ("jax", "optax", "flax")},
    }
    store = Store(out, settings)
    if (out / "results.json").exists():
        read_json(out / "results.json", "memory")  # never overwrite what is not ours
    study = Study(workload, found, store, steps=steps, rates=options.rates, seeds=options.seeds)
    console = Console()
    if not console.is_terminal:
        console.width = 100
    console.print(
        f"{workload.name}: {settings['parameters']:,} parameters, {len(found)} contenders x "
        f"({options.rates} learning rates + {options.seeds - 1} more seeds) x {steps} steps; "
        f"results in {out}",
        highlight=False,
        soft_wrap=True,
    )
    with Progress(study.total_steps, console) as progress:
        runs, seconds = study.run(progress), study.time(progress)
    _report(study, shape, runs, seconds, {**origin, "settings": settings}, console)
    console.print(f"{time.monotonic() - began:.0f} s in all", highlight=False)


def _report(
    study: Study,
    shape: Shape,
    runs: dict[str, list[Run]],
    seconds: dict[str, list[float]],
    origin: dict[str, Any],
    console: Any,
) -> None:
    from experiments.parts.budget_summary import table, verdict
    from experiments.parts.figures import loss_by_state, loss_curves, rate_search
    from experiments.parts.report import html_page, terminal_table
    from experiments.parts.store import write_atomically, write_json

    out, unit = study.store.out, study.workload.loss_unit
    rows = table(study.candidates, runs, seconds)
    sentences = verdict(rows)
    cells = [row_cells(row) for row in rows]
    pictures = {
        "budget.png": loss_by_state(rows, unit),
        "curves.png": loss_curves(runs, rows, None, unit),
        "rates.png": rate_search(runs, rows, unit),
    }
    captions = (
        "Final validation loss over bytes of state: mean of the seeds, a bar for their range; "
        "nothing ends left of and below the grey line",
        "Validation loss at the best learning rate: mean of the seeds, their range shaded",
        "Search of the learning rate",
    )
    grids = {
        c.name: {"learning_rates": c.grid(study.rates), "centre": c.reason}
        for c in study.candidates
    }
    record = {**origin, "rates": study.rates, "seeds": study.seeds, "grids": grids}
    results = {
        "kind": "memory",
        **record,
        "verdict": sentences,
        "table": rows,
        "seconds_per_step": seconds,
        "runs": [run for found in runs.values() for run in found],
    }
    title = "What each byte of optimizer state buys"
    page = html_page(
        title=title,
        verdict=sentences,
        header=HEADER,
        cells=cells,
        method=method(shape, study.workload),
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

    diverged = row["final_loss"] is None
    edge = "*" if row["learning_rate_at_edge"] else ""
    ends = f"{number('final_loss_low', '.4f')} to {number('final_loss_high', '.4f')}"
    return [
        row["optimizer"],
        number("learning_rate", "g") + edge,
        "diverged" if diverged else number("final_loss", ".4f"),
        "-" if diverged else ends,
        number("excess_in_spreads", "+.1f"),
        number("state_bytes_per_parameter", ".2f"),
        number("seconds_per_step", ".2f", 1e3),
        number("step_time_ratio", ".2f"),
    ]


def method(shape: Shape, workload: Workload) -> list[str]:
    """How it was done, in paragraphs."""
    import jax

    import jaxopt_lab
    from experiments.parts.budgets import REFRESHES

    params = jax.eval_shape(workload.init, jax.random.key(0))
    found = jaxopt_lab.subspace.treatments(jaxopt_lab.frugal_adamw(1e-3), params).parameters
    full = sum(math.prod(one.leaf.shape) for one in found if one.kind == "full")
    share = full / workload.identity["parameters"]
    return [
        "Every contender trains from the same initial weights, on the same batches, under the same "
        "schedule (linear warm-up over a tenth of the steps, then a cosine to a tenth of the peak) "
        "and with the same number of learning rates, a factor of 3 apart around a centre of its "
        "own. The rate whose run with seed 0 ends lowest is trained with the other seeds too. "
        "Weight decay applies to leaves with two or more axes; rate times decay is the same for "
        "every contender at the centre of its grid.",
        "State is counted from the arrays of the optimizer's state, selections, bases, scales and "
        "counters included, and divided by the number of all parameters. FRUGAL, GaLore and DCT "
        "split hidden matrices only: embeddings, output layer and norms keep Adam's moments, here "
        f"{share:.1%} of the parameters, which is {8 * share:.2f} bytes a parameter; in a large "
        "model this share is small. The number after the name is the density: the fraction of a "
        f"hidden matrix that has moments, for GaLore and DCT by a rank of density times "
        f"{shape.width}. GaLore also keeps its bases.",
        "int8 is block-wise with dynamic levels, bf16 is rounded stochastically; leaves with fewer "
        "than 4,096 elements, the norms, stay exact.",
        f"FRUGAL, GaLore and BAdam change what has state every {shape.update_gap} steps, "
        f"{REFRESHES} times a run, and DCT at every step. The papers wait 50 to 200 steps in runs "
        "of ten thousand and more. GaLore's scale is 1, and its "
        "directions are found as eigenvectors of the Gram matrix. BAdam trains one layer at a "
        "time, a method for fine-tuning; sgd has no momentum.",
        "Differences are given in sample standard deviations of adamw's seeds, and count in the "
        "sentences above if they exceed one. The compiled loops take turns for 7 rounds; the time "
        "of a step relative to adamw's is the median of the ratios within a round, without "
        "compilation and evaluation.",
    ]


def _list() -> None:
    from experiments.parts.budgets import BUDGETS
    from experiments.parts.language_model import SIZES

    print("contenders (centre of the grid, relative to adamw's):")
    for name, budget in BUDGETS.items():
        shown = f"{name}-DENSITY" if budget.by_density else name
        print(f"  {shown:14} {budget.rate_factor:<8.3g} {budget.reason}")
    print("sizes of the language model: " + ", ".join(SIZES))


if __name__ == "__main__":
    sys.exit(main())
