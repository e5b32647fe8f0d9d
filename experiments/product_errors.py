"""How far are products in few bits from those in float64, by format and by what shares a scale?

`python -m experiments.product_errors` multiplies 256 tokens of width 1024 by a kernel, all normal
numbers, and again with 8 columns of the tokens 30 times as large, as in the layers of language
models. An error is the root of the mean square over that of the exact product; that of the kernel's
gradient is of the tokens times a gradient of normal numbers, quantised as well.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.harness.environment import write_figures
from pallas_kernels import quantized_dot_general

FORMATS = ("int8", "float8_e4m3fn", "float8_e5m2", "int4")
GRANULARITIES = ("tensor", "row", 128, 32)
TOKENS, WIDTH, OUTPUTS = 256, 1024, 512
OUTLIERS, FACTOR = 8, 30
DENSE = (((1,), (0,)), ((), ()))
KINDS = ("product", "gradient of the kernel")


def operands(outliers: bool) -> list[np.ndarray]:
    """Returns tokens, kernel and the gradient of their product, float32."""
    rng = np.random.default_rng(0)
    x, w, g = (
        rng.normal(size=shape) for shape in ((TOKENS, WIDTH), (WIDTH, OUTPUTS), (TOKENS, OUTPUTS))
    )
    if outliers:
        x[:, rng.choice(WIDTH, OUTLIERS, replace=False)] *= FACTOR
    return [array.astype(np.float32) for array in (x, w, g)]


def errors(format: str, granularity: str | int, arrays: Sequence[np.ndarray]) -> list[float]:
    """Returns the errors of a product and of the gradient of its kernel."""
    dot = quantized_dot_general(format, granularity, backward="rhs")

    def program(x: jax.Array, w: jax.Array, g: jax.Array) -> Any:
        y, pull = jax.vjp(lambda w: dot(x, w, DENSE), w)
        return y, *pull(g)

    x, w, g = (array.astype(np.float64) for array in arrays)
    exact = x @ w, x.T @ g
    return [
        float(np.linalg.norm(found - want) / np.linalg.norm(want))
        for found, want in zip(jax.jit(program)(*arrays), exact, strict=True)
    ]


def measure() -> list[dict[str, Any]]:
    """Returns the errors of every format and granularity on both kinds of tokens."""
    return [
        {"outliers": outliers, "format": name, "granularity": granularity}
        | dict(zip(KINDS, errors(name, granularity, arrays), strict=True))
        for outliers, arrays in ((kind, operands(kind)) for kind in (False, True))
        for name in FORMATS
        for granularity in GRANULARITIES
    ]


HEADER = ["format", "numbers", "what is off", "tensor", "row", "blocks of 128", "blocks of 32"]


def rows(measured: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Returns a row a format, kind of tokens and product, with a column a granularity."""
    table = []
    for name in FORMATS:
        for outliers in (False, True):
            own = [x for x in measured if (x["format"], x["outliers"]) == (name, outliers)]
            by_size = {x["granularity"]: x for x in own}
            for kind in KINDS:
                numbers = "8 large columns" if outliers else "normal"
                off = [f"{100 * by_size[size][kind]:.2f}%" for size in GRANULARITIES]
                table.append([name, numbers, kind, *off])
    return table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--out", type=pathlib.Path, help="write the errors to this JSON file")
    options = parser.parse_args(argv)
    measured = measure()
    table = Table(*HEADER)
    for row in rows(measured):
        table.add_row(*row)
    Console().print(table)
    write_figures(options.out, "product_errors", errors=measured)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
