"""Blockwise attention in plain JAX: memory linear in the length, every feature, every device.

Forward, for each block of queries, over the blocks of keys that it sees (Rabe and Staats 2021,
https://arxiv.org/abs/2112.05682; Dao et al. 2022, https://arxiv.org/abs/2205.14135):

    m' = max(m, rowmax z);        a = exp(m - m');   p = exp(z - m')
    total = a total + rowsum p;   o = a o + p v

Backward, for each block of keys, over the blocks of queries that see it:

    p = exp(z - lse);   ds = p (dO v^T - delta);   dv += p^T dO;   dk += ds^T q;   dq += ds k

The route ``"chunked"``: what a CPU runs, and what every device falls back to.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _compat
from pallas_kernels._dtypes import wide
from pallas_kernels.attention import dropout, toeplitz
from pallas_kernels.attention.chunks import (
    Arranged,
    Blocks,
    ChunkedConfig,
    add_summed,
    arrange,
    band,
    bias_gradient_of,
    choices,
    choose_blocks,
    einsum,
    from_steps,
    heads_first,
    keys_and_values,
    pad,
    part,
    position,
)
from pallas_kernels.attention.mask import (
    PARTIAL,
    SKIP,
    WHOLE,
    Limits,
    Span,
    in_interval,
    keys_of_rows,
    rows_of_keys,
)
from pallas_kernels.attention.problem import Gradients, Operands, Route, Settings


class _Tile(NamedTuple):
    """One block of queries times one block of keys, of the heads of one step."""

    scores: jax.Array  # float32 (b, k, G, q, kv), -inf where hidden
    slope: Any  # of the soft cap, or 1
    seen: jax.Array | None  # None where everything is
    kept: jax.Array | None  # of dropout


def forward(settings: Settings, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Returns output and lse; see `Route`."""
    size = operands.sizes
    blocks = choose_blocks(settings, operands)
    x = arrange(operands, blocks)
    precise = functools.partial(einsum, settings)
    dtype = wide(operands.query.dtype)
    query = pad(operands.query, 1, blocks.q)
    nq = query.shape[1] // blocks.q
    heads = blocks.heads * size.group
    sinks = None
    if operands.sinks is not None:
        sinks = operands.sinks.reshape(1, size.kv_heads, size.group, 1)

    def step(index: jax.Array) -> tuple[jax.Array, jax.Array]:
        group, i = index // nq, index % nq
        b, k = position(group, size.kv_heads, blocks)
        q0 = i * blocks.q
        # Its rows are read once, so the query alone is not put heads first as a whole.
        rows = part(query, (b, q0, k * size.group), (blocks.batch, blocks.q, heads))
        rows = heads_first(rows, blocks.heads, blocks.q)
        limits = part(x.limits, (b,), (blocks.batch,))
        span = widest(keys_of_rows(operands.mask, Limits(*limits.T), q0, q0 + blocks.q - 1))

        def tile(j: jax.Array, carry: Any, hides: bool) -> tuple[Any, None]:
            m, total, o = carry
            keys, values = keys_and_values(x, b, k, j, blocks)
            z, _, _, kept = scores(settings, operands, x, blocks, rows, keys, (b, k, i, j), hides)
            m_new = jnp.maximum(m, z.max(axis=-1))
            shift = jnp.where(m_new == -jnp.inf, 0, m_new)
            a = jnp.exp(m - shift)
            p = jnp.exp(z - shift[..., None])
            total = a * total + p.sum(axis=-1)
            if kept is not None:
                p = jnp.where(kept, p, 0)
            o = a[..., None] * o + precise("bkgts,bksd->bkgtd", p.astype(values.dtype), values)
            return (m_new, total, o), None

        shape = (blocks.batch, blocks.heads, size.group, blocks.q)
        if sinks is None:
            m, total = jnp.full(shape, -jnp.inf, dtype), jnp.zeros(shape, dtype)
        else:
            sink = part(sinks, (0, k), (1, blocks.heads)).astype(dtype)
            m, total = jnp.broadcast_to(sink, shape), jnp.ones(shape, dtype)
        carry = m, total, jnp.zeros((*shape, size.value_dim), dtype)
        carry = tuple(_compat.vary_like(c, *jax.tree.leaves(operands)) for c in carry)
        kind = functools.partial(tile_kind, x, blocks, span, b, k, i)
        (m, total, o), _ = over_tiles(
            tile, kind, span, blocks.kv, x.key.shape[2], carry, skips=x.kinds is not None
        )
        empty = total == 0
        total = jnp.where(empty, 1, total)
        lse = jnp.where(empty, -jnp.inf, m + jnp.log(total))
        o = o / (total * (1 - settings.dropout_rate))[..., None]
        return o.astype(operands.query.dtype), lse

    groups = (size.batch // blocks.batch) * (size.kv_heads // blocks.heads)
    output, lse = lax.map(step, jnp.arange(groups * nq, dtype=jnp.int32))
    output = from_steps(output, size, blocks, nq)
    lse = from_steps(lse[..., None], size, blocks, nq)[..., 0]
    return output[:, : size.queries], lse[:, : size.queries].transpose(0, 2, 1)


def backward(
    settings: Settings,
    operands: Operands,
    lse: jax.Array,
    cotangent: jax.Array,
    delta: jax.Array,
    bias_gradient: bool,
) -> Gradients:
    """Returns the gradients; see `Route`."""
    size = operands.sizes
    blocks = choose_blocks(settings, operands)
    x = arrange(operands, blocks)
    precise = functools.partial(einsum, settings)
    query = heads_first(operands.query, size.kv_heads, blocks.q)
    compute = query.dtype if _compat.device().platform != "cpu" else lse.dtype
    split = (size.batch, size.kv_heads, size.group, size.queries)
    lse = pad(jnp.where(lse == -jnp.inf, 0, lse).reshape(split), 3, blocks.q)
    delta = pad(delta.reshape(split), 3, blocks.q)
    cotangent = heads_first(cotangent, size.kv_heads, blocks.q)
    nk = x.key.shape[2] // blocks.kv
    per_step = (blocks.batch, blocks.heads, size.group)
    keep_scale = 1 / (1 - settings.dropout_rate)

    def head_step(d_bias: Any, group: jax.Array) -> tuple[Any, Any]:
        b, k = position(group, size.kv_heads, blocks)
        limits = part(x.limits, (b,), (blocks.batch,))

        def key_step(totals: Any, j: jax.Array) -> tuple[Any, Any]:
            k0 = j * blocks.kv
            keys, values = keys_and_values(x, b, k, j, blocks)
            span = widest(rows_of_keys(operands.mask, Limits(*limits.T), k0, k0 + blocks.kv - 1))

            def tile(i: jax.Array, carry: Any, hides: bool) -> Any:
                d_key, d_value = carry
                q0 = i * blocks.q
                take = lambda a: part(a, (b, k, 0, q0), (*per_step, blocks.q))  # noqa: E731
                rows, d_o = take(query), take(cotangent).astype(compute)
                z, slope, seen, kept = scores(
                    settings, operands, x, blocks, rows, keys, (b, k, i, j), hides
                )
                p = jnp.exp(z - take(lse)[..., None])
                dp = precise("bkgtd,bksd->bkgts", d_o, values)
                dropped = p
                if kept is not None:
                    dp = jnp.where(kept, dp * keep_scale, 0)
                    dropped = jnp.where(kept, p * keep_scale, 0)
                d_scores = p * (dp - take(delta)[..., None]) * slope
                if seen is not None:
                    d_scores = jnp.where(seen, d_scores, 0)
                # Gradients of keys and values stand transposed, so that no tile of scores must be.
                d_value += precise("bkgtd,bkgts->bkds", d_o, dropped.astype(compute))
                ds = d_scores.astype(compute)
                d_key += precise("bkgtd,bkgts->bkds", rows.astype(compute), ds)
                d_rows = precise("bkgts,bksd->bkgtd", ds, keys)
                return (d_key, d_value), (d_rows, None if d_bias is None else d_scores)

            def add(i: jax.Array, totals: Any, found: Any) -> Any:
                (d_query, d_bias), (d_rows, d_scores), q0 = totals, found, i * blocks.q
                d_query = add_summed(d_query, d_rows, (0, 0, 0, q0, 0))
                if x.diagonals is not None and d_bias is not None:
                    corner, _ = band(x.diagonals, blocks, (b, k, i, j), size.queries)
                    d_bias = add_summed(d_bias, toeplitz.sums(d_scores)[..., None, :], corner)
                elif d_bias is not None:
                    d_bias = add_summed(d_bias, d_scores, (b, k, 0, q0, k0))
                return d_query, d_bias

            d_key, d_value = (jnp.zeros(a.mT.shape, lse.dtype) for a in (keys, values))
            d_key, d_value = (_compat.vary_like(a, *varying) for a in (d_key, d_value))
            kind = functools.partial(tile_kind, x, blocks, span, b, k, swap=j)
            (d_key, d_value), totals = over_tiles(
                tile,
                kind,
                span,
                blocks.q,
                query.shape[3],
                (d_key, d_value),
                totals,
                add,
                skips=x.kinds is not None,
            )
            d_key = (settings.scale * d_key).astype(x.key.dtype)
            return totals, (d_key.mT, d_value.mT.astype(x.value.dtype))

        d_query = jnp.zeros((*per_step, *query.shape[3:]), lse.dtype)
        d_query = _compat.vary_like(d_query, *varying)
        (d_query, d_bias), (d_key, d_value) = lax.scan(
            key_step, (d_query, d_bias), jnp.arange(nk, dtype=jnp.int32)
        )
        return d_bias, ((settings.scale * d_query).astype(query.dtype), d_key, d_value)

    varying = (*jax.tree.leaves(operands), cotangent, delta, lse)
    d_bias = None
    if bias_gradient:
        shape = jax.eval_shape(lambda: x.diagonals if x.bias is None else x.bias).shape
        d_bias = _compat.vary_like(jnp.zeros(shape, lse.dtype), *varying)
    groups = (size.batch // blocks.batch) * (size.kv_heads // blocks.heads)
    d_bias, (d_query, d_key, d_value) = lax.scan(
        head_step, d_bias, jnp.arange(groups, dtype=jnp.int32)
    )
    d_query = from_steps(d_query, size, blocks, 1)[:, : size.queries]
    d_key, d_value = (
        from_steps(a.reshape(-1, *a.shape[2:])[:, :, :, None], size, blocks, nk)[:, : size.keys]
        for a in (d_key, d_value)
    )
    of_bias = {} if d_bias is None else bias_gradient_of(d_bias, operands, blocks)
    return Gradients(d_query, d_key, d_value, **of_bias)


def refusal(settings: Settings, operands: Operands, device: _compat.Device) -> str | None:
    """Returns None: every call is served."""
    del settings, operands, device
    return None


ROUTE = Route("chunked", forward, backward, refusal, ChunkedConfig, choices)


def scores(
    settings: Settings,
    operands: Operands,
    x: Arranged,
    blocks: Blocks,
    rows: jax.Array,
    keys: jax.Array,
    position: tuple[Any, Any, Any, Any],
    hides: bool,
) -> _Tile:
    """Returns the scores of block (i, j); `hides` says whether its mask must be evaluated."""
    b, k, i, j = position
    group = operands.sizes.group
    start = (b, k, 0, i * blocks.q, j * blocks.kv)
    size = (blocks.batch, blocks.heads, group, blocks.q, blocks.kv)
    rows = rows.astype(keys.dtype)
    exact = wide(keys.dtype) == keys.dtype  # else the scaled rows would be rounded
    z = einsum(settings, "bkgtd,bksd->bkgts", settings.scale * rows if exact else rows, keys)
    z = z if exact else settings.scale * z
    if x.bias is not None:
        z += part(x.bias, start, size).astype(z.dtype)
    if x.diagonals is not None:
        of_tile = part(x.diagonals, *band(x.diagonals, blocks, position, operands.sizes.queries))
        z += toeplitz.tile(of_tile[..., 0, :], blocks.q, blocks.kv).astype(z.dtype)
    slope = 1
    if settings.soft_cap is not None:
        tanh = jnp.tanh(z / settings.soft_cap)
        capped, slope = settings.soft_cap * tanh, 1 - tanh * tanh
        hides_by_value = x.bias is not None or x.diagonals is not None
        z = jnp.where(z == -jnp.inf, -jnp.inf, capped) if hides_by_value else capped
    q_positions = i * blocks.q + jnp.arange(blocks.q, dtype=jnp.int32)
    k_positions = j * blocks.kv + jnp.arange(blocks.kv, dtype=jnp.int32)
    q_positions, k_positions = q_positions[None, None, None, :, None], k_positions[(None,) * 4]
    seen = kept = None
    if hides:
        limits = part(x.limits, (b,), (blocks.batch,))
        columns = Limits(*limits.T[:, :, None, None, None, None])
        seen = in_interval(operands.mask, columns, q_positions, k_positions)
        if x.q_ids is not None and x.kv_ids is not None:
            q_ids = part(x.q_ids, (b, i * blocks.q), (blocks.batch, blocks.q))
            kv_ids = part(x.kv_ids, (b, j * blocks.kv), (blocks.batch, blocks.kv))
            seen &= (q_ids[:, :, None] == kv_ids[:, None, :])[:, None, None]
        if x.dense is not None:
            seen &= part(x.dense, start, size)
        z = jnp.where(seen, z, -jnp.inf)
    if x.seeds is not None:
        seeds = part(x.seeds, (b, k, 0), (blocks.batch, blocks.heads, group))[..., None, None]
        kept = dropout.keep(seeds, q_positions, k_positions, settings.dropout_rate)
    return _Tile(z, slope, seen, kept)


def widest(span: Span) -> Span:
    """Joins the spans of several batch entries: what some needs, and what is whole for all."""
    start, stop, whole_start, whole_stop = (jnp.asarray(x, jnp.int32) for x in span)
    return Span(start.min(), stop.max(), whole_start.max(), whole_stop.min())


def tile_kind(
    x: Arranged,
    blocks: Blocks,
    span: Span,
    b: Any,
    k: Any,
    *index: Any,
    swap: Any = None,
) -> Any:
    """Returns what the tile is to the heads of one step; `span` is in keys, or in rows if `swap`.

    `index` is (query block, key block), or (query block,) with the key block in `swap`.
    """
    if x.kinds is not None:
        i, j = index if swap is None else (index[0], swap)
        group = x.kinds.shape[2]
        kinds = part(x.kinds, (b, k, 0, i, j), (blocks.batch, blocks.heads, group, 1, 1))
        skip, whole = (kinds == SKIP).all(), (kinds == WHOLE).all()
        return jnp.where(skip, SKIP, jnp.where(whole, WHOLE, PARTIAL))
    first = index[-1] * (blocks.kv if swap is None else blocks.q)
    last = first + (blocks.kv if swap is None else blocks.q)
    whole = (first >= span.whole_start) & (last <= span.whole_stop)
    return jnp.where(whole, WHOLE, PARTIAL)


def over_tiles(
    tile: Any,
    kind: Any,
    span: Span,
    block: int,
    length: int,
    carry: Any,
    totals: Any = None,
    add: Any = lambda index, totals, found: totals,
    *,
    skips: bool,
) -> tuple[Any, Any]:
    """Runs ``tile(index, carry, hides)`` over the blocks that `span` needs, as `kind` says.

    A tile returns its carry and what ``add(index, totals, found)`` adds to arrays much larger than
    it, which no branch may hold: XLA would copy them for each tile. `skips` says whether `kind` may
    be `SKIP`.
    """
    assert (SKIP, WHOLE, PARTIAL) == (0, 1, 2)
    branches: list[Any] = [functools.partial(tile, hides=hides) for hides in (False, True)]
    if skips:
        found = jax.eval_shape(branches[0], jnp.int32(0), carry)[1]

        def skip(index: jax.Array, carry: Any) -> Any:
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), found)
            like = jax.tree.leaves(carry)
            return carry, jax.tree.map(lambda x: _compat.vary_like(x, *like), zeros)

        branches.insert(0, skip)

    def step(index: jax.Array, state: Any) -> Any:
        carry, totals = state
        branch = kind(index) - (SKIP if skips else WHOLE)
        carry, found = lax.switch(branch, branches, index, carry)
        return carry, add(index, totals, found)

    start = span.start // block
    stop = jnp.minimum(-(-span.stop // block), length // block)
    return lax.fori_loop(start, stop, step, (carry, totals))
