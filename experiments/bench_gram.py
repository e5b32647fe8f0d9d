"""When does `pallas_kernels.gram` pay, and what does it save of a step of Muon?

`python -m experiments.bench_gram` runs the product and the step, on float32 matrices of several
sides, in turn with the plain ones, and prints the median ratio of a round: of processor time, all
threads together, which does not count waiting for a core.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import jaxopt_lab
import pallas_kernels
from experiments.harness.environment import write_figures
from experiments.harness.timing import times_as_fast

SHAPES = ((256, 256), (512, 512), (1024, 1024), (2048, 2048), (512, 2048))
STEPS = ((256, 256), (512, 512), (1024, 1024))
ROUNDS = 7


def plain(x: jax.Array) -> jax.Array:
    return jnp.matmul(x, x.mT, precision="highest")


ours = functools.partial(pallas_kernels.gram, precision="highest")


def step(gram: Callable[..., jax.Array] | None, params: Any) -> tuple[Callable[..., Any], Any]:
    """One update of Muon, with its arguments."""
    tx = jaxopt_lab.muon(0.02, gram=gram)
    return tx.update, (params, tx.init(params), params)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--out", type=pathlib.Path, help="write the figures to this JSON file")
    options = parser.parse_args(argv)
    table, found = Table("shape", "gram, times as fast", "step of muon"), {}
    for shape in SHAPES:
        x = jax.random.normal(jax.random.key(0), shape)
        figures = {"gram": times_as_fast((ours, (x,)), (plain, (x,)), ROUNDS)}
        if shape in STEPS:
            params = {"up": {"kernel": x}, "down": {"kernel": x}}
            figures["muon"] = times_as_fast(
                step(pallas_kernels.gram, params), step(None, params), ROUNDS
            )
        found["x".join(map(str, shape))] = figures
        table.add_row(str(shape), *(f"{ratio:.2f}" for ratio in figures.values()))
    Console().print(table)
    write_figures(options.out, "bench_gram", figures=found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
