"""What do an output layer and its loss cost here, with and without logits in memory?

Forward, and forward with the gradients of hidden states and weight, by the plain form (a product,
then optax's loss) and by both plans of `pallas_kernels.cross_entropy`. All contenders of a shape
take turns, each timed right after an untimed execution of its own. Reported are medians, the median
of the ratios within a round, and the compiled program's temporary memory.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import track

from experiments.bench_cross_entropy import methods
from experiments.bench_cross_entropy.methods import Shape
from experiments.bench_cross_entropy.study import measure
from experiments.bench_cross_entropy.summary import HEADER, rows
from experiments.harness.command_line import Call, Parser, positive, run
from experiments.harness.environment import environment
from experiments.harness.report import terminal_table
from experiments.harness.store import write_json


def shape(text: str) -> Shape:
    try:
        return Shape.parse(text)
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"expected tokens,width,vocabulary,dtype, got {text}"
        ) from error


def parser() -> Parser:
    """The command line."""
    p = Parser("bench_cross_entropy", (__doc__ or "").split("\n\n")[0])
    p.add_argument("--rounds", type=positive, default=7, help="executions of each program")
    p.add_argument(
        "--shape",
        type=shape,
        action="append",
        metavar="TOKENS,WIDTH,VOCABULARY,DTYPE",
        help="in place of the listed ones; may be repeated",
    )
    p.add_argument("--out", type=Path, help="write the figures to this JSON file")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    return run(parser(), argv, _bench)


def _bench(options: argparse.Namespace, call: Call) -> None:
    console = Console()
    all_measured = []
    shapes = options.shape or methods.shapes(jax.default_backend())
    for each in track(shapes, "timing", console=console, transient=True):
        measured = measure(each, options.rounds)
        all_measured.append(measured)
        console.print(terminal_table(str(each), HEADER, rows(measured)))
    if options.out is not None:
        record = {"kind": call.script, "environment": environment(call.arguments)}
        write_json(options.out, record | {"shapes": all_measured})


if __name__ == "__main__":
    sys.exit(main())
