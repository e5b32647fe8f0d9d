"""How long a jitted step takes to trace, lower and compile, beside optax's AdamW."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from experiments.bench_update.methods import Step

BASE = "optax.adamw"
LEAVES = (20, 200, 800)
PARTS = ("trace", "lower", "compile")


def parameters(leaves: int) -> dict[str, Any]:
    """The shapes of half as many kernels as leaves and their biases: 8M parameters at 800."""
    return {
        f"layer{index}": {
            "kernel": jax.ShapeDtypeStruct((128, 160), jnp.float32),
            "bias": jax.ShapeDtypeStruct((160,), jnp.float32),
        }
        for index in range(leaves // 2)
    }


def seconds(step: Step, params: Any) -> dict[str, float]:
    """Compiles a step anew, with parameters and state donated, and returns its parts' seconds."""
    init, update = step
    state = jax.eval_shape(init, params)

    # Another function each time: what was traced before is not found again.
    def anew(params: Any, state: Any, grads: Any) -> Any:
        return update(params, state, grads)

    times = [time.perf_counter()]
    traced = jax.jit(anew, donate_argnums=(0, 1)).trace(params, state, params)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    lowered.compile()
    times.append(time.perf_counter())
    return dict(zip(PARTS, (after - before for before, after in itertools.pairwise(times))))


def measure(
    steps: Mapping[str, Step], leaves: Sequence[int], rounds: int, track: Callable[..., Iterable]
) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Compiles every step once a round, in turn, with AdamW's first; by leaves and by name."""
    names = [BASE, *(name for name in steps if name != BASE)]
    runs: dict[str, dict[str, list[dict[str, float]]]] = {}
    cached = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        # The first compilation of a process also starts the compiler.
        seconds(steps[BASE], parameters(2))
        for count in leaves:
            of = runs.setdefault(str(count), {name: [] for name in names})
            for _ in track(range(rounds), f"{count} leaves"):
                for name in names:
                    of[name].append(seconds(steps[name], parameters(count)))
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
    return runs


def total(run: Mapping[str, float]) -> float:
    return sum(run[part] for part in PARTS)


def summary(runs: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Median seconds by part and in all, and the median over rounds of the ratio to AdamW's."""
    return {
        count: {
            name: {part: statistics.median(run[part] for run in of[name]) for part in PARTS}
            | {
                "seconds": statistics.median(map(total, of[name])),
                "ratio": statistics.median(
                    total(ours) / total(base) for ours, base in zip(of[name], of[BASE])
                ),
            }
            for name in of
        }
        for count, of in runs.items()
    }


def show(found: Mapping[str, Any], console: Console) -> None:
    counts = list(found)
    headings = [f"{part} {count}" for count in counts for part in ("s", "ratio")]
    table = Table(f"compile seconds by leaves, ratio to {BASE}", *headings)
    for name in found[counts[0]]:
        cells = []
        for count in counts:
            cells += [f"{found[count][name]['seconds']:.2f}", f"{found[count][name]['ratio']:.2f}"]
        table.add_row(name, *cells)
    console.print(table)
