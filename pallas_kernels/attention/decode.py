"""Attention of the last few tokens of each sequence over its cache: one step of generation.

    z = key_scale * scale * q k^T;   z = cap tanh(z / cap);   -inf where the token must not look
    output = (p * value_scale) v,    p = exp(z - lse),   lse = log(sum exp z + exp sink)

The step is bound by the bytes of the cache, so nothing is read that no token sees, an int8 or
float8 cache is never widened in memory, and the cache can be split into parts that run side by side
and are merged at the end (flash decoding). A sink is one more part, whose output is 0.

Here: the public function and two implementations in plain JAX, ``"chunked"`` (blocks of keys in a
loop that ends with the longest sequence) and ``"reference"`` (the whole cache at once). The kernels
are in `decode_triton` and `decode_tpu`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _options
from pallas_kernels._compat import Device, device, vary_like
from pallas_kernels.attention import reference, routes, tuning
from pallas_kernels.attention.decode_placement import where_it_lies
from pallas_kernels.attention.decode_problem import (
    Operands,
    Settings,
    blocks_of_split,
    canonical,
    checked_sinks,
    keys_needed,
    lookup_of,
    sees,
)
from pallas_kernels.attention.derivatives import finite, with_empty
from pallas_kernels.attention.integers import FAR
from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.merge import merge_parts
from pallas_kernels.attention.position_bias import Rule, diagonals_of
from pallas_kernels.attention.problem import Operands as AttentionOperands
from pallas_kernels.attention.problem import Settings as AttentionSettings


class ChunkedConfig(NamedTuple):
    """How much of the cache the chunked loop holds at once."""

    block_kv: int  # tokens, at most
    elements: int  # of keys, over batch entries and heads, unless that is less than 16 tokens


def decode_attention(
    query: jax.Array,
    key_cache: jax.Array,
    value_cache: jax.Array,
    lengths: jax.Array | Sequence[int] | int,
    *,
    page_table: jax.Array | None = None,
    key_scale: float | jax.Array | None = None,
    value_scale: float | jax.Array | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    key_value_start: int | jax.Array | Sequence[int] | None = None,
    prefix_lengths: int | jax.Array | Sequence[int] | None = None,
    bias: Rule | None = None,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    logits_soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    num_splits: int | None = None,
    return_residual: bool = False,
    implementation: str | None = None,
    interpret: Any = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attends from the last T tokens of each sequence to its key/value cache.

    Query i of T stands at position ``p = lengths - T + i`` of its sequence (the cache holds the new
    tokens already) and sees every key s with ``start <= s < length`` and ``s >= p - left`` and
    (``s <= p + right`` or ``s < prefix``), where ``right = 0`` if `is_causal`::

        z = scale * (query k^T) * key_scale + bias;   z = cap * tanh(z / cap)
        lse = log(sum exp(z) + exp(sink));            output = sum exp(z - lse) * value_scale * v

    A query that sees no key, as one whose position is negative or whose sequence is empty, has
    output 0 and lse -inf (with a sink, the sink). Cache entries that no query of their sequence
    sees may hold anything, NaN included. Sums are float32, and products of float32 inputs are not
    rounded further.

    Forward only: differentiating raises `NotImplementedError`, in every implementation.

    Args:
      query: (B, N, d), or (B, T, N, d) with few tokens T; float32, bfloat16 or float16.
      key_cache: (B, S, K, d), or pages (P, page_size, K, d) with a `page_table`, in the dtype of
        `query`, int8, float8_e4m3fn or float8_e5m2. K divides N: query head n reads head n // (N /
        K).
      value_cache: (B, S, K, dv), or (P, page_size, K, dv); dtypes are those of `key_cache`.
      lengths: Integers (B,), or one for all, of any integer type: the number of tokens of each
        sequence in its cache, T new ones included. Numbers beyond the capacity (S, or
        pages_per_sequence * page_size) mean all of it.
      page_table: Integers (B, pages_per_sequence): token s of a sequence is in row ``s %
        page_size`` of page ``page_table[b, s // page_size]``. Entries of pages that nobody sees,
        past the length or before the window, may be anything.
      key_scale: For int8 (required) and float8 (default 1) caches, floats: in the shape of
        `key_cache` without its last axis, one for each token and head; (K,), one for each head; or
        one number for all.
      value_scale: Scales of a quantised `value_cache`, in the shapes of `key_scale`.
      scale: Of the scores, by default ``d ** -0.5``.
      is_causal: Whether a query sees no key after its own position; False for tokens that see the
        whole cache, such as an encoder's, which holds none of them.
      key_value_start: An integer or integers (B,): the first key of each sequence, for batches with
        padding on the left, which may hold anything.
      prefix_lengths: An integer or integers (B,): keys that every query sees, also from before.
        Needs something that is hidden on the right.
      bias: A rule that gives a bias for each distance between key and position, `Alibi` or
        `RelativePositionBias`, or None.
      local_window_size: As for `jax.nn.dot_product_attention`, a number or a pair (left, right):
        a query sees `left` keys before its own, and with ``is_causal=False`` `right` keys after it.
      logits_soft_cap: Positive, or None.
      sinks: Floats (N,), or None.
      num_splits: Parts that the keys of each sequence are split into, to keep all cores busy. By
        default chosen from B, K, the capacity and the number of cores.
      return_residual: Whether to return the lse as well.
      implementation: ``"triton"`` (NVIDIA GPUs from capability 8.0), ``"mosaic_tpu"``,
        ``"chunked"`` (or ``"xla"``) or ``"reference"`` (both plain JAX, for any device; the latter
        copies the cache), or None for the first that serves the call.
      interpret: For kernels: whether to run them on the CPU, or an interpreter's parameters.

    Returns:
      The output (B, N, dv) or (B, T, N, dv) in the dtype of `query`; with `return_residual` also
      the lse (B, N) or (B, T, N), float32, in natural units.

    Raises:
      ValueError: Shapes, dtypes or options do not belong together.
      TypeError: `bias` is no rule, or what counts keys is no integer.
      NotImplementedError: The implementation asked for cannot serve the call, or a derivative is
        taken.

    Example:
      >>> query = jnp.ones((2, 4, 8))  # one token, 4 heads
      >>> cache = jnp.ones((2, 16, 2, 8))  # 16 tokens, 2 key/value heads
      >>> decode_attention(query, cache, cache, jnp.array([3, 16])).shape
      (2, 4, 8)
    """
    if (query := _options.array("query", query)).ndim not in (3, 4):
        raise ValueError(f"query has shape {query.shape}; expected (B, N, d) or (B, T, N, d)")
    one_token = query.ndim == 3
    query = query[:, None] if one_token else query
    arrays = {
        "query": query, "key_cache": key_cache, "value_cache": value_cache, "lengths": lengths,
        "page_table": page_table, "key_scale": key_scale, "value_scale": value_scale,
        "sinks": sinks, "key_value_start": key_value_start, "prefix_lengths": prefix_lengths,
        "bias": bias,
    }  # fmt: skip
    attend = functools.partial(
        _attend, scale=scale, is_causal=is_causal, local_window_size=local_window_size,
        logits_soft_cap=logits_soft_cap, num_splits=num_splits, implementation=implementation,
        interpret=interpret,
    )  # fmt: skip
    output, lse = where_it_lies(attend, {k: x for k, x in arrays.items() if x is not None})
    if one_token:
        output, lse = output[:, 0], lse[:, 0]
    return (output, with_empty(lse)) if return_residual else output


