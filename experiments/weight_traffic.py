"""How many bytes does a product of a few tokens move, with its weight in few bits?

`python -m experiments.weight_traffic` compiles the product of 1, 8 and 32 tokens in bfloat16 and a
weight (4096, 4096) for chips that are not here, and adds up operands and results of the kernels.
It needs the extra `aot`, in an environment of its own.
"""

from __future__ import annotations

import argparse
import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from experiments.harness.environment import write_figures
from pallas_kernels import quantize_weight, targets, weight_only_dot_general

CHIPS = ("h200", "v5e")
TOKENS = (1, 8, 32)
WIDTH = 4096
DENSE = (((1,), (0,)), ((), ()))
# Format and granularity.
WEIGHTS = (
    ("bfloat16", "row"),
    ("int8", "row"),
    ("int8", 128),
    ("float8_e4m3fn", "row"),
    ("int4", "row"),
)


def product(tokens: int, format: str, granularity: str | int) -> tuple[Callable[..., Any], Any]:
    """Returns what is compiled, and its arguments."""
    x = jax.ShapeDtypeStruct((tokens, WIDTH), jnp.bfloat16)
    kernel = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.bfloat16)
    if format == "bfloat16":
        return lambda x, w: jax.lax.dot_general(x, w, DENSE), (x, kernel)
    made = functools.partial(quantize_weight, format=format, granularity=granularity)
    return lambda x, w: weight_only_dot_general(x, w, DENSE), (x, jax.eval_shape(made, kernel))


def measure(chips: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the bytes of every weight, for every chip and number of tokens."""
    found = []
    for chip in chips:
        for tokens in TOKENS:
            for format, granularity in WEIGHTS:
                function, arguments = product(tokens, format, granularity)
                compiled = targets.compile_for(function, *arguments, chip=chip)
                moved = targets.memory_traffic(compiled).total_bytes
                found.append(
                    {"chip": chip, "tokens": tokens, "format": format, "granularity": granularity,
                     "bytes": moved}
                )  # fmt: skip
    return found


def header(measured: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a column for each chip and number of tokens."""
    cases = dict.fromkeys((x["chip"], x["tokens"]) for x in measured)
    columns = [f"{chip}, {tokens} token{'s' * (tokens > 1)}" for chip, tokens in cases]
    return ["weight", "a scale for", *columns]


def rows(measured: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Returns a row a weight: its bytes over those with a weight in bfloat16."""
    whole = {(x["chip"], x["tokens"]): x["bytes"] for x in measured if x["format"] == "bfloat16"}
    table = []
    for format, granularity in WEIGHTS[1:]:
        own = [x for x in measured if (x["format"], x["granularity"]) == (format, granularity)]
        parts = [f"{x['bytes'] / whole[x['chip'], x['tokens']]:.2f}" for x in own]
        scale = "a row" if granularity == "row" else f"{granularity} inputs"
        table.append([f"`{format}`", scale, *parts])
    return table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--chips", nargs="+", default=CHIPS, choices=sorted(targets.CHIPS))
    parser.add_argument("--out", type=pathlib.Path, help="write the bytes to this JSON file")
    options = parser.parse_args(argv)
    for chip in options.chips:
        reason = targets.missing_compiler(chip)
        if reason is not None:
            parser.error(reason)
    os.environ.update(targets.ENVIRONMENT)  # keeps jax from looking for the chips
    measured = measure(options.chips)
    table = Table(*header(measured))
    for row in rows(measured):
        table.add_row(*row)
    Console().print(table)
    write_figures(options.out, "weight_traffic", bytes=measured)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
