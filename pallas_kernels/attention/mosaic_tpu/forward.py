"""Forward kernel: online softmax over the key blocks of each query block.

For each piece of scores z, with running maximum m, sum l and accumulator acc:

    m' = max(m, rowmax z);  a = exp(m - m');  p = exp(z - m')
    l = a l + rowsum p;     acc = a acc + (p * kept) v
    end:  output = acc / (l (1 - rate)),  lse = m + log l

Queries lie along sublanes: the weights of both products are then keys and values, which stay in the
matrix unit while a whole block of queries passes. (With the scores transposed the row maxima come
free, but the probabilities become weights that are used for 128 rows only: 20% to 30% more bundles
on v5e and v6e.) m and l are kept as 128 equal lanes, so that they meet scores and accumulator
without a broadcast.

References:
  Dao, `FlashAttention-2 <https://arxiv.org/abs/2307.08691>`_, 2023.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._compat import out_struct
from pallas_kernels.attention.mask import PARTIAL
from pallas_kernels.attention.mosaic_tpu import steps as steps_
from pallas_kernels.attention.mosaic_tpu import tables, tiles
from pallas_kernels.attention.mosaic_tpu.tables import LANES, Blocks
from pallas_kernels.attention.mosaic_tpu.tiles import Input, Piece, Scores
from pallas_kernels.attention.problem import Operands, Settings


def forward(settings: Settings, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Returns output (B, T, N, dv) and lse (B, N, T); see `Route`."""
    size = operands.sizes
    blocks = tables.forward_blocks(settings, operands)
    t, s = tiles.padded_lengths(operands, blocks)
    query, key, value = (
        tiles.head_major(x, length)
        for x, length in ((operands.query, t), (operands.key, s), (operands.value, s))
    )
    d, dv = query.shape[3], value.shape[3]
    steps = steps_.of_rows(operands.mask, size.batch, size.queries, size.keys, blocks)
    scalars = tiles.scalars(operands, steps)

    def of_query(b: Any, n: Any, i: Any, j: Any) -> tuple[Any, ...]:
        return b, n, i, 0

    def of_key(b: Any, n: Any, i: Any, j: Any) -> tuple[Any, ...]:
        return b, n // size.group, j, 0

    inputs = [
        Input("query", query, (None, None, blocks.q, d), of_query),
        Input("key", key, (None, None, blocks.kv, d), of_key),
        Input("value", value, (None, None, blocks.kv, dv), of_key),
        *tiles.planes(operands, blocks),
    ]

    def place(b: Any, n: Any, step: Any, table: Any, *_: Any) -> tuple[Any, ...]:
        entry = steps_.decode(table[steps.offset(b, n) + step])
        return b, n, entry.outer, entry.inner

    like = [x.array for x in inputs] + list(scalars.values())
    out_specs = [
        tiles.spec((None, None, blocks.q, dv), of_query, place),
        tiles.spec((None, None, 1, blocks.q), lambda b, n, i, j: (b, n, 0, i), place),
    ]
    shapes = [
        out_struct((size.batch, size.heads, t, dv), query.dtype, *like),
        out_struct((size.batch, size.heads, 1, t), jnp.float32, *like),
    ]
    scratch = {"m": (blocks.q, LANES), "l": (blocks.q, LANES), "acc": (blocks.q, dv)}
    names = [*scalars, *(x.name for x in inputs), "output", "lse", *scratch]
    windows = [(x.block, x.array.dtype) for x in inputs]
    windows += [(x.block_shape, shape.dtype) for x, shape in zip(out_specs, shapes, strict=True)]
    output, lse = pl.pallas_call(
        functools.partial(
            _kernel,
            names=names,
            blocks=blocks,
            steps=steps,
            scores=tiles.scores_of(settings, operands, transposed=False),
        ),
        out_shape=shapes,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(size.batch, size.heads, steps.count),
            in_specs=[tiles.spec(x.block, x.index, place) for x in inputs],
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch.values()],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=tables.vmem_limit(
                tiles.window_bytes(windows),
                tiles.window_bytes([(shape, jnp.float32) for shape in scratch.values()]),
                blocks,
            ),
        ),
        interpret=settings.interpret,
        name="attention_forward",
    )(*scalars.values(), *(x.array for x in inputs))
    output = output[:, :, : size.queries, : size.value_dim].transpose(0, 2, 1, 3)
    return output, lse[:, :, 0, : size.queries]


