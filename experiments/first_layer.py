"""Does a small CNN learn more in equal epochs when its first layer is trained by TrAct?

`python -m experiments.first_layer` trains the classifier of `workloads/digits.py`, its inputs
standardised, with AdamW: plain, and with `pallas_kernels.tract_conv` at several dampings. Each has
the rate of three whose mean loss over `--seeds` seeds is the least; the held-out examples, on which
losses and errors are taken after the last step, are never trained on.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.table import Table

import pallas_kernels
from experiments.harness import training
from experiments.harness.environment import write_figures
from experiments.harness.workload import Workload
from experiments.workloads import digits

RATES = (1e-2, 3e-2, 1e-1)
CONTENDERS: dict[str, Callable[..., Any]] = {
    "plain": digits.convolution_by_matmul,
    "TrAct, damping 0.05": pallas_kernels.tract_conv(0.05),
    "TrAct, damping 0.1": pallas_kernels.tract_conv(0.1),
    "TrAct, damping 0.2": pallas_kernels.tract_conv(0.2),
}
Errors = Callable[[optax.Params], jax.Array]


def made(convolution: Callable[..., Any]) -> tuple[Workload, Errors]:
    """The workload with `convolution` in its first layer, and the share of errors."""

    def classifier(key: jax.Array) -> digits.Classifier:
        found = digits.Classifier(nnx.Rngs(key))
        found.first.conv_general_dilated = convolution
        return found

    base = digits.digits()
    pixels = base.data["train"][0]
    mean, spread = pixels.mean(), pixels.std()
    data = {name: ((x - mean) / spread, y) for name, (x, y) in base.data.items()}
    graph = nnx.split(nnx.eval_shape(lambda: classifier(jax.random.key(0))), nnx.Param)[0]

    def loss(params: optax.Params, batch: Any) -> jax.Array:
        inputs, targets = batch
        logits = nnx.merge(graph, params)(inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    @jax.jit
    def errors(params: optax.Params) -> jax.Array:
        inputs, targets = data["validation"]
        return jnp.mean(jnp.argmax(nnx.merge(graph, params)(inputs), -1) != targets)

    workload = dataclasses.replace(
        base,
        data=data,
        loss=loss,
        validation_loss=lambda params, data: loss(params, data["validation"]),
    )
    return workload, errors


def trained(convolution: Callable[..., Any], seeds: int, steps: int) -> dict[str, Any]:
    """Returns the best rate, and final losses and shares of errors by seed."""
    workload, errors = made(convolution)
    loop = training.TrainLoop(workload, optax.adamw, steps)
    validation = jax.jit(workload.validation_loss)

    def run(rate: float, seed: int) -> tuple[float, float]:
        state = loop.start(rate, seed)
        for _ in range(steps // loop.chunk_steps):
            state, _ = loop.run_chunk(state, rate, seed)
        return float(validation(state.params, workload.data)), float(errors(state.params))

    runs = {rate: [run(rate, seed) for seed in range(seeds)] for rate in RATES}
    rate = min(runs, key=lambda rate: float(np.mean([loss for loss, _ in runs[rate]])))
    losses, shares = map(list, zip(*runs[rate]))
    return {"rate": rate, "losses": losses, "errors": shares}


HEADER = ("first layer", "best rate", "loss, mean of seeds", "standard deviation", "errors")


def cells(name: str, figures: dict[str, Any]) -> list[str]:
    """The row of a contender."""
    losses = np.asarray(figures["losses"])
    spread = f"{losses.std(ddof=1):.4f}"
    errors = f"{np.mean(figures['errors']):.2%}"
    return [name, str(figures["rate"]), f"{losses.mean():.4f}", spread, errors]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="runs at each rate")
    parser.add_argument("--steps", type=int, default=100, help="steps of a run, of 64 images")
    parser.add_argument("--out", type=pathlib.Path, help="write the figures to this JSON file")
    options = parser.parse_args(argv)
    table, found = Table(*HEADER), {}
    for name, convolution in CONTENDERS.items():
        found[name] = trained(convolution, options.seeds, options.steps)
        table.add_row(*cells(name, found[name]))
    Console().print(table)
    write_figures(options.out, "first_layer", steps=options.steps, figures=found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
