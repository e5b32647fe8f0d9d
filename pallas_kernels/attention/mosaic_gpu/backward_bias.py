"""The gradient of a bias on Hopper.

    dbias = ds  summed over the axes along which the bias has length 1,    ds = p (dp - delta)

A program owns a tile of the sum, two blocks of rows for the compute warpgroups and a block of keys,
and visits every batch entry and head that shares the bias there; where the bias has no rows it also
walks over all rows, where it has no keys over all keys. The sum stays in registers and is written
once, so that two runs agree bit for bit. What remains to be added up, within one tile, is left to
XLA.

Each visit needs q, k and then dO, v: two rings, of which the second is filled while the first is
multiplied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._compat import out_struct
from pallas_kernels.attention.mosaic_gpu import _common, _tiles
from pallas_kernels.attention.mosaic_gpu._common import COLUMN, TILE, WORKERS, Call, Ring
from pallas_kernels.attention.mosaic_gpu._extras import Extras


class _Visit(NamedTuple):
    """One tile of scores that a program adds to its sum."""

    batch: Any
    head: Any
    row_block: Any  # of `WORKERS` blocks of rows
    key_block: Any


def bias_gradient(call: Call, inputs: dict[str, jax.Array], bias: jax.Array) -> jax.Array:
    """Returns the gradient of a bias, in its shape and dtype.

    Args:
      call: The call.
      inputs: Those of `_common.prepare_backward`.
      bias: The bias as it was given, (B or 1, N or 1, T or 1, S or 1).
    """
    size, d = call.size, call.d
    blocks = call.blocks("backward_bias")
    block_q, block_kv, stages = blocks.block_q, blocks.block_kv, blocks.slots // 2
    ranges = _tiles.row_ranges(call.mask, size, block_q, block_kv, WORKERS)
    inputs = dict(inputs, ranges=ranges)
    row_blocks, key_blocks = ranges.shape[1], -(-size.keys // block_kv)
    # One axis at most is walked: of a bias with neither rows nor keys, that of the keys.
    owns_keys = bias.shape[3] != 1
    owns_rows = bias.shape[2] != 1 or not owns_keys
    walked = (1 if owns_keys else key_blocks) * (1 if owns_rows else row_blocks)
    heads = size.heads if bias.shape[1] == 1 else 1
    visits = walked * heads * (size.batch if bias.shape[0] == 1 else 1)
    scores = _tiles.scores_of(call)
    rate = call.settings.dropout_rate
    shape = (block_q, block_kv)
    extras = Extras(call, "rows", shape, workers=WORKERS, readers=WORKERS, slots=blocks.extra_slots)

    def body(inputs, out, /, **s):
        own_head, own_tile, own_batch, warpgroup = (
            lax.axis_index(name) for name in ("head", "tile", "batch", "warpgroup")
        )
        products = Ring(stages, s["products_full"], s["products_free"])
        cotangents = Ring(stages, s["cotangents_full"], s["cotangents_free"])

        def own_blocks(walk: Any) -> tuple[Any, Any]:
            if owns_rows and owns_keys:
                both = jnp.int32(key_blocks)
                return lax.div(own_tile, both), lax.rem(own_tile, both)
            return (own_tile, walk) if owns_rows else (walk, own_tile)

        def each(visit: Callable[[_Visit, Any, Any], Any], carry: Any = ()) -> tuple[Any, Any]:
            """Visits what the mask leaves; returns how many tiles that were, and the carry."""

            def step(i, state):
                n, carry = state
                rest = lax.div(i, jnp.int32(walked))
                at = _Visit(
                    own_batch + lax.div(rest, jnp.int32(heads)),
                    own_head + lax.rem(rest, jnp.int32(heads)),
                    *own_blocks(lax.rem(i, jnp.int32(walked))),
                )
                span = _tiles.read_range(inputs["ranges"], at.batch, at.row_block)
                needed = (at.key_block >= span.start) & (at.key_block < span.stop)
                carry = lax.cond(needed, lambda x: visit(at, n, x), lambda x: x, carry)
                return n + needed.astype(jnp.int32), carry

            return lax.fori_loop(jnp.int32(0), jnp.int32(visits), step, (jnp.int32(0), carry))

        def work(worker):
            if extras.needs_counts:
                ready = s["counts_full"].at[worker]
                extras.copy_counts(inputs, s, worker, ready)
                plgpu.barrier_wait(ready)

            def visit(at, n, total):
                first_row = (at.row_block * WORKERS + worker) * block_q
                tile = _tiles.Tile(first_row, at.key_block * block_kv, shape)
                slot = products.wait(n)
                key = _common.transposed(s["key"].at[slot])
                product = _common.multiply(s["query"].at[slot, worker], key)

                extra = extras.ring(s).wait(n)
                x = scores.x(product, extras.bias(s, extra, worker, tile))
                span = _tiles.read_range(inputs["ranges"], at.batch, at.row_block, worker)
                whole = (at.key_block >= span.whole_start) & (at.key_block < span.whole_stop)
                here = dict(s, own_ids=s["own_ids"].at[slot]) if call.has_segments else s
                limits = call.limits(inputs, at.batch)
                x = extras.hide(x, whole, here, extra, worker, tile, limits)
                lse, delta = (
                    tile.spread(_common.load(s["statistics"].at[slot, worker, i], COLUMN), 0)
                    for i in range(2)
                )
                extras.release(s, n)
                products.release(n)
                p = scores.times_slope(jnp.exp2(x * scores.factor - lse), x)

                slot = cotangents.wait(n)
                value = _common.transposed(s["value"].at[slot])
                dp = _common.multiply(s["cotangent"].at[slot, worker], value)
                cotangents.release(n)
                if rate:
                    kept = extras.kept(inputs, s, at.batch, at.head, worker, tile)
                    dp = jnp.where(kept, dp * (1 / (1 - rate)), 0.0)
                return total + p * (dp - delta)

            _, total = each(visit, _common.constant(shape, 0.0, TILE))
            row_block, key_block = own_blocks(0)
            rows = pl.ds((row_block * WORKERS + worker) * block_q, block_q)
            keys = pl.ds(key_block * block_kv, block_kv)
            if not (owns_rows and owns_keys):
                out[own_batch, own_head, rows, keys] = total
                return
            # Entries of 16 bits go out by TMA, from where this worker has read its last bias.
            tile = s["bias"].at[0, worker]
            tile[...] = total.astype(out.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile, out.at[own_batch, own_head, rows, keys])
            plgpu.wait_smem_to_gmem(0)

        def copy():
            def fill(at, n, carry):
                first_row, first_key = at.row_block * (WORKERS * block_q), at.key_block * block_kv
                kv_head = lax.div(at.head, jnp.int32(size.group))
                keys = pl.ds(first_key, block_kv)
                rows = [pl.ds(first_row + i * block_q, block_q) for i in range(WORKERS)]

                slot, full = products.reserve(n)
                for i, own in enumerate(rows):
                    query = inputs["query"].at[at.batch, own, at.head]
                    plgpu.copy_gmem_to_smem(query, s["query"].at[slot, i], full)
                    for j in range(2):
                        row_data = inputs["statistics"].at[at.batch, at.head, j, own]
                        plgpu.copy_gmem_to_smem(row_data, s["statistics"].at[slot, i, j], full)
                    if call.has_segments:
                        ids = inputs["row_ids"].at[at.batch, own]
                        plgpu.copy_gmem_to_smem(ids, s["own_ids"].at[slot, i], full)
                key = inputs["key"].at[at.batch, keys, kv_head]
                plgpu.copy_gmem_to_smem(key, s["key"].at[slot], full)
                extras.copy(inputs, s, at.batch, at.head, (first_row, first_key), n)

                slot, full = cotangents.reserve(n)
                for i, own in enumerate(rows):
                    cotangent = inputs["cotangent"].at[at.batch, own, at.head]
                    plgpu.copy_gmem_to_smem(cotangent, s["cotangent"].at[slot, i], full)
                value = inputs["value"].at[at.batch, keys, kv_head]
                plgpu.copy_gmem_to_smem(value, s["value"].at[slot], full)
                return carry

            count, _ = each(fill)
            for ring in (products, cotangents, extras.ring(s)):
                ring.drain(count)

        _common.divide_work(warpgroup, work, copy)

    tiles = (row_blocks if owns_rows else 1, key_blocks if owns_keys else 1)
    summed = (*bias.shape[:2], tiles[0] * WORKERS * block_q, tiles[1] * block_kv)
    operands = (inputs["query"], inputs["key"], inputs["value"], inputs["cotangent"])
    scratch = {
        "query": _common.matrix((stages, WORKERS, block_q, d), call.dtype),
        "key": _common.matrix((stages, block_kv, d), call.dtype),
        "statistics": plgpu.SMEM((stages, WORKERS, 2, block_q), jnp.float32),
        "cotangent": _common.matrix((stages, WORKERS, block_q, d), call.dtype),
        "value": _common.matrix((stages, block_kv, d), call.dtype),
        **extras.scratch(),
    }
    of_products = 1 + WORKERS * 3
    if call.has_segments:  # Rows change from visit to visit, and with them their ids.
        scratch["own_ids"] = plgpu.SMEM((stages, WORKERS, block_q), jnp.int32)
        of_products += WORKERS
    if extras.needs_counts:
        scratch["counts_full"] = plgpu.Barrier(num_arrivals=1, num_barriers=WORKERS)
    scratch |= _common.ring_barriers("products", stages, of_products, readers=WORKERS)
    scratch |= _common.ring_barriers("cotangents", stages, 1 + WORKERS, readers=WORKERS)
    total = call.machine.kernel(
        body,
        out_type=out_struct(
            summed, bias.dtype if owns_rows and owns_keys else jnp.float32, *operands
        ),
        scratch_types=scratch,
        grid=(bias.shape[1], tiles[0] * tiles[1], bias.shape[0]),
        grid_names=("head", "tile", "batch"),
        kernel_name="attention_backward_bias",
    )(inputs)
    total = total[:, :, : size.queries if owns_rows else None, : size.keys if owns_keys else None]
    axes = tuple(axis for axis in (2, 3) if bias.shape[axis] == 1)
    return total.sum(axis=axes, keepdims=True).astype(bias.dtype)
