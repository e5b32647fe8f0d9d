"""What do the schedules of this package look like over a run?

`python -m experiments.plot_schedules` evaluates each of them, trains a small classifier of digits
twice (once for the gradient norms that a refined schedule is made from, once a learning rate that
corrects itself), and writes one picture and one JSON file into `--out`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.harness import UserError
from experiments.harness.command_line import Call, Parser, loading, positive, run


def parser() -> Parser:
    """The command line."""
    p = Parser("plot_schedules", "Draw every learning-rate schedule of this package.")
    p.add_argument("--steps", type=positive, default=400, help="updates of a run, from 40 on")
    p.add_out(Path("results") / "schedules", "where schedules.png and schedules.json are written")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment; returns the exit code."""
    return run(parser(), argv, _plot)


def _plot(options: argparse.Namespace, call: Call) -> None:
    steps, out = options.steps, options.out
    if steps < 40:
        raise UserError(f"--steps {steps}: expected 40 or more")
    loading(call.script)
    from rich.console import Console

    from experiments.harness.environment import environment
    from experiments.harness.figures import png
    from experiments.harness.report import terminal_table
    from experiments.harness.store import make_folder, write_atomically, write_json
    from experiments.plot_schedules.methods import tables
    from experiments.plot_schedules.pictures import figure
    from experiments.plot_schedules.study import adaptive_rates, recorded_norms
    from experiments.plot_schedules.summary import HEADER, record, row_cells

    make_folder(out)
    norms = recorded_norms(steps)
    panels = tables(steps, norms)
    panels["A rate that corrects itself (hypergradient)"] = adaptive_rates(steps)
    found = record(panels, norms)
    write_atomically(out / "schedules.png", png(figure(panels, norms)))
    content = {"kind": "schedules", **environment(call.arguments), **found}
    write_json(out / "schedules.json", content)
    console = Console()
    if not console.is_terminal:
        console.width = 100
    cells = [row_cells(row) for row in found["table"]]
    console.print(terminal_table(f"Learning rates over {steps} updates", HEADER, cells))
    console.print(f"written: {out}/schedules.png, schedules.json", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
