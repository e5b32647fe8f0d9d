"""The gradients of keys and values on Hopper, split between two warpgroups.

A program owns a block of keys and walks over the row tiles that see it, for all query heads of the
key/value head one after another, so that no sum over the group is left to do. Tiles are transposed.
The two compute warpgroups hold one gradient each, which fits their registers up to a head dimension
of 256, and do two of the four products each:

    worker 0:  p = exp2(x - lse)  with  x = k qᵀ;         dv += p dO
    worker 1:  ds = p (dp - delta)  with  dp = v dOᵀ;     dk += ds q

Worker 0 hands p, rounded to the input dtype and times the slope of a soft cap, to worker 1 through
two slots of shared memory. The copier fills one ring: q of the n-th tile with its lse as filling
2 n, dO with its delta as filling 2 n + 1. Rows past the end have lse +inf, and so p 0.

Without the split, both gradients of 64 keys at head dimension 256 are all registers of a warpgroup.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._compat import out_struct
from pallas_kernels.attention.mosaic_gpu import _common, _tiles
from pallas_kernels.attention.mosaic_gpu._common import COPIER, ROW, TILE, WORKERS, Call, Ring
from pallas_kernels.attention.mosaic_gpu._extras import Extras

_HANDOVERS = 2  # slots for p


def key_value_gradients(call: Call, inputs: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Returns dK and dV, (B, S, K, d) and (B, S, K, dv).

    Args:
      call: The call.
      inputs: Those of `_common.prepare`, with ``"cotangent"`` and ``"statistics"``.
    """
    size, d = call.size, call.d
    blocks = call.blocks("backward_dkv")
    block_q, block_kv = blocks.block_q, blocks.block_kv
    inputs = dict(inputs, ranges=_tiles.key_ranges(call.mask, size, block_q, block_kv))
    if call.bias_kind == "tile":
        inputs["bias"] = inputs["bias"].swapaxes(2, 3)
    scores = _tiles.scores_of(call)
    rate = call.settings.dropout_rate
    shape = (block_kv, block_q)
    extras = Extras(call, "keys", shape, workers=1, readers=1, slots=blocks.extra_slots)

    def body(inputs, key_gradient, value_gradient, /, **s):
        kv_head, program, batch, warpgroup = (
            lax.axis_index(name) for name in ("head", "program", "batch", "warpgroup")
        )
        first_key = program * block_kv
        keys = pl.ds(first_key, block_kv)
        span = _tiles.read_range(inputs["ranges"], batch, program)
        count = span.stop - span.start
        ring = Ring(blocks.slots, s["tiles_full"], s["tiles_free"])
        handovers = Ring(_HANDOVERS, s["p_full"], s["p_free"])
        limits = call.limits(inputs, batch)

        def each_tile(step, carry):
            """Runs ``carry = step(n, head, i, carry)`` for all tiles of all heads."""

            def of_head(g, carry):
                head = kv_head * size.group + g
                return lax.fori_loop(
                    span.start,
                    span.stop,
                    lambda i, carry: step(g * count + i - span.start, head, i, carry),
                    carry,
                )

            return lax.fori_loop(0, size.group, of_head, carry)

        def work_on_values():
            block = inputs["key"].at[batch, keys, kv_head]
            plgpu.copy_gmem_to_smem(block, s["key"].at[0], s["key_full"])
            extras.copy_own(inputs, s, batch, first_key, 0, s["key_full"])
            plgpu.barrier_wait(s["key_full"])

            def step(n, head, i, gradient):
                tile = _tiles.Tile(i * block_q, first_key, shape, row_axis=1)
                slot = ring.wait(2 * n)
                query = s["tiles"].at[slot]
                here = _common.not_hoisted(0, i)
                key = s["key"].at[here]
                product = _common.multiply(key, _common.transposed(query))
                lse = _common.load(s["statistics"].at[slot], ROW)
                ring.release(2 * n)

                slot = extras.ring(s).wait(n) if extras.copies else None
                x = scores.x(product, extras.bias(s, slot, here, tile))
                whole = (i >= span.whole_start) & (i < span.whole_stop)
                x = extras.hide(x, whole, s, slot, here, tile, limits)
                if extras.copies:
                    extras.release(s, n)
                p = jnp.exp2(x * scores.factor - tile.spread(lse, 1))
                w = scores.times_slope(p, x)

                slot, full = handovers.reserve(n)
                s["p"][slot] = w.astype(call.dtype)
                plgpu.commit_smem()
                plgpu.barrier_arrive(full)

                if rate:
                    p = jnp.where(extras.kept(inputs, s, batch, head, 0, tile), p, 0.0)
                cotangent = s["tiles"].at[ring.wait(2 * n + 1)]
                p = p.astype(call.dtype)
                gradient = call.machine.multiply_accumulate(gradient, p, cotangent, s, 0)
                ring.release(2 * n + 1)
                return gradient

            zero = _common.constant((block_kv, d), 0.0, TILE)
            gradient = each_tile(step, zero)
            handovers.drain(size.group * count)
            finish(gradient * (1 / (1 - rate)), s["value"].at[0], value_gradient)

        def work_on_keys():
            block = inputs["value"].at[batch, keys, kv_head]
            plgpu.copy_gmem_to_smem(block, s["value"].at[0], s["value_full"])
            extras.copy_own(inputs, s, batch, first_key, 1, s["value_full"])
            plgpu.barrier_wait(s["value_full"])

            def step(n, head, i, gradient):
                tile = _tiles.Tile(i * block_q, first_key, shape, row_axis=1)
                slot = ring.wait(2 * n + 1)
                cotangent = s["tiles"].at[slot]
                value = s["value"].at[_common.not_hoisted(0, i)]
                dp = _common.multiply(value, _common.transposed(cotangent))
                delta = _common.load(s["statistics"].at[slot], ROW)
                ring.release(2 * n + 1)
                if rate:
                    dp = jnp.where(
                        extras.kept(inputs, s, batch, head, 1, tile), dp * (1 / (1 - rate)), 0.0
                    )

                p = _common.load(s["p"].at[handovers.wait(n)], TILE).astype(jnp.float32)
                handovers.release(n)
                ds = (p * (dp - tile.spread(delta, 1))).astype(call.dtype)
                query = s["tiles"].at[ring.wait(2 * n)]
                gradient = call.machine.multiply_accumulate(gradient, ds, query, s, 1)
                ring.release(2 * n)
                return gradient

            zero = _common.constant((block_kv, d), 0.0, TILE)
            finish(each_tile(step, zero) * call.settings.scale, s["key"].at[0], key_gradient)

        def finish(gradient, buffer, output):
            # K and V are read no more when both have come here: their buffers take the results.
            plgpu.barrier_arrive(s["done"])
            plgpu.barrier_wait(s["done"])
            buffer[...] = gradient.astype(call.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(buffer, output.at[batch, keys, kv_head])
            plgpu.wait_smem_to_gmem(0)

        def copy():
            def step(n, head, i, carry):
                rows = pl.ds(i * block_q, block_q)
                for j, name in enumerate(("query", "cotangent")):
                    slot, full = ring.reserve(2 * n + j)
                    tile = inputs[name].at[batch, rows, head]
                    plgpu.copy_gmem_to_smem(tile, s["tiles"].at[slot], full)
                    row_data = inputs["statistics"].at[batch, head, j, rows]
                    plgpu.copy_gmem_to_smem(row_data, s["statistics"].at[slot], full)
                    if j == 0:
                        extras.copy(inputs, s, batch, head, (first_key, i * block_q), n)
                return carry

            each_tile(step, 0)
            ring.drain(2 * size.group * count)
            if extras.copies:
                extras.ring(s).drain(size.group * count)

        @pl.when(warpgroup == 0)
        def _():
            plgpu.set_max_registers(_common.WORKER_REGISTERS, action="increase")
            work_on_values()

        @pl.when(warpgroup == 1)
        def _():
            plgpu.set_max_registers(_common.WORKER_REGISTERS, action="increase")
            work_on_keys()

        @pl.when(warpgroup == COPIER)
        def _():
            plgpu.set_max_registers(_common.COPIER_REGISTERS, action="decrease")
            copy()

    operands = (inputs["query"], inputs["key"], inputs["value"], inputs["cotangent"])
    gradients = call.machine.kernel(
        body,
        out_type=tuple(
            out_struct(inputs[x].shape, call.dtype, *operands) for x in ("key", "value")
        ),
        scratch_types={
            "key": _common.matrix((1, block_kv, d), call.dtype),
            "value": _common.matrix((1, block_kv, d), call.dtype),
            "key_full": plgpu.Barrier(num_arrivals=1 + extras.own_copies),
            "value_full": plgpu.Barrier(num_arrivals=1 + extras.own_copies),
            "tiles": _common.matrix((blocks.slots, block_q, d), call.dtype),
            "statistics": plgpu.SMEM((blocks.slots, block_q), jnp.float32),
            **_common.ring_barriers("tiles", blocks.slots, copies=2, readers=WORKERS),
            **extras.scratch(),
            "p": _common.matrix((_HANDOVERS, *shape), call.dtype),
            **_common.ring_barriers("p", _HANDOVERS, copies=1, readers=1),
            "done": plgpu.Barrier(num_arrivals=WORKERS),
            **call.machine.stand_ins(shape, call.dtype),
        },
        grid=(size.kv_heads, inputs["ranges"].shape[1], size.batch),
        grid_names=("head", "program", "batch"),
        kernel_name="attention_backward_dkv",
    )(inputs)
    return tuple(
        x[:, : size.keys, :, :width] for x, width in zip(gradients, (size.head_dim, size.value_dim))
    )
