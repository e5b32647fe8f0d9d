"""Replaces arrays block by block, in one pass over memory.

    new[i] = write(compute(scalars, a[i], b[i], ...))          for each block i of all arrays

On a CPU a loop over parts that fit the cache, on a GPU a kernel. XLA alone makes a pass for each
reduction over a block, or writes what is between.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_lab import _compat
from jaxopt_lab.quantization.codecs import Tiling

Implementation = Literal["loop", "kernel", "interpreted kernel", "whole"]
IMPLEMENTATIONS = ("loop", "kernel", "interpreted kernel", "whole")

# With 256 entries each, a quarter of a megabyte of an int8 Adam step's operands. From twice of it
# on XLA splits each operation of a turn over threads, and a step took 1.4 to 1.8 times as long on
# two cores; below, it runs on one of them.
_LOOP_BLOCKS = 64
_KERNEL_ENTRIES = 2**10  # eight for each thread
_KERNEL_WARPS = 4


class Step(NamedTuple):
    """What is done to matrices, tile by tile; a row of a tile is a block.

    Both functions are told at last whether they may look up in tables, which kernels cannot.
    """

    compute: Callable[[Sequence[jax.Array], Sequence[jax.Array], bool], Any]  # of scalars and tiles
    write: Callable[[Any, bool], Sequence[jax.Array]]  # elementwise, of its result; the new tiles
    changed: Sequence[int]  # which of the arrays the new tiles belong to
    tiling: Tiling  # of all arrays

    def is_matrix(self, x: jax.Array) -> bool:
        """Whether an array has the entries, or one number for each block."""
        return x.shape[1] == self.tiling.length


def run(
    step: Step,
    scalars: Sequence[jax.Array],
    arrays: Sequence[jax.Array],
    implementation: Implementation | None,
) -> list[jax.Array]:
    """Applies a step to all blocks.

    Args:
      step: what is done.
      scalars: arrays of shape ().
      arrays: each of shape (rows, length), or (rows, blocks) for one entry a block.
      implementation: one of IMPLEMENTATIONS, or None for what is best on the platform. There is no
        kernel for rows of several blocks.

    Returns:
      The new arrays, in the order of `step.changed`.
    """
    arrays = _compat.vary_alike(arrays, *scalars)
    scalars = _compat.vary_alike(scalars, *arrays)
    by_name = {
        "loop": functools.partial(_loop, step),
        "kernel": functools.partial(_kernel, step),
        "interpreted kernel": functools.partial(_kernel, step, interpret=True),
        "whole": functools.partial(_whole, step),
    }
    if step.tiling.blocks > 1:
        by_name["kernel"] = by_name["interpreted kernel"] = by_name["whole"]
    if implementation is not None:
        return by_name[implementation](scalars, arrays)
    return _compat.platform_dependent(
        scalars, arrays, cpu=by_name["loop"], cuda=by_name["kernel"], default=by_name["whole"]
    )


def _loop(step: Step, scalars: Sequence[jax.Array], arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """In place, where the caller has no further use for an array."""
    tiling, changed = step.tiling, step.changed
    is_matrix = list(map(step.is_matrix, arrays))

    def compute(scalars: Sequence[jax.Array], tiles: Sequence[jax.Array]) -> Any:
        return step.compute(scalars, tiles, True)

    def turn(row: Any, block: Any, rows: int, width: int, new: list[jax.Array]) -> list[jax.Array]:
        now = dict(enumerate(arrays)) | dict(zip(changed, new))
        places = [(row, block * tiling.block_size) if m else (row, block) for m in is_matrix]
        sizes = [(rows, width) if m else (rows, 1) for m in is_matrix]
        tiles = [lax.dynamic_slice(now[i], places[i], sizes[i]) for i in range(len(arrays))]
        # A branch that is always taken: what it needs has been read, and what it returns is there,
        # before anything is written. Else XLA would copy whole arrays in each turn.
        found = _compat.cond(
            row >= 0,
            lambda: compute(scalars, tiles),
            lambda: jax.tree.map(jnp.zeros_like, jax.eval_shape(compute, scalars, tiles)),
        )
        written = zip(changed, new, step.write(found, True))
        return [lax.dynamic_update_slice(x, tile, places[i]) for i, x, tile in written]

    def turns(first: Any, rows: int, new: list[jax.Array]) -> list[jax.Array]:
        def whole_block(block: Any, new: list[jax.Array]) -> list[jax.Array]:
            return turn(first, block, rows, tiling.block_size, new)

        if tiling.whole > 1:
            new = _compat.fori_loop(0, tiling.whole, whole_block, new)
        elif tiling.whole:
            new = whole_block(0, new)
        rest = tiling.length % tiling.block_size
        return turn(first, tiling.whole, rows, rest, new) if rest else new

    # Without a rest, if that costs not too many turns: it would be the whole step once more.
    most = min(_LOOP_BLOCKS, tiling.rows)
    whole = max(rows for rows in range(1, most + 1) if tiling.rows % rows == 0)
    rows = whole if 2 * whole > most else most
    new = [arrays[i] for i in changed]
    new = _compat.fori_loop(0, tiling.rows // rows, lambda i, new: turns(i * rows, rows, new), new)
    rest = tiling.rows % rows
    return turns(jnp.int32(tiling.rows - rest), rest, new) if rest else new


def _whole(
    step: Step, scalars: Sequence[jax.Array], arrays: Sequence[jax.Array]
) -> list[jax.Array]:
    """As two tiles: the whole blocks, and the rests of the rows."""
    tiling = step.tiling
    is_matrix = list(map(step.is_matrix, arrays))
    cuts = [tiling.whole * tiling.block_size if m else tiling.whole for m in is_matrix]
    new: list[list[jax.Array]] = [[] for _ in step.changed]
    for last in (False, True):
        tiles = [x[:, cut:] if last else x[:, :cut] for x, cut in zip(arrays, cuts)]
        if not tiles[0].shape[1]:
            continue
        if not last:
            widths = [tiling.block_size if m else 1 for m in is_matrix]
            tiles = [x.reshape(-1, width) for x, width in zip(tiles, widths)]
        found = step.compute(scalars, tiles, False)
        for parts, x in zip(new, step.write(found, False)):
            parts.append(x.reshape(tiling.rows, -1))
    return [jnp.concatenate(parts, axis=1) for parts in new]


def _kernel(
    step: Step,
    scalars: Sequence[jax.Array],
    arrays: Sequence[jax.Array],
    *,
    interpret: bool = False,
) -> list[jax.Array]:
    """For NVIDIA GPUs, and rows of one block."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    tiling, changed = step.tiling, step.changed
    # From jax 0.11 it warns, when the caller's program is lowered, that this lowering will go.
    warnings.filterwarnings(
        "ignore", "The Pallas Triton backend is deprecated", category=DeprecationWarning
    )
    rows = pl.next_power_of_2(max(1, _KERNEL_ENTRIES // tiling.block_size))
    while tiling.rows % rows:
        rows //= 2
    # A GPU has no memory of booleans.
    is_bool = [x.dtype == bool for x in scalars]
    given = [(x.astype(jnp.int32) if b else x).reshape(1) for x, b in zip(scalars, is_bool)]

    def body(*refs: Any) -> None:
        of_scalars, of_arrays = refs[: len(given)], refs[len(given) : -len(changed)]
        values = [ref[0] != 0 if b else ref[0] for ref, b in zip(of_scalars, is_bool)]
        found = step.compute(values, [ref[...] for ref in of_arrays], False)
        written = step.write(found, False)
        for ref, value in zip(refs[-len(changed) :], written):
            ref[...] = value

    def block(x: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((rows, x.shape[1]), lambda i: (i, 0))

    results = pl.pallas_call(
        body,
        grid=(tiling.rows // rows,),
        in_specs=[*(pl.BlockSpec((1,), lambda i: (0,)) for _ in given), *map(block, arrays)],
        out_specs=[block(arrays[i]) for i in changed],
        out_shape=[_compat.out_struct(arrays[i]) for i in changed],
        input_output_aliases={len(given) + i: k for k, i in enumerate(changed)},
        compiler_params=triton.CompilerParams(num_warps=_KERNEL_WARPS),
        interpret=interpret,
        name="fused_step",
    )(*given, *arrays)
    return list(results)
