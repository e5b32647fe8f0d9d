"""Backward kernel: dQ, dK and dV from five products of each tile.

With scores z, L = lse and kept the dropout mask over (1 - rate):

    p = exp(z - L);  dp = (dO v^T) kept;  ds = p (dp - delta) [d cap / d score]
    dV += (p kept)^T dO;  dK += scale ds^T q;  dQ += scale ds k

The scores are transposed (keys along sublanes), so that L and delta are rows of lanes and dV and dK
need no transposed operand. Key blocks are outer: dK and dV of a key block are summed in VMEM over
the query blocks of all heads of its group, so neither exists for each query head. dQ is summed in
VMEM as well, for all heads of the group at once, and leaves it when the group is done. Compared
with a dQ for each key block in HBM (S / block copies, then a sum) or one that is read and written
again with each tile, it costs no traffic and no memory; compared with a kernel of its own for dQ,
two products of seven. Where dQ of a group is larger than `Blocks.resident`, the queries are cut
into chunks, and dK and dV become one float32 partial sum for each chunk.

References:
  Dao, `FlashAttention-2 <https://arxiv.org/abs/2307.08691>`_, 2023.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
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
from pallas_kernels.attention.mosaic_tpu.bias import bias_gradient
from pallas_kernels.attention.mosaic_tpu.tables import Blocks
from pallas_kernels.attention.mosaic_tpu.tiles import Input, Piece, Scores
from pallas_kernels.attention.problem import Gradients, Operands, Settings


def backward(
    settings: Settings,
    operands: Operands,
    lse: jax.Array,
    cotangent: jax.Array,
    delta: jax.Array,
    with_bias: bool,
) -> Gradients:
    """Returns the gradients; see `Route`."""
    blocks = tables.backward_blocks(settings, operands)
    dq, dk, dv = _gradients(settings, operands, lse, cotangent, delta, blocks)
    bias = None
    if with_bias:
        bias = bias_gradient(settings, operands, lse, cotangent, delta, blocks)
    return Gradients(
        query=_heads_last(dq, operands.query),
        key=_heads_last(dk, operands.key),
        value=_heads_last(dv, operands.value),
        bias=bias,
    )


def _heads_last(x: jax.Array, like: jax.Array) -> jax.Array:
    return x[:, :, : like.shape[1], : like.shape[3]].transpose(0, 2, 1, 3).astype(like.dtype)


def _gradients(
    settings: Settings,
    operands: Operands,
    lse: jax.Array,
    cotangent: jax.Array,
    delta: jax.Array,
    blocks: Blocks,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns dQ, dK, dV head-major and padded."""
    size = operands.sizes
    t, s = tiles.padded_lengths(operands, blocks)
    group = size.group
    d, dv = (tables.round_up(x, tables.LANES) for x in (size.head_dim, size.value_dim))
    chunk, chunks = _chunks(t // blocks.q, 4 * group * blocks.q * d, blocks.resident)
    t = chunk * chunks * blocks.q
    steps = steps_.of_keys(operands.mask, size.batch, size.queries, size.keys, blocks, group, chunk)
    scalars = tiles.scalars(operands, steps)
    scores = tiles.scores_of(settings, operands, transposed=True)

    def per_query(name: str, x: jax.Array, width: int) -> Input:
        block = (None, None, blocks.q, width)
        return Input(name, tiles.head_major(x, t), block, lambda b, n, i, j: (b, n, i, 0))

    def per_key(name: str, x: jax.Array, width: int) -> Input:
        block = (None, None, blocks.kv, width)
        return Input(name, tiles.head_major(x, s), block, lambda b, n, i, j: (b, n // group, j, 0))

    def per_row(name: str, x: jax.Array) -> Input:
        block = (None, None, 1, blocks.q)
        return Input(name, tiles.pad_rows(x, t), block, lambda b, n, i, j: (b, n, 0, i))

    inputs = [
        per_query("query", operands.query, d),
        per_key("key", operands.key, d),
        per_key("value", operands.value, dv),
        per_query("cotangent", cotangent, dv),
        per_row("log_total", tiles.log_totals(scores, lse)),
        per_row("delta", delta),
        *tiles.planes(operands, blocks, t),
    ]

    def place(b: Any, k: Any, c: Any, step: Any, table: Any, *_: Any) -> tuple[Any, ...]:
        entry = steps_.decode(table[steps.offset(b, k, c) + step])
        n = k * group + entry.inner // chunk
        return b, n, c * chunk + entry.inner % chunk, entry.outer

    def sums(width: int) -> pl.BlockSpec:
        def index(b: Any, k: Any, c: Any, step: Any, table: Any, *_: Any) -> tuple[Any, ...]:
            return c, b, k, steps_.decode(table[steps.offset(b, k, c) + step]).outer, 0

        return pl.BlockSpec((None, None, None, blocks.kv, width), index)

    like = [x.array for x in inputs] + list(scalars.values())
    rows = chunk * blocks.q
    dtype = operands.query.dtype
    sum_dtype = dtype if chunks == 1 else jnp.float32
    out_specs = [
        pl.BlockSpec((None, group, rows, d), lambda b, k, c, *_: (b, k, c, 0)),
        sums(d),
        sums(dv),
    ]
    shapes = [
        out_struct((size.batch, size.heads, t, d), dtype, *like),
        out_struct((chunks, size.batch, size.kv_heads, s, d), sum_dtype, *like),
        out_struct((chunks, size.batch, size.kv_heads, s, dv), sum_dtype, *like),
    ]
    scratch = {
        "dq_sum": (group, rows, d),
        "dk_sum": (blocks.kv, d),
        "dv_sum": (blocks.kv, dv),
    }
    names = [*scalars, *(x.name for x in inputs), "dq", "dk", "dv", *scratch]
    windows = [(x.block, x.array.dtype) for x in inputs]
    windows += [(x.block_shape, shape.dtype) for x, shape in zip(out_specs, shapes, strict=True)]
    dq, dk, dv_ = pl.pallas_call(
        functools.partial(
            _kernel,
            names=names,
            blocks=blocks,
            steps=steps,
            chunk=chunk,
            scores=scores,
        ),
        out_shape=shapes,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(size.batch, size.kv_heads, chunks, steps.count),
            in_specs=[tiles.spec(x.block, x.index, place) for x in inputs],
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch.values()],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=tables.vmem_limit(
                tiles.window_bytes(windows),
                tiles.window_bytes([(shape, jnp.float32) for shape in scratch.values()]),
                blocks,
            ),
        ),
        interpret=settings.interpret,
        name="attention_backward",
    )(*scalars.values(), *(x.array for x in inputs))
    return dq, *(x[0] if chunks == 1 else x.sum(axis=0) for x in (dk, dv_))


def _chunks(query_blocks: int, block_bytes: int, resident: int) -> tuple[int, int]:
    """Returns the query blocks of a chunk and the number of chunks, as even as possible."""
    most = max(1, resident // block_bytes)
    chunks = -(-query_blocks // most)
    return -(-query_blocks // chunks), chunks


def _kernel(
    *all_refs: Any,
    names: list[str],
    blocks: Blocks,
    steps: steps_.Steps,
    chunk: int,
    scores: Scores,
) -> None:
    refs = dict(zip(names, all_refs, strict=True))
    b, k, c, step = (pl.program_id(axis) for axis in range(4))
    entry = steps_.decode(refs["table"][steps.offset(b, k, c) + step])
    group = refs["dq_sum"].shape[0]
    g, i = entry.inner // chunk, entry.inner % chunk
    scale = scores.settings.scale

    def each_query_block(body: Callable[[Any, Any], None]) -> None:
        def run(x: Any, _: None) -> None:
            body(x // chunk, pl.ds(x % chunk * blocks.q, blocks.q))

        lax.fori_loop(0, group * chunk, run, None)

    @pl.when(step == 0)
    def _start() -> None:
        def zero(head: Any, rows: Any) -> None:
            shape = (blocks.q, refs["dq_sum"].shape[2])
            refs["dq_sum"][head, rows, :] = jnp.zeros(shape, jnp.float32)

        each_query_block(zero)

    @pl.when(entry.first)
    def _start_keys() -> None:
        refs["dk_sum"][...] = jnp.zeros_like(refs["dk_sum"])
        refs["dv_sum"][...] = jnp.zeros_like(refs["dv_sum"])

    for kind in sorted(steps.kinds):

        @pl.when(entry.kind == kind)
        def _tile(kind: int = kind) -> None:
            n = k * group + g
            seed = None
            if "seeds" in refs:
                seed = refs["seeds"][b * (pl.num_programs(1) * group) + n]
            first_row = (c * chunk + i) * blocks.q
            limits = tiles.limits_at(refs, b, scores) if kind == PARTIAL else None
            for row in range(0, blocks.q, blocks.q_compute):
                for key in range(0, blocks.kv, blocks.kv_compute):
                    piece = Piece(
                        row,
                        key,
                        blocks.q_compute,
                        blocks.kv_compute,
                        first_row,
                        entry.outer * blocks.kv,
                    )
                    dq_rows = pl.ds(i * blocks.q + row, piece.rows)
                    _differentiate(refs, scores, piece, limits, seed, g, dq_rows)

    @pl.when(entry.last)
    def _end_keys() -> None:
        refs["dk"][...] = (refs["dk_sum"][...] * scale).astype(refs["dk"].dtype)
        refs["dv"][...] = refs["dv_sum"][...].astype(refs["dv"].dtype)

    @pl.when(step == pl.num_programs(3) - 1)
    def _end() -> None:
        def write(head: Any, rows: Any) -> None:
            total = refs["dq_sum"][head, rows, :] * scale
            refs["dq"][head, rows, :] = total.astype(refs["dq"].dtype)

        each_query_block(write)


def _differentiate(
    refs: dict[str, Any],
    scores: Scores,
    piece: Piece,
    limits: Any,
    seed: Any,
    head: Any,
    dq_rows: Any,
) -> None:
    """Adds one piece to dQ, dK and dV."""
    settings = scores.settings
    rows, keys = pl.ds(piece.row, piece.rows), pl.ds(piece.key, piece.keys)
    query, cotangent = refs["query"][rows, :], refs["cotangent"][rows, :]
    key, value = refs["key"][keys, :], refs["value"][keys, :]
    z, slope = scores.finish(refs, scores.product(query, key), piece, limits)
    p = scores.exp(z - refs["log_total"][:, rows])
    dp = tiles.dot(value, cotangent, (1, 1), settings)
    dropped = p
    if seed is not None:
        kept = scores.kept(seed, piece)
        share = 1 / (1 - settings.dropout_rate)
        dropped, dp = (jnp.where(kept, x * share, 0.0) for x in (p, dp))
    refs["dv_sum"][keys, :] += tiles.dot(
        dropped.astype(cotangent.dtype), cotangent, (1, 0), settings
    )
    ds = p * (dp - refs["delta"][:, rows])
    if slope is not None:
        ds *= slope
    ds = ds.astype(query.dtype)
    refs["dk_sum"][keys, :] += tiles.dot(ds, query, (1, 0), settings)
    refs["dq_sum"][head, dq_rows, :] += tiles.dot(ds, key, (0, 0), settings)
