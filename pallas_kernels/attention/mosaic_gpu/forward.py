"""The forward pass on Hopper: output and log-sum-exp.

A program owns two blocks of rows, one for each of two compute warpgroups, and walks over the key
tiles that its rows see. The third warpgroup copies K and V tiles into one ring of slots, K of the
j-th tile as filling 2 j, V as filling 2 j + 1. Per tile a compute warpgroup does

    x = q kᵀ,    m' = max(m, rowmax x),    p = exp2(x - m'),    a = exp2(m - m')
    l = a l + rowsum p,    acc = a acc + p v

with x and m in base 2 and p from registers as the left operand of the second product. As long as a
row has seen nothing, m' is -inf and 0 takes its place in the exponents.

The two compute warpgroups take turns at the matrix unit: while one multiplies, the other is in its
exponentials. This, the split of the registers and the order of the blocks are design, after
FlashAttention-3 and jax's `attention_mgpu` example; none of it has been timed.

References:
  J. Shah et al., `FlashAttention-3 <https://arxiv.org/abs/2407.08608>`_, 2024.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._compat import out_struct
from pallas_kernels.attention.mosaic_gpu import _common, _tiles
from pallas_kernels.attention.mosaic_gpu._common import COLUMN, LOG2E, TILE, WORKERS, Ring
from pallas_kernels.attention.mosaic_gpu._extras import Extras
from pallas_kernels.attention.problem import Operands, Settings


def forward(settings: Settings, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Returns the output (B, T, N, dv) and the log-sum-exp (B, N, T), as `Route.forward`."""
    call, inputs = _common.prepare(settings, operands)
    size, d = call.size, call.d
    blocks = call.blocks("forward")
    block_q, block_kv = blocks.block_q, blocks.block_kv
    inputs["ranges"] = _tiles.row_ranges(call.mask, size, block_q, block_kv, WORKERS)
    if operands.sinks is not None:
        inputs["sinks"] = operands.sinks
    programs = inputs["ranges"].shape[1]
    rate = call.settings.dropout_rate
    scores = _tiles.scores_of(call)
    extras = Extras(
        call,
        "rows",
        (block_q, block_kv),
        workers=WORKERS,
        readers=WORKERS,
        slots=blocks.extra_slots,
    )

    def body(inputs, output, lse, /, **s):
        head, program, batch, warpgroup = (
            lax.axis_index(name) for name in ("head", "program", "batch", "warpgroup")
        )
        if call.mask.right is not None:
            # Programs start in order, and those of the last rows have most to do under a causal
            # mask: the short ones fill the gaps at the end.
            program = programs - 1 - program
        first_row = program * (WORKERS * block_q)
        ring = Ring(blocks.slots, s["tiles_full"], s["tiles_free"])
        limits = call.limits(inputs, batch)

        def turn_over():
            plgpu.barrier_arrive(s["turn"])
            plgpu.barrier_wait(s["turn"])

        def work(worker):
            span = _tiles.read_range(inputs["ranges"], batch, program, worker)
            own_row = first_row + worker * block_q
            own_rows = pl.ds(own_row, block_q)
            block = s["rows"].at[worker]
            ready = s["rows_full"].at[worker]
            plgpu.copy_gmem_to_smem(inputs["query"].at[batch, own_rows, head], block, ready)
            extras.copy_own(inputs, s, batch, own_row, worker, ready)

            maximum = _common.constant((block_q,), -jnp.inf, COLUMN)
            total = _common.constant((block_q,), 0.0, COLUMN)
            if operands.sinks is not None:
                maximum = _common.constant((block_q,), inputs["sinks"][head] * LOG2E, COLUMN)
                total = _common.constant((block_q,), 1.0, COLUMN)
            accumulator = _common.constant((block_q, d), 0.0, TILE)
            plgpu.barrier_wait(ready)
            pl.when(worker == 1)(turn_over)

            def step(j, carry):
                accumulator, maximum, total = carry
                n = j - span.start
                tile = _tiles.Tile(own_row, j * block_kv, (block_q, block_kv))

                key = s["tiles"].at[ring.wait(2 * n)]
                here = _common.not_hoisted(worker, j)
                product = _common.multiply(
                    s["rows"].at[here], _common.transposed(key), meanwhile=turn_over
                )
                ring.release(2 * n)

                slot = extras.ring(s).wait(n) if extras.copies else None
                x = scores.x(product, extras.bias(s, slot, here, tile))
                whole = (j >= span.whole_start) & (j < span.whole_stop)
                x = extras.hide(x, whole, s, slot, here, tile, limits)
                if extras.copies:
                    extras.release(s, n)

                new = jnp.maximum(maximum, x.max(axis=1) * scores.factor)
                shift = jnp.where(new == -jnp.inf, 0.0, new)
                decay = jnp.exp2(maximum - shift)
                p = jnp.exp2(x * scores.factor - tile.spread(shift, 0))
                total = total * decay + p.sum(axis=1)
                if rate:
                    kept = extras.kept(inputs, s, batch, head, worker, tile)
                    p = jnp.where(kept, p, 0.0)
                accumulator *= lax.broadcast_in_dim(decay, accumulator.shape, [0])
                p = p.astype(call.dtype)

                plgpu.barrier_arrive(s["turn"])  # the exponentials are done
                value = s["tiles"].at[ring.wait(2 * n + 1)]
                plgpu.barrier_wait(s["turn"])  # the other's products are issued
                accumulator = call.machine.multiply_accumulate(accumulator, p, value, s, worker)
                ring.release(2 * n + 1)
                return accumulator, new, total

            accumulator, maximum, total = lax.fori_loop(
                span.start, span.stop, step, (accumulator, maximum, total)
            )
            pl.when(worker == 0)(turn_over)

            seen = total > 0.0
            inverse = jnp.where(seen, 1 / (1 - rate) / total, 0.0)
            accumulator *= lax.broadcast_in_dim(inverse, accumulator.shape, [0])
            block[...] = accumulator.astype(call.dtype)
            natural = maximum * (1 / LOG2E) + jnp.log(total)
            s["lse"][worker] = jnp.where(seen, natural, -jnp.inf)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(block, output.at[batch, own_rows, head])
            plgpu.copy_smem_to_gmem(s["lse"].at[worker], lse.at[batch, head, own_rows])
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

    rows_of_output = inputs["query"].shape[1]
    output, lse = call.machine.kernel(
        body,
        out_type=(
            out_struct((size.batch, rows_of_output, size.heads, d), call.dtype, *operands[:3]),
            out_struct(
                (size.batch, size.heads, programs * WORKERS * block_q), jnp.float32, *operands[:3]
            ),
        ),
        scratch_types={
            "rows": _common.matrix((WORKERS, block_q, d), call.dtype),
            "rows_full": plgpu.Barrier(num_arrivals=1 + extras.own_copies, num_barriers=WORKERS),
            "tiles": _common.matrix((blocks.slots, block_kv, d), call.dtype),
            **_common.ring_barriers("tiles", blocks.slots, copies=1, readers=WORKERS),
            **extras.scratch(),
            "turn": plgpu.Barrier(num_arrivals=WORKERS),
            "lse": plgpu.SMEM((WORKERS, block_q), jnp.float32),
            **call.machine.stand_ins((block_q, block_kv), call.dtype),
        },
        grid=(size.heads, programs, size.batch),
        grid_names=("head", "program", "batch"),
        kernel_name="attention_forward",
    )(inputs)
    return output[:, : size.queries, :, : size.value_dim], lse[:, :, : size.queries]