def _kernel(
    *all_refs: Any, names: list[str], blocks: Blocks, steps: steps_.Steps, scores: Scores
) -> None:
    refs = dict(zip(names, all_refs, strict=True))
    b, n, step = (pl.program_id(axis) for axis in range(3))
    entry = steps_.decode(refs["table"][steps.offset(b, n) + step])
    m_ref, l_ref, acc_ref = refs["m"], refs["l"], refs["acc"]

    @pl.when(entry.first)
    def _start() -> None:
        if "sinks" in refs:  # a key with value 0 that every row sees
            m_ref[...] = jnp.full_like(m_ref, refs["sinks"][n] * scores.unit)
            l_ref[...] = jnp.ones_like(l_ref)
        else:
            m_ref[...] = jnp.full_like(m_ref, -jnp.inf)
            l_ref[...] = jnp.zeros_like(l_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    for kind in sorted(steps.kinds):

        @pl.when(entry.kind == kind)
        def _tile(kind: int = kind) -> None:
            _attend(refs, entry, blocks, scores, b, n, partial=kind == PARTIAL)

    @pl.when(entry.last)
    def _end() -> None:
        # As rows, m and l are 128 times fewer vectors than as columns; one transpose for both.
        lane = lax.broadcasted_iota(jnp.int32, m_ref.shape, 1)
        both = jnp.where(lane == 0, m_ref[...], l_ref[...]).T
        m, total = both[:1, :], both[1:2, :]
        refs["lse"][...] = m * (1 / scores.unit) + jnp.log(total)
        keep_rate = 1 - scores.settings.dropout_rate
        inverse = tiles.lanes(jnp.where(total == 0, 0.0, 1 / (total * keep_rate)))
        acc = acc_ref[...] * jnp.tile(inverse, (1, acc_ref.shape[1] // LANES))
        refs["output"][...] = acc.astype(refs["output"].dtype)


def _attend(
    refs: dict[str, Any],
    entry: steps_.Step,
    blocks: Blocks,
    scores: Scores,
    b: Any,
    n: Any,
    *,
    partial: bool,
) -> None:
    """Adds one tile to m, l and acc, piece by piece."""
    first_row, first_key = entry.outer * blocks.q, entry.inner * blocks.kv
    limits = tiles.limits_at(refs, b, scores) if partial else None
    seed = refs["seeds"][b * pl.num_programs(1) + n] if "seeds" in refs else None

    def product(piece: Piece) -> jax.Array:
        return scores.product(
            refs["query"][pl.ds(piece.row, piece.rows), :],
            refs["key"][pl.ds(piece.key, piece.keys), :],
        )

    def softmax(piece: Piece, raw: jax.Array) -> None:
        rows = pl.ds(piece.row, piece.rows)
        z, _ = scores.finish(refs, raw, piece, limits)
        m = refs["m"][rows, :]
        new_m = jnp.maximum(m, z.max(axis=1, keepdims=True))
        shift = new_m
        if partial or scores.may_be_empty:
            # A finite shift, so that the entries of a row of -inf become 0 and not NaN.
            shift = jnp.maximum(new_m, jnp.finfo(jnp.float32).min)
        p = scores.exp(z - jnp.tile(shift, (1, piece.keys // LANES)))
        rescale = scores.exp(m - shift)
        refs["l"][rows, :] = rescale * refs["l"][rows, :] + p.sum(axis=1, keepdims=True)
        refs["m"][rows, :] = new_m
        if seed is not None:
            p = jnp.where(scores.kept(seed, piece), p, 0.0)
        value = refs["value"][pl.ds(piece.key, piece.keys), :]
        acc = refs["acc"]
        acc[rows, :] = jnp.tile(rescale, (1, acc.shape[1] // LANES)) * acc[rows, :] + tiles.dot(
            p.astype(value.dtype), value, (1, 0), scores.settings
        )

    def pieces_of(rows: int, keys: int) -> list[Piece]:
        return [
            Piece(row, key, rows, keys, first_row, first_key)
            for key in range(0, blocks.kv, keys)
            for row in range(0, blocks.q, rows)
        ]

    def all_of(pieces: list[Piece]) -> None:
        if not blocks.ahead:
            for piece in pieces:
                softmax(piece, product(piece))
            return
        raw = product(pieces[0])
        for piece, following in itertools.pairwise(pieces):
            following_raw = product(following)
            softmax(piece, raw)
            raw = following_raw
        softmax(pieces[-1], raw)

    def one_by_one(pieces: list[Piece], needed: list[Any]) -> None:
        for piece, condition in zip(pieces, needed, strict=True):

            @pl.when(condition)
            def _piece(piece: Piece = piece) -> None:
                softmax(piece, product(piece))

    rows, keys = blocks.q_compute, blocks.kv_compute
    if limits is None:
        all_of(pieces_of(rows, keys))
        return
    # With a mask fewer rows at once, and as many entries, take fewer bundles.
    masked = 256, rows * keys // 256
    fits = rows % masked[0] == 0 and blocks.kv % masked[1] == 0
    whole_pieces = pieces_of(*(masked if fits else (rows, keys)))
    if not scores.has_window:
        all_of(whole_pieces)
        return
    # Of a tile on the diagonal nearly half of the pieces are hidden.
    if keys % rows == 0:
        keys = min(keys, max(512, rows))
    pieces = pieces_of(rows, keys)
    needed = [scores.needed(piece, limits) for piece in pieces]
    if not scores.may_hide_within:
        one_by_one(pieces, needed)
        return
    everything = functools.reduce(jnp.logical_and, needed)
    pl.when(everything)(lambda: all_of(whole_pieces))
    pl.when(jnp.logical_not(everything))(lambda: one_by_one(pieces, needed))
