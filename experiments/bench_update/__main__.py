"""What does one update step cost beside optax's, on the machine at hand?

`python -m experiments.bench_update` times the jitted step (update and apply_updates, parameters and
state donated) of every rule on a tree of about 25M parameters shaped like a transformer. All steps
run in turn in one process, so that whatever else the machine does meets them all; reported are the
medians of the ratios of one round. Beside the time stands what explains it on a CPU: the bytes that
XLA needs beyond arguments and results, and how many copies it made to protect a donated buffer that
one kernel overwrites while another still reads it.

Projections are renewed every 200 steps. Their step is timed between two refreshes; the table says
what it takes on average over a period, with the measured time of a refresh. Beside those of low
rank stand the two products of each gradient with a basis, which no such step is without. For GaLore
a second table does so for other gaps, at a quarter of the width and at the published rank of 128.

`--compile` tells instead how long each step takes to trace, lower and compile, for trees of 20, 200
and 800 leaves, half kernels and half biases, beside `optax.adamw`'s on the same tree.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import track

from experiments.bench_update import compile_times, summary
from experiments.bench_update.methods import steps
from experiments.bench_update.study import measure, parameters
from experiments.harness import UserError
from experiments.harness.command_line import Call, Parser, names, positive, run
from experiments.harness.environment import environment
from experiments.harness.store import write_json


def leaf_counts(text: str) -> tuple[int, ...]:
    counts = tuple(map(int, text.split(",")))
    if min(counts) < 2:
        raise argparse.ArgumentTypeError(f"expected numbers from 2 on, got {text}")
    return counts


def parser() -> Parser:
    """The command line."""
    p = Parser("bench_update", (__doc__ or "").split("\n\n")[0])
    p.add_argument(
        "--optimizers", type=names, default=list(steps(width=48)), help="names, with commas"
    )
    p.add_argument("--rounds", type=positive, default=15, help="executions of each step")
    p.add_argument("--compile", action="store_true", help="time the compiler instead")
    p.add_argument(
        "--leaves", default=compile_times.LEAVES, type=leaf_counts, help="numbers, with commas"
    )
    p.add_argument("--refreshes", type=positive, default=3, help="refreshes timed")
    p.add_argument("--width", type=positive, default=384)
    p.add_argument("--layers", type=positive, default=12)
    p.add_argument("--vocabulary", type=positive, default=8192)
    p.add_argument("--out", type=Path, help="write the figures to this JSON file")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    return run(parser(), argv, _bench)


def _bench(options: argparse.Namespace, call: Call) -> None:
    known = steps(width=48)
    for name in options.optimizers:
        if name not in known:
            raise UserError(f"--optimizers: unknown optimizer {name!r}; known: {', '.join(known)}")
    console = Console()
    if options.compile:
        compile_only(options, call, console)
        return
    params = parameters(options.width, options.layers, options.vocabulary)
    total = sum(x.size for x in jax.tree.leaves(params))
    console.print(f"{total / 1e6:.1f}M parameters on {jax.devices()[0].device_kind}")
    runs = measure(
        options.optimizers, params, options.rounds, options.refreshes, options.width, console
    )
    summary.show(runs, console)
    _keep(options, call, "bench_update", {"parameters": total, **summary.record(runs)})


def compile_only(options: argparse.Namespace, call: Call, console: Console) -> None:
    """Times the compiler; the widths of projections are those of the kernels there."""
    chosen = {
        name: step
        for name, step in steps(width=160).items()
        if name in [*options.optimizers, compile_times.BASE] and not name.startswith("products")
    }

    def tracked(items: Any, description: str) -> Any:
        return track(items, description, console=console, transient=True)

    runs = compile_times.measure(chosen, options.leaves, options.rounds, tracked)
    found = compile_times.summary(runs)
    compile_times.show(found, console)
    _keep(options, call, "bench_update_compile", {"compile": found, "rounds": options.rounds})


def _keep(options: argparse.Namespace, call: Call, kind: str, content: Mapping[str, Any]) -> None:
    """Writes the figures where they were asked for."""
    if options.out is not None:
        record = {"kind": kind, **content, "environment": environment(call.arguments)}
        write_json(options.out, record)


if __name__ == "__main__":
    sys.exit(main())
