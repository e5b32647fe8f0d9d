"""The gradient of queries on Hopper.

Like the forward pass: a program owns two blocks of rows, one for each compute warpgroup, and walks
over the key tiles that they see, K of the n-th tile as filling 2 n of the ring, V as filling
2 n + 1. Per tile

    p = exp2(x - lse)  with  x = q kᵀ,    ds = p (dp - delta)  with  dp = dO vᵀ,    dq += ds k

with ds from registers as the left operand of the third product. Scores and dp are computed a second
time here, after `backward_dkv`: seven products in all in place of five, and in return no sum is
shared between programs, so that two runs agree bit for bit.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._compat import out_struct
from pallas_kernels.attention.mosaic_gpu import _common, _tiles
from pallas_kernels.attention.mosaic_gpu._common import COLUMN, TILE, WORKERS, Call, Ring
from pallas_kernels.attention.mosaic_gpu._extras import Extras


def query_gradient(call: Call, inputs: dict[str, jax.Array]) -> jax.Array:
    """Returns dQ, (B, T, N, d).

    Args:
      call: The call.
      inputs: Those of `_common.prepare_backward`.
    """
    size, d = call.size, call.d
    blocks = call.blocks("backward_dq")
    block_q, block_kv = blocks.block_q, blocks.block_kv
    ranges = _tiles.row_ranges(call.mask, size, block_q, block_kv, WORKERS)
    inputs = dict(inputs, ranges=ranges)
    programs = ranges.shape[1]
    scores = _tiles.scores_of(call)
    rate = call.settings.dropout_rate
    shape = (block_q, block_kv)
    extras = Extras(call, "rows", shape, workers=WORKERS, readers=WORKERS, slots=blocks.extra_slots)

    def body(inputs, dq, /, **s):
        head, program, batch, warpgroup = (
            lax.axis_index(name) for name in ("head", "program", "batch", "warpgroup")
        )
        if call.mask.right is not None:
            program = programs - 1 - program  # as in the forward pass
        first_row = program * (WORKERS * block_q)
        ring = Ring(blocks.slots, s["tiles_full"], s["tiles_free"])
        limits = call.limits(inputs, batch)

        def work(worker):
            span = _tiles.read_range(inputs["ranges"], batch, program, worker)
            own_row = first_row + worker * block_q
            own_rows = pl.ds(own_row, block_q)
            query, cotangent = s["query"].at[worker], s["cotangent"].at[worker]
            ready = s["rows_full"].at[worker]
            plgpu.copy_gmem_to_smem(inputs["query"].at[batch, own_rows, head], query, ready)
            plgpu.copy_gmem_to_smem(inputs["cotangent"].at[batch, own_rows, head], cotangent, ready)
            for i in range(2):
                row_data = inputs["statistics"].at[batch, head, i, own_rows]
                plgpu.copy_gmem_to_smem(row_data, s["statistics"].at[worker, i], ready)
            extras.copy_own(inputs, s, batch, own_row, worker, ready)
            plgpu.barrier_wait(ready)

            def step(j, gradient):
                n = j - span.start
                tile = _tiles.Tile(own_row, j * block_kv, shape)
                key = s["tiles"].at[ring.wait(2 * n)]
                here = _common.not_hoisted(worker, j)
                product = _common.multiply(s["query"].at[here], _common.transposed(key))

                slot = extras.ring(s).wait(n) if extras.copies else None
                x = scores.x(product, extras.bias(s, slot, here, tile))
                whole = (j >= span.whole_start) & (j < span.whole_stop)
                x = extras.hide(x, whole, s, slot, here, tile, limits)
                if extras.copies:
                    extras.release(s, n)
                # Read again for each tile: at head dimension 256 there is no register to keep it.
                lse = _common.load(s["statistics"].at[here, 0], COLUMN)
                p = jnp.exp2(x * scores.factor - tile.spread(lse, 0))
                p = scores.times_slope(p, x)

                value = s["tiles"].at[ring.wait(2 * n + 1)]
                dp = _common.multiply(s["cotangent"].at[here], _common.transposed(value))
                ring.release(2 * n + 1)
                if rate:
                    kept = extras.kept(inputs, s, batch, head, worker, tile)
                    dp = jnp.where(kept, dp * (1 / (1 - rate)), 0.0)
                delta = _common.load(s["statistics"].at[here, 1], COLUMN)
                ds = (p * (dp - tile.spread(delta, 0))).astype(call.dtype)
                gradient = call.machine.multiply_accumulate(gradient, ds, key, s, worker)
                ring.release(2 * n)
                return gradient

            zero = _common.constant((block_q, d), 0.0, TILE)
            gradient = lax.fori_loop(span.start, span.stop, step, zero) * call.settings.scale
            query[...] = gradient.astype(call.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(query, dq.at[batch, own_rows, head])
            plgpu.wait_smem_to_gmem(0)

        def copy():
            span = _tiles.read_range(inputs["ranges"], batch, program)
            kv_head = lax.div(head, jnp.int32(size.group))

            @pl.loop(span.start, span.stop)
            def _(j):
                n = j - span.start
                keys = pl.ds(j * block_kv, block_kv)
                for i, name in enumerate(("key", "value")):
                    slot, full = ring.reserve(2 * n + i)
                    tile = inputs[name].at[batch, keys, kv_head]
                    plgpu.copy_gmem_to_smem(tile, s["tiles"].at[slot], full)
                    if i == 0:
                        extras.copy(inputs, s, batch, head, (first_row, j * block_kv), n)

            ring.drain(2 * (span.stop - span.start))
            if extras.copies:
                extras.ring(s).drain(span.stop - span.start)

        _common.divide_work(warpgroup, work, copy)

    operands = (inputs["query"], inputs["key"], inputs["value"], inputs["cotangent"])
    gradient = call.machine.kernel(
        body,
        out_type=out_struct(inputs["query"].shape, call.dtype, *operands),
        scratch_types={
            "query": _common.matrix((WORKERS, block_q, d), call.dtype),
            "cotangent": _common.matrix((WORKERS, block_q, d), call.dtype),
            "statistics": plgpu.SMEM((WORKERS, 2, block_q), jnp.float32),
            "rows_full": plgpu.Barrier(num_arrivals=4 + extras.own_copies, num_barriers=WORKERS),
            "tiles": _common.matrix((blocks.slots, block_kv, d), call.dtype),
            **_common.ring_barriers("tiles", blocks.slots, copies=1, readers=WORKERS),
            **extras.scratch(),
            **call.machine.stand_ins(shape, call.dtype),
        },
        grid=(size.heads, programs, size.batch),
        grid_names=("head", "program", "batch"),
        kernel_name="attention_backward_dq",
    )(inputs)
    return gradient[:, : size.queries, :, : size.head_dim]
