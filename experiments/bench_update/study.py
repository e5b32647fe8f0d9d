"""Times every step once a round on the parameters of a decoder."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import track

from experiments.bench_update.methods import has_refresh, steps


def parameters(width: int, layers: int, vocabulary: int) -> dict[str, Any]:
    """A decoder's parameters: about 12 * layers * width**2 + vocabulary * width of them."""
    shapes: dict[str, Any] = {"embedding": (vocabulary, width)}
    for layer in range(layers):
        shapes[f"layer{layer}"] = {
            "norm1": (width,),
            "query": (width, width),
            "key": (width, width),
            "value": (width, width),
            "out": (width, width),
            "norm2": (width,),
            "up": {"kernel": (width, 4 * width), "bias": (4 * width,)},
            "down": {"kernel": (4 * width, width), "bias": (width,)},
        }
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    arrays = [0.02 * jax.random.normal(key, shape) for key, shape in zip(keys, leaves)]
    return jax.tree.unflatten(structure, arrays)


def timed(step: Callable[..., Any], carry: list[Any], grads: Any) -> float:
    begin = time.perf_counter()
    carry[:] = jax.block_until_ready(step(*carry, grads))
    return time.perf_counter() - begin


def measure(
    names: list[str], params: Any, rounds: int, refreshes: int, width: int, console: Console
) -> dict[str, Any]:
    """Runs every step once a round; returns seconds and what the compiler says, by name."""
    chosen = {name: pair for name, pair in steps(width).items() if name in names}
    grads = jax.tree.map(lambda p: 0.1 * p, params)
    runs = {}
    for name, (init, step) in track(chosen.items(), "compiling", console=console, transient=True):
        step = jax.jit(step, donate_argnums=(0, 1))
        compiled = step.lower(params, jax.eval_shape(init, params), grads).compile()
        runs[name] = {"step": compiled, "init": jax.jit(init), "seconds": [], "refresh_seconds": []}
    for _ in track(range(refreshes + 1), "first steps", console=console, transient=True):
        for run in runs.values():
            run["carry"] = [jax.tree.map(jnp.copy, params), run["init"](params)]
            run["refresh_seconds"].append(timed(run["step"], run["carry"], grads))
    for _ in track(range(rounds), "timing", console=console, transient=True):
        for run in runs.values():
            run["seconds"].append(timed(run["step"], run["carry"], grads))
    return {
        name: {
            "seconds": run["seconds"],
            # The very first execution also loads the program.
            "refresh_seconds": run["refresh_seconds"][1:] if has_refresh(name) else [],
            "temporary_bytes": run["step"].memory_analysis().temp_size_in_bytes,
            "copies": len(re.findall(r" copy\(", run["step"].as_text())),
        }
        for name, run in runs.items()
    }