def _attend(
    query: jax.Array,
    key_cache: jax.Array,
    value_cache: jax.Array,
    lengths: jax.Array | Sequence[int] | int,
    page_table: jax.Array | None = None,
    key_scale: jax.Array | None = None,
    value_scale: jax.Array | None = None,
    sinks: jax.Array | None = None,
    *,
    implementation: str | None,
    **others: Any,
) -> tuple[jax.Array, jax.Array]:
    """Returns output (B, T, N, dv) and `finite` lse (B, T, N) for a query (B, T, N, d)."""
    settings, operands = canonical(
        query, key_cache, value_cache, lengths, page_table, key_scale, value_scale, **others
    )
    sinks = None if sinks is None else checked_sinks(sinks, query.shape[2])
    name = _choose(implementation, settings, operands)
    routes.record(f"decode, {name}")
    if 0 in query.shape[:2]:
        shape = (*query.shape[:3], value_cache.shape[3])
        return jnp.zeros(shape, query.dtype), jnp.zeros(shape[:3], jnp.float32)
    return _compiled(name, settings, operands, sinks)


def _choose(name: str | None, settings: Settings, operands: Operands) -> str:
    place = device()
    name = routes.SAME.get(name, name) if isinstance(name, str) else name
    if name is None:
        symbolic = not all(isinstance(x, int) for x in (*operands.query.shape, *operands.key.shape))
        return next(
            x
            for x in (_NAMES[2:] if symbolic else _NAMES)
            if _implementation(x).refusal(settings, operands, place) is None
        )
    if name not in _NAMES:
        raise ValueError(
            f"implementation={name!r}; expected None or one of {', '.join(map(repr, _NAMES))}"
        )
    reason = _implementation(name).refusal(settings, operands, place)
    if reason is not None:
        raise NotImplementedError(f"implementation={name!r} cannot serve this call: {reason}")
    return name


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _decode(
    name: str, settings: Settings, operands: Operands, sinks: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    outputs, lses = _implementation(name).decode(settings, operands)
    (b, k, rows, _), t, dv = operands.query.shape, settings.queries, outputs.shape[-1]
    output, lse = merge_parts(outputs, lses)
    if operands.value_head_scale is not None:
        output *= operands.value_head_scale[None, :, None, None]
    group = rows // t
    output = output.reshape(b, k, t, group, dv).transpose(0, 2, 1, 3, 4)
    output = output.reshape(b, t, k * group, dv)
    lse = lse.reshape(b, k, t, group).transpose(0, 2, 1, 3).reshape(b, t, k * group)
    if sinks is not None:
        output, lse = merge_parts(
            jnp.stack([output, jnp.zeros_like(output)]),
            jnp.stack([lse, jnp.broadcast_to(sinks, lse.shape)]),
        )
    return output.astype(operands.query.dtype), finite(lse)


# One program outside of `jit` too: the search for infinities sees its results alone.
_compiled: Any = jax.jit(_decode, static_argnums=(0, 1))


@_decode.defjvp
def _no_derivative(*_: Any) -> Any:
    raise NotImplementedError(
        "decode_attention has no derivative; expected pallas_kernels.attention where one is needed"
    )


def _chunked(settings: Settings, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Runs blocks of keys in a loop; returns outputs (P, B, K, R, dv) and lses (P, B, K, R)."""
    b, k, _, d = operands.query.shape
    num_splits = settings.num_splits or 1
    config = _config(operands)
    wanted = 16  # of a symbolic batch, in a program to be exported
    if isinstance(b, int):
        wanted = max(16, min(config.block_kv, config.elements // max(1, b * k * d)))
    if operands.page_table is None:
        block = min(wanted, operands.capacity) if isinstance(operands.capacity, int) else wanted
    else:
        page, pages = operands.key.shape[1], operands.page_table.shape[1]
        block = page * (min(-(-wanted // page), pages) if isinstance(pages, int) else 1)
    start, stop = keys_needed(settings, operands.lengths, operands.starts)
    most = operands.capacity if isinstance(operands.capacity, int) else FAR
    start, stop = jnp.min(start, initial=most), jnp.max(stop, initial=0)

    def part(split: jax.Array) -> tuple[jax.Array, jax.Array]:
        lower, upper = blocks_of_split(start, stop, block, split, num_splits)
        return _loop_over_blocks(settings, operands, lower, upper, block)

    if num_splits == 1:  # slices of the cache need not become gathers
        output, lse = part(jnp.int32(0))
        return output[None], lse[None]
    return jax.vmap(part)(jnp.arange(num_splits, dtype=jnp.int32))


def _config(operands: Operands) -> ChunkedConfig:
    return tuning.default("decode_chunked", ChunkedConfig, lookup_of(operands, device()))


def _loop_over_blocks(
    settings: Settings, operands: Operands, lower: jax.Array, upper: jax.Array, block: int
) -> tuple[jax.Array, jax.Array]:
    (b, k, rows, _), dv = operands.query.shape, operands.value.shape[3]
    query = operands.query.astype(jnp.float32) * settings.scale
    if operands.head_scale is not None:
        query *= operands.head_scale[None, :, None, None]
    lengths = operands.lengths[:, None]
    numbers = (operands.starts, operands.prefixes)
    starts, prefixes = (None if x is None else x[:, None] for x in numbers)
    needed_from, needed_to = keys_needed(settings, lengths, starts)
    tokens = jnp.arange(rows, dtype=jnp.int32)[None, None, :] // (rows // settings.queries)
    caches = (operands.key, operands.value, operands.key_scale, operands.value_scale)
    # No infinity, which the search for infinities (jax.debug_infs) would take for a mistake.
    nothing = float(jnp.finfo(jnp.float32).min)

    def body(i: jax.Array, carry: Any) -> Any:
        peak, total, acc = carry
        first = i * block
        # A block at the end of a contiguous cache starts early enough to be whole, and its keys
        # that belong to the block before are masked.
        origin = first
        if operands.page_table is None and isinstance(operands.capacity, int):
            origin = jnp.minimum(first, operands.capacity - block)
        # XLA's CPU compiler widens a bfloat16 operand of a slice, and moves the widening of all of
        # the cache out of the loop unless it appears to depend on the loop's index.
        tied, origin = lax.optimization_barrier((caches, origin))
        blocks: Any = (
            None if x is None else _block(x, operands.page_table, origin, block).astype(jnp.float32)
            for x in tied
        )
        key, value, key_scale, value_scale = blocks
        positions = origin + jnp.arange(block, dtype=jnp.int32)[None, :]
        needed = (positions >= needed_from) & (positions < needed_to) & (positions >= first)
        after = None if prefixes is None else prefixes[..., None]
        seen = sees(settings, lengths[..., None], tokens, positions[..., None], after)
        seen &= needed[..., None]
        # Keys are the outer axis throughout, as in the cache, so that no block is transposed.
        z = jnp.einsum("bkrd,bskd->bskr", query, key, precision="highest")
        if key_scale is not None:
            z = z * key_scale[..., None]
        if operands.rule is not None:
            z += _bias(settings, operands.rule, positions, lengths, k)
        if settings.soft_cap is not None:
            capped = settings.soft_cap * jnp.tanh(z / settings.soft_cap)
            z = capped if operands.rule is None else jnp.where(z == -jnp.inf, -jnp.inf, capped)
        z = jnp.where(seen[:, :, None], z, nothing)
        new_peak = jnp.maximum(peak, z.max(axis=1))
        decay = jnp.exp(peak - new_peak)
        p = jnp.where(seen[:, :, None], jnp.exp(z - new_peak[:, None]), 0)
        total = decay * total + p.sum(axis=1)
        # What nobody sees may be NaN, which no probability of 0 would stop.
        if value_scale is not None:
            p = p * jnp.where(needed[..., None], value_scale, 0)[..., None]
        value = jnp.where(needed[..., None, None], value, 0)
        update = jnp.einsum("bskr,bskd->bkrd", p, value, precision="highest")
        return new_peak, total, decay[..., None] * acc + update

    shape = (b, k, rows)
    carry = (
        jnp.full(shape, nothing, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, dv), jnp.float32),
    )
    carry = tuple(vary_like(x, *jax.tree.leaves(operands)) for x in carry)
    peak, total, acc = lax.fori_loop(lower, upper, body, carry)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    return acc / total[..., None], jnp.where(empty, -jnp.inf, peak + jnp.log(total))


def _bias(
    settings: Settings, rule: Rule, positions: jax.Array, lengths: jax.Array, kv_heads: int
) -> jax.Array:
    """Returns the bias (B, block, K, R) of the keys at `positions`, for lengths (B, 1)."""
    tokens = lengths + jnp.arange(-settings.queries, 0, dtype=jnp.int32)[None, :]
    bias = rule.at(positions[..., None] - tokens[:, None])  # (N, B, block, T)
    bias = bias.reshape(kv_heads, -1, *bias.shape[1:]).transpose(2, 3, 0, 4, 1)
    return bias.reshape(*bias.shape[:3], -1).astype(jnp.float32)


def _block(
    cache: jax.Array, page_table: jax.Array | None, start: jax.Array, block: int
) -> jax.Array:
    """Returns the tokens start to start + block of every sequence, (B, block, ...)."""
    if page_table is None and isinstance(cache.shape[1], int):
        return lax.dynamic_slice_in_dim(cache, start, block, axis=1)
    if page_table is None:  # of a symbolic capacity, which may be less than a block
        rows = start + jnp.arange(block, dtype=jnp.int32)
        return cache.at[:, rows].get(mode="clip")
    page = cache.shape[1]
    columns = start // page + jnp.arange(block // page, dtype=jnp.int32)
    pages = cache.at[page_table.at[:, columns].get(mode="clip")].get(mode="clip")
    return pages.reshape(page_table.shape[0], block, *cache.shape[2:])


def _reference(settings: Settings, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Gathers and widens the whole cache and hands it to the reference of `attention`."""
    (b, k, rows, d), t = operands.query.shape, settings.queries
    capacity = operands.capacity
    starts = None if operands.starts is None else operands.starts[:, None]
    start, stop = keys_needed(settings, operands.lengths[:, None], starts)
    positions = jnp.arange(capacity, dtype=jnp.int32)[None, :]
    needed = (positions >= start) & (positions < stop)

    def whole(cache: jax.Array, scale: jax.Array | None) -> jax.Array:
        cache = _block(cache, operands.page_table, jnp.int32(0), capacity).astype(jnp.float32)
        if scale is not None:
            cache *= _block(scale, operands.page_table, jnp.int32(0), capacity)[..., None]
        return jnp.where(needed[..., None, None], cache, 0)

    group = rows // t
    query = operands.query.astype(jnp.float32)
    if operands.head_scale is not None:
        query *= operands.head_scale[None, :, None, None]
    query = query.reshape(b, k, t, group, d)
    diagonals = None
    if operands.rule is not None:
        diagonals = diagonals_of(operands.rule, t, capacity, -t, operands.lengths, jnp.float32)
    attention = AttentionOperands(
        query=query.transpose(0, 2, 1, 3, 4).reshape(b, t, k * group, d),
        key=whole(operands.key, operands.key_scale),
        value=whole(operands.value, operands.value_scale),
        mask=Mask(
            left=settings.left,
            right=settings.right,
            offset=-t,
            offsets=operands.lengths,
            key_value_lengths=operands.lengths,
            starts=operands.starts,
            prefix_lengths=operands.prefixes,
        ),
        diagonals=diagonals,
    )
    output, lse = reference.attend(
        AttentionSettings(settings.scale, settings.soft_cap, precision="highest"), attention
    )
    dv = output.shape[3]
    output = output.reshape(b, t, k, group, dv).transpose(0, 2, 1, 3, 4)
    lse = lse.reshape(b, k, group, t).swapaxes(2, 3)
    return output.reshape(1, b, k, rows, dv), lse.reshape(1, b, k, rows)


def _serves_all(settings: Settings, operands: Operands, place: Device) -> None:
    del settings, operands, place


class _Implementation(NamedTuple):
    decode: Callable[[Settings, Operands], tuple[jax.Array, jax.Array]]
    refusal: Callable[[Settings, Operands, Device], str | None]


_NAMES = ("triton", "mosaic_tpu", "chunked", "reference")
_KERNELS = {"triton": "decode_triton", "mosaic_tpu": "decode_tpu"}


def _implementation(name: str) -> _Implementation:
    """Returns an implementation; a kernel's module is imported on its first use."""
    if name in _KERNELS:
        module = importlib.import_module(f"pallas_kernels.attention.{_KERNELS[name]}")
        return _Implementation(module.decode, module.refusal)
    return _Implementation(_chunked if name == "chunked" else _reference, _serves_all)
