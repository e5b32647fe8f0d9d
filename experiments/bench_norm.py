"""What do the norms of `pallas_kernels` cost beside their plain form?

`python -m experiments.bench_norm` runs forward pass, backward pass as a program of its own, and
both in one, in turn with the plain form under `jax.jit`, and prints the median ratio of a round: of
processor time, all threads together, which does not count waiting for a core.
`--bytes` compiles the same programs for an H200 instead and adds up what their kernels read and
write; it needs the extra `aot`, in an environment of its own.
"""

from __future__ import annotations

import argparse
import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import pallas_kernels
from experiments.harness import timing
from experiments.harness.environment import write_figures
from pallas_kernels import targets

SHAPE = {"cpu": (4096, 1024), "h200": (8192, 4096)}
PASSES = ("forward", "backward", "both")
DTYPES = ("float32", "bfloat16")
ROUNDS = 15

Norm = Callable[..., Any]


def plain_rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6)
    return (wide * inverse * scale.astype(jnp.float32)).astype(x.dtype)


def plain_layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, -1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + 1e-6)
    return (centred * inverse * scale.astype(jnp.float32) + bias).astype(x.dtype)


def plain_add_rms_norm(
    x: jax.Array, residual: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    total = x + residual
    return plain_rms_norm(total, scale), total


# Ours and the plain form, the number of arrays like x, and that of weights.
NORMS: dict[str, tuple[Norm, Norm, int, int]] = {
    "rms_norm": (pallas_kernels.rms_norm, plain_rms_norm, 1, 1),
    "layer_norm": (pallas_kernels.layer_norm, plain_layer_norm, 1, 2),
    "add_rms_norm": (pallas_kernels.add_rms_norm, plain_add_rms_norm, 2, 1),
}


def programs(norm: Norm, arguments: tuple[Any, ...]) -> dict[str, tuple[Callable[..., Any], Any]]:
    """The three passes of a norm, each with the shapes of its arguments."""
    linearized = lambda *args: jax.vjp(norm, *args)  # noqa: E731
    outputs, pull = jax.eval_shape(linearized, *arguments)

    def both(cotangents: Any, *args: Any) -> Any:
        found, pull = linearized(*args)
        return found, pull(cotangents)

    return {
        "forward": (norm, arguments),
        "backward": (lambda pull, cotangents: pull(cotangents), (pull, outputs)),
        "both": (both, (outputs, *arguments)),
    }


def drawn(struct: Any) -> Any:
    """Arrays for the shapes of a program's arguments."""
    leaves, structure = jax.tree.flatten(struct)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return structure.unflatten(
        jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves)
    )


def cases(chip: str) -> dict[str, tuple[dict[str, Any], dict[str, Any], int]]:
    """Programs of ours and of the plain form, and the bytes of one array like x."""
    found = {}
    for dtype in DTYPES:
        for name, (ours, plain, arrays, weights) in NORMS.items():
            x = jax.ShapeDtypeStruct(SHAPE[chip], dtype)
            arguments = (x,) * arrays + (jax.ShapeDtypeStruct(x.shape[-1:], dtype),) * weights
            size = x.size * x.dtype.itemsize
            found[f"{name} {dtype}"] = programs(ours, arguments), programs(plain, arguments), size
    return found


def kept(program: tuple[Any, Any]) -> int:
    """Bytes that a backward pass gets from its forward pass."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(program[1][0]))


def ratios() -> dict[str, dict[str, float]]:
    """The plain form's time divided by ours, median of the rounds, and what each keeps."""
    found = {}
    for name, (ours, plain, size) in cases("cpu").items():
        found[name] = {}
        for which in PASSES:
            fast, slow = ((fn, drawn(structs)) for fn, structs in (ours[which], plain[which]))
            found[name][which] = timing.times_as_fast(fast, slow, ROUNDS)
        found[name]["kept"] = kept(ours["backward"]) / size
        found[name]["kept, plain"] = kept(plain["backward"]) / size
    return found


def arrays_moved(chip: str) -> dict[str, dict[str, float]]:
    """Bytes moved by ours and by the plain form, in arrays like x."""
    found = {}
    moved = functools.partial(targets.compile_for, chip=chip)
    for name, (ours, plain, size) in cases(chip).items():
        found[name] = {}
        for which in PASSES:
            for suffix, (fn, arguments) in (("", ours[which]), (", plain", plain[which])):
                traffic = targets.memory_traffic(moved(fn, *arguments))
                found[name][which + suffix] = traffic.total_bytes / size
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--bytes", action="store_true", help="compile for an H200 and count")
    parser.add_argument("--out", type=pathlib.Path, help="write the figures to this JSON file")
    options = parser.parse_args(argv)
    if options.bytes:
        reason = targets.missing_compiler("h200")
        if reason is not None:
            parser.error(reason)
        os.environ.update(targets.ENVIRONMENT)  # keeps jax from looking for the chip
    found = arrays_moved("h200") if options.bytes else ratios()
    columns = list(next(iter(found.values())))
    table = Table("norm", *columns)
    for name, figures in found.items():
        table.add_row(name, *(f"{figures[column]:.2f}" for column in columns))
    Console(width=140).print(table)
    kind, chip = ("norm_traffic", "h200") if options.bytes else ("bench_norm", "cpu")
    write_figures(options.out, kind, shape=SHAPE[chip], figures=found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
