"""Does a language model learn as well when its products are in few bits?

`python -m experiments.quantized_training` trains the small language model with every product of
inputs and weights in float32, with int8 forward products and with int8 products in both passes,
from the same seeds on the same batches, and prints the validation losses.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax
from rich.console import Console
from rich.table import Table

from experiments.harness import EVALUATIONS
from experiments.harness.environment import write_figures
from experiments.harness.training import TrainLoop, train
from experiments.workloads.language_model import language_model
from pallas_kernels import quantized_dot_general

PRODUCTS = {
    "float32": jax.lax.dot_general,
    "int8": quantized_dot_general("int8"),
    "int8 in both passes": quantized_dot_general("int8", backward="both"),
}


def losses(name: str, steps: int, seeds: Sequence[int], size: str) -> list[float | None]:
    """Returns the last validation loss of each seed, with the products of that name throughout."""
    workload = language_model(size, dot_general=PRODUCTS[name])
    loop = TrainLoop(workload, optax.adamw, steps)
    validation = jax.jit(workload.validation_loss)

    def evaluate(state: Any) -> float:
        return float(validation(state.params, workload.data))

    found = []
    for seed in seeds:
        curve, _ = train(loop, steps, evaluate, workload.learning_rate, seed)
        found.append(curve["validation_loss"][-1])
    return found


def rows(found: Mapping[str, Sequence[float | None]]) -> list[list[str]]:
    """Returns name, mean, spread (the range over seeds) and the difference to float32 by seed."""
    table = []
    for name, values in found.items():
        if None in values:
            table.append([name, "diverged", "", ""])
            continue
        differences = [x - y for x, y in zip(values, found["float32"], strict=True)]  # type: ignore[operator]
        spread = max(values) - min(values)  # type: ignore[type-var]
        of_float = "" if name == "float32" else f"{statistics.mean(differences):+.4f}"
        table.append([name, f"{statistics.mean(values):.4f}", f"{spread:.4f}", of_float])  # type: ignore[arg-type]
    return table


HEADER = ["products", "validation loss, nats", "range over seeds", "beside float32, same seeds"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=300, help=f"a multiple of {EVALUATIONS}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", default="0.15M")
    parser.add_argument("--out", type=pathlib.Path, help="write the losses to this JSON file")
    options = parser.parse_args(argv)
    if options.steps < EVALUATIONS or options.steps % EVALUATIONS or options.seeds < 1:
        parser.error(f"--steps must be a multiple of {EVALUATIONS}, and --seeds positive")
    console = Console()
    found = {}
    for name in PRODUCTS:
        found[name] = losses(name, options.steps, range(options.seeds), options.size)
        console.print(f"{name}: {found[name]}")
    table = Table(*HEADER)
    for row in rows(found):
        table.add_row(*row)
    console.print(table)
    settings = {"steps": options.steps, "size": options.size}
    write_figures(options.out, "quantized_training", **settings, losses=found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
