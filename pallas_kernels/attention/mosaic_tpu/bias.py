"""Gradient of the bias, in a kernel of its own.

    dbias = sum of ds over the axes in which the bias is 1

A block of the result stays in VMEM while the kernel passes over everything that is summed into it:
the batch entries and heads, and the blocks of queries or keys along an axis of size 1. So a bias
that all heads share never exists for each head. It repeats two of the five products (scores and
dp); only a caller who asks for this gradient pays for them.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._compat import out_struct
from pallas_kernels.attention.mask import PARTIAL, WHOLE, tile_kinds
from pallas_kernels.attention.mosaic_tpu import tables, tiles
from pallas_kernels.attention.mosaic_tpu.tables import Blocks
from pallas_kernels.attention.mosaic_tpu.tiles import Input, Piece, Scores
from pallas_kernels.attention.problem import Operands, Settings


def bias_gradient(
    settings: Settings,
    operands: Operands,
    lse: jax.Array,
    cotangent: jax.Array,
    delta: jax.Array,
    blocks: Blocks,
) -> jax.Array:
    """Returns the gradient of `operands.bias`, in its shape and dtype."""
    size, bias = operands.sizes, operands.bias
    assert bias is not None
    t, s = tiles.padded_lengths(operands, blocks)
    group = size.group
    scores = tiles.scores_of(settings, operands, transposed=False)

    def blocked(name: str, x: jax.Array, length: int, block: int, index: Any) -> Input:
        x = tiles.head_major(x, length)
        return Input(name, x, (None, None, block, x.shape[3]), index)

    def of_query(b: Any, n: Any, i: Any, j: Any) -> tuple[Any, ...]:
        return b, n, i, 0

    def of_key(b: Any, n: Any, i: Any, j: Any) -> tuple[Any, ...]:
        return b, n // group, j, 0

    def of_row(b: Any, n: Any, i: Any, j: Any) -> tuple[Any, ...]:
        return b, n, 0, i

    row_block = (None, None, 1, blocks.q)
    inputs = [
        blocked("query", operands.query, t, blocks.q, of_query),
        blocked("key", operands.key, s, blocks.kv, of_key),
        blocked("value", operands.value, s, blocks.kv, of_key),
        blocked("cotangent", cotangent, t, blocks.q, of_query),
        Input("log_total", tiles.pad_rows(tiles.log_totals(scores, lse), t), row_block, of_row),
        Input("delta", tiles.pad_rows(delta, t), row_block, of_row),
        *tiles.planes(operands, blocks),
    ]
    kinds = tile_kinds(operands.mask, size.batch, size.queries, size.keys, blocks.q, blocks.kv)
    limits = operands.mask.limits(size.batch, size.queries, size.keys)
    scalars = {"kinds": kinds.reshape(-1), "limits": limits.reshape(-1)}
    if operands.seeds is not None:
        scalars["seeds"] = operands.seeds.reshape(-1)

    # The axes of the grid: those that the bias has, then those that are summed.
    extent = (size.batch, size.heads, t // blocks.q, s // blocks.kv)
    order = sorted(range(4), key=lambda axis: bias.shape[axis] == 1)
    summed = [axis for axis in order if bias.shape[axis] == 1]

    def place(*ids: Any) -> tuple[Any, ...]:
        return tuple(ids[order.index(axis)] for axis in range(4))

    plane = tiles.plane("bias", bias, t, s, blocks)
    like = [x.array for x in inputs] + list(scalars.values())
    shape = out_struct(plane.array.shape, jnp.float32, *like)
    names = [*scalars, *(x.name for x in inputs), "gradient"]
    windows = [(x.block, x.array.dtype) for x in inputs] + [(plane.block, jnp.float32)]
    result = pl.pallas_call(
        functools.partial(
            _kernel,
            names=names,
            blocks=blocks,
            kinds_shape=kinds.shape,
            order=order,
            summed=summed,
            scores=scores,
        ),
        out_shape=shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=tuple(extent[axis] for axis in order),
            in_specs=[tiles.spec(x.block, x.index, place) for x in inputs],
            out_specs=tiles.spec(plane.block, plane.index, place),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=tuple(
                "arbitrary" if axis in summed else "parallel" for axis in order
            ),
            vmem_limit_bytes=tables.vmem_limit(tiles.window_bytes(windows), 0, blocks),
        ),
        interpret=settings.interpret,
        name="attention_bias_gradient",
    )(*scalars.values(), *(x.array for x in inputs))
    if bias.shape[3] == 1 and bias.shape[2] != 1:
        result = result.swapaxes(2, 3)
    return result[:, :, : bias.shape[2], : bias.shape[3]].astype(bias.dtype)


def _kernel(
    *all_refs: Any,
    names: list[str],
    blocks: Blocks,
    kinds_shape: tuple[int, ...],
    order: list[int],
    summed: list[int],
    scores: Scores,
) -> None:
    refs = dict(zip(names, all_refs, strict=True))
    ids = [pl.program_id(order.index(axis)) for axis in range(4)]
    heads = pl.num_programs(order.index(1))
    b, n, i, j = ids
    index = 0
    for length, position in zip(kinds_shape, ids, strict=True):
        index = index * length + (position if length > 1 else 0)
    kind = refs["kinds"][index]
    starts = True
    for axis in summed:
        starts &= ids[axis] == 0

    @pl.when(starts)
    def _start() -> None:
        refs["gradient"][...] = jnp.zeros_like(refs["gradient"])

    for case in (WHOLE, PARTIAL):

        @pl.when(kind == case)
        def _tile(case: int = case) -> None:
            seed = refs["seeds"][b * heads + n] if "seeds" in refs else None
            limits = tiles.limits_at(refs, b, scores) if case == PARTIAL else None
            for row in range(0, blocks.q, blocks.q_compute):
                for key in range(0, blocks.kv, blocks.kv_compute):
                    sizes = (blocks.q_compute, blocks.kv_compute, i * blocks.q, j * blocks.kv)
                    _accumulate(refs, scores, Piece(row, key, *sizes), limits, seed)


def _accumulate(refs: dict[str, Any], scores: Scores, piece: Piece, limits: Any, seed: Any) -> None:
    """Adds the gradient of one piece of scores to the block of the result."""
    settings = scores.settings
    rows, keys = pl.ds(piece.row, piece.rows), pl.ds(piece.key, piece.keys)
    product = scores.product(refs["query"][rows, :], refs["key"][keys, :])
    z, slope = scores.finish(refs, product, piece, limits)
    p = scores.exp(z - tiles.column(refs["log_total"][:, rows]))
    dp = tiles.dot(refs["cotangent"][rows, :], refs["value"][keys, :], (1, 1), settings)
    if seed is not None:
        dp = jnp.where(scores.kept(seed, piece), dp * (1 / (1 - settings.dropout_rate)), 0.0)
    ds = p * (dp - tiles.column(refs["delta"][:, rows]))
    if slope is not None:
        ds *= slope
    gradient = refs["gradient"]
    assert scores.bias_shape is not None
    has_rows, has_keys = (length != 1 for length in scores.bias_shape[2:])
    if has_rows and has_keys:
        gradient[rows, keys] += ds
    elif has_keys:
        gradient[:, keys] += ds.sum(axis=0, keepdims=True)
    elif has_rows:
        gradient[:, rows] += tiles.row(ds.sum(axis=1, keepdims=True))
    else:
        gradient[...] += ds.sum(axis=(0, 1), keepdims=True)
