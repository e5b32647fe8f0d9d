"""The tables of a shape: operations, memory and errors of every contender."""

from __future__ import annotations

import statistics
from typing import Any

from experiments.bench_attention.methods import Shape
from experiments.bench_attention.study import PASSES

BASE = "jax.nn xla"
HEADER = ("code", "pass", "TFLOP/s", "speed / jax.nn", "temporary MB", "relative error")


def flops(shape: Shape, which: str) -> float:
    """Operations of one execution."""
    forward = 4 * shape.batch * shape.heads * shape.length**2 * shape.head_dim
    return forward * (1 if which == "forward" else 3.5) / (2 if shape.causal else 1)


def speed(base: dict[str, Any], run: dict[str, Any]) -> float:
    """How many times as fast `run` is as `base`: the median of the ratios within a round."""
    pairs = zip(base["seconds"], run["seconds"])
    return statistics.median(theirs / ours for theirs, ours in pairs)


def rows(shape: Shape, measured: dict[str, Any]) -> list[list[str]]:
    """One line a contender and pass: TFLOP/s, speed beside `jax.nn`'s, memory, and error."""
    lines = []
    base = measured["results"].get(BASE, {})
    for name, result in measured["results"].items():
        for which in PASSES:
            if which in result["errors"]:
                lines.append([name, which, result["errors"][which][:40], "", "", ""])
                continue
            if which not in result:
                continue
            seconds = statistics.median(result[which]["seconds"])
            ratio = f"{speed(base[which], result[which]):.2f}" if which in base else ""
            size = result[which]["temporary_bytes"]
            memory = "" if size is None else f"{size / 1e6:.1f}"
            error = f"{result['error']:.1e}" if which == "forward" else ""
            tera = f"{flops(shape, which) / seconds / 1e12:.3g}"
            lines.append([name, which, tera, ratio, memory, error])
    return lines
