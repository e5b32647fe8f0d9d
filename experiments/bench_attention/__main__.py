"""What does attention cost here, by each route of `pallas_kernels` and by the codes around it?

Forward, forward with the gradients of query, key and value, and forward with the tangent of the
output where all three move (jvp, in forward mode), over a list of shapes. All
contenders of a shape take turns, each timed right after an untimed execution of its own: what
the one before left to be freed, a gigabyte of scores perhaps, is not its cost. Reported are
medians, TFLOP/s, the compiled program's temporary memory, and the error against the next wider
dtype. TFLOP/s count 4 B N T S d operations forward and 2.5 times as many more for the gradients, or
the tangent, half of all under a causal mask, whatever a code computes.

``--tune`` times what the routes offer for their blocks instead, kernel by kernel, and ``--write``
saves the fastest for the chip it runs on in the file that the routes read.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import track

from experiments.bench_attention import methods, tuning
from experiments.bench_attention.methods import Shape
from experiments.bench_attention.pictures import picture
from experiments.bench_attention.study import compile_one, draw, measure, passes
from experiments.bench_attention.summary import HEADER, rows
from experiments.bench_attention.tuning import Trial
from experiments.harness import UserError
from experiments.harness.command_line import Call, Parser, positive, run
from experiments.harness.environment import environment
from experiments.harness.report import terminal_table
from experiments.harness.store import make_folder, write_atomically, write_json
from pallas_kernels.attention import tuning as block_sizes


def parser() -> Parser:
    """The command line."""
    p = Parser("bench_attention", (__doc__ or "").split("\n\n")[0])
    p.add_argument("--rounds", type=positive, default=7, help="executions of each program")
    p.add_argument(
        "--shapes", default="", help="words that a shape's name contains, joined by commas"
    )
    p.add_argument("--list", action="store_true", help="list the shapes and stop")
    p.add_argument(
        "--tune", nargs="*", metavar="ROUTE", help="find the blocks of these routes, or of all"
    )
    p.add_argument("--write", action="store_true", help="save what --tune finds")
    p.add_argument("--table", type=Path, default=block_sizes.TABLE, help="where --write saves")
    p.add_out(Path("results") / "bench-attention")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    return run(parser(), argv, _bench)


def _bench(options: argparse.Namespace, call: Call) -> None:
    console = Console()
    shapes = chosen(options.shapes, jax.default_backend())
    if options.list:
        console.print("\n".join(map(str, shapes)))
        return
    if options.tune is not None:
        plain = [shape for shape in shapes if shape.feature is None]
        trials = tune(options.tune, plain, options.rounds, console)
        if options.write:
            write(trials, options.table, call.arguments, console)
        return
    all_measured = []
    for shape in track(shapes, "timing", console=console, transient=True):
        measured = measure(shape, options.rounds)
        all_measured.append(measured)
        console.print(terminal_table(str(shape), HEADER, rows(shape, measured)))
    make_folder(options.out)
    record = {
        "kind": call.script,
        "environment": environment(call.arguments),
        "shapes": all_measured,
    }
    write_json(options.out / "bench_attention.json", record)
    write_atomically(options.out / "bench_attention.png", picture(shapes, all_measured))
    console.print(f"wrote bench_attention.json and .png to {options.out}")


def chosen(pattern: str, platform: str) -> list[Shape]:
    every = methods.shapes(platform)
    found = [shape for shape in every if all(word in str(shape) for word in pattern.split(","))]
    if not found:
        raise UserError(f"--shapes {pattern}: matches none of {'; '.join(map(str, every))}")
    return found


def tune(names: list[str], shapes: list[Shape], rounds: int, console: Console) -> list[Trial]:
    """Times what the named routes, or all that serve a shape here, offer for their blocks."""
    for name in names:
        if name not in methods.ROUTES:
            known = ", ".join(methods.ROUTES)
            raise UserError(f"--tune {name}: no route with blocks; expected some of {known}")
    trials: list[Trial] = []
    for shape in shapes:
        arrays = draw(shape)

        def compiled(fn: Any, which: str, arrays: Any = arrays) -> Any:
            program = compile_one(passes(fn)[which], arrays)
            return program if isinstance(program, str) else functools.partial(program, *arrays)

        for name, reason in tuning.refusals(shape).items():
            if names and name not in names:
                continue
            if reason is not None:
                if names:
                    console.print(f"{shape}: {name} {reason}")
                continue
            with console.status(f"tuning {name} on {shape}"):
                found = tuning.tune(name, shape, rounds, compiled)
            title, header = f"{name}, {shape}", tuning.HEADER
            console.print(terminal_table(title, header, [x.row() for x in found]))
            for trial in found:
                for blocks, error in trial.errors.items():
                    words = f"{trial.kernel} {tuning.written(blocks)}: {error}"
                    console.print(words, markup=False, highlight=False)
            trials += found
    if not trials:
        raise UserError("--tune: none of these routes serves any of these shapes here")
    return trials


def write(trials: list[Trial], table: Path, arguments: list[str], console: Console) -> None:
    """Saves the fastest blocks for the chip that they were measured on."""
    kind = jax.devices()[0].device_kind
    record = environment(arguments)
    note = f"{kind} measured on {record['date'][:10]} with jax {record['versions']['jax']}"
    block_sizes.save([x.entry(kind) for x in trials if x.best is not None], note, table)
    console.print(f"wrote {table}")


if __name__ == "__main__":
    sys.exit(main())
