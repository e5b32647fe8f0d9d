"""Attention's tangent in plain JAX, block by block: memory linear in the length, every feature.

With p = exp(z - lse) known, moves (dq, dk, dv, dbias) of the inputs move each row by sums over the
keys that it sees,

    ds = slope (scale (dq k^T + q dk^T) + dbias)
    mass = sum p ds;   weighted = sum p keep (ds v + dv) / (1 - rate)
    dlse = mass;       do = weighted - o mass

where slope is the soft cap's. The two sums of slices of the keys add up to those of all keys, which
is what a ring of devices needs, and a sink, a key of value 0, adds to the mass alone.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _compat
from pallas_kernels._dtypes import wide
from pallas_kernels.attention import chunked, toeplitz
from pallas_kernels.attention.chunks import (
    arrange,
    band,
    choose_blocks,
    einsum,
    from_steps,
    heads_first,
    keys_and_values,
    pad,
    part,
    position,
)
from pallas_kernels.attention.mask import Limits, Mask, keys_of_rows
from pallas_kernels.attention.problem import Operands, Settings


def tangent(
    settings: Settings, operands: Operands, lse: jax.Array, moved: Mapping[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Returns ``weighted`` (B, T, N, dv) and ``mass`` (B, N, T); see `Route`."""
    size = operands.sizes
    blocks = choose_blocks(settings, operands)
    x = arrange(operands, blocks)
    # What does not move is arranged too, and nobody reads it.
    moving = Operands(
        operands.query,
        moved.get("key", operands.key),
        moved.get("value", operands.value),
        moved.get("bias"),
        mask=Mask(),
        diagonals=moved.get("diagonals"),
    )
    dx = arrange(moving, blocks)
    precise = functools.partial(einsum, settings)
    dtype = wide(operands.query.dtype)
    queries = [pad(a, 1, blocks.q) for a in (operands.query, *_present(moved.get("query")))]
    nq = queries[0].shape[1] // blocks.q
    heads = blocks.heads * size.group
    lse = jnp.where(lse == -jnp.inf, 0, lse)
    lse = pad(lse.reshape(size.batch, size.kv_heads, size.group, size.queries), 3, blocks.q)

    def step(index: jax.Array) -> tuple[jax.Array, jax.Array]:
        group, i = index // nq, index % nq
        b, k = position(group, size.kv_heads, blocks)
        q0 = i * blocks.q

        def rows_of(a: jax.Array) -> jax.Array:
            a = part(a, (b, q0, k * size.group), (blocks.batch, blocks.q, heads))
            return heads_first(a, blocks.heads, blocks.q)

        rows, *d_rows = map(rows_of, queries)
        peak = part(lse, (b, k, 0, q0), (blocks.batch, blocks.heads, size.group, blocks.q))
        limits = part(x.limits, (b,), (blocks.batch,))
        rows_see = keys_of_rows(operands.mask, Limits(*limits.T), q0, q0 + blocks.q - 1)
        span = chunked.widest(rows_see)

        def tile(j: jax.Array, carry: Any, hides: bool) -> tuple[Any, None]:
            weighted, mass = carry
            keys, values = keys_and_values(x, b, k, j, blocks)
            d_keys, d_values = keys_and_values(dx, b, k, j, blocks)
            where = (b, k, i, j)
            z, slope, seen, kept = chunked.scores(
                settings, operands, x, blocks, rows, keys, where, hides
            )
            p = jnp.exp(z - peak[..., None])
            ds = jnp.zeros_like(p)
            for d_row in d_rows:
                d_row = d_row.astype(keys.dtype)
                ds += settings.scale * precise("bkgtd,bksd->bkgts", d_row, keys)
            if "key" in moved:
                row = rows.astype(keys.dtype)
                ds += settings.scale * precise("bkgtd,bksd->bkgts", row, d_keys)
            if dx.bias is not None:
                start, shape = (b, k, 0, q0, j * blocks.kv), p.shape
                ds += part(dx.bias, start, shape).astype(ds.dtype)
            if dx.diagonals is not None:
                of_tile = part(dx.diagonals, *band(dx.diagonals, blocks, where, size.queries))
                ds += toeplitz.tile(of_tile[..., 0, :], blocks.q, blocks.kv).astype(ds.dtype)
            ds = p * ds * slope
            if seen is not None:
                ds = jnp.where(seen, ds, 0)
            mass += ds.sum(axis=-1)
            if kept is not None:
                ds, p = jnp.where(kept, ds, 0), jnp.where(kept, p, 0)
            weighted += precise("bkgts,bksd->bkgtd", ds.astype(values.dtype), values)
            if "value" in moved:
                weighted += precise("bkgts,bksd->bkgtd", p.astype(values.dtype), d_values)
            return (weighted, mass), None

        shape = (blocks.batch, blocks.heads, size.group, blocks.q)
        carry = jnp.zeros((*shape, size.value_dim), dtype), jnp.zeros(shape, dtype)
        varying = (*jax.tree.leaves(operands), lse, *moved.values())
        carry = tuple(_compat.vary_like(c, *varying) for c in carry)
        kind = functools.partial(chunked.tile_kind, x, blocks, span, b, k, i)
        (weighted, mass), _ = chunked.over_tiles(
            tile, kind, span, blocks.kv, x.key.shape[2], carry, skips=x.kinds is not None
        )
        return weighted / (1 - settings.dropout_rate), mass

    groups = (size.batch // blocks.batch) * (size.kv_heads // blocks.heads)
    weighted, mass = lax.map(step, jnp.arange(groups * nq, dtype=jnp.int32))
    weighted = from_steps(weighted, size, blocks, nq)
    mass = from_steps(mass[..., None], size, blocks, nq)[..., 0]
    return weighted[:, : size.queries], mass[:, : size.queries].transpose(0, 2, 1)


PLAIN = chunked.ROUTE._replace(tangent=tangent)
"""`chunked` with its tangent: what differentiates the derivatives of every route."""


def _present(x: jax.Array | None) -> tuple[jax.Array, ...]:
    return () if x is None else (x,)
