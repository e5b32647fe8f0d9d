"""The arguments of `decode_attention`, checked and in the one form that its implementations take.

The query rows that share a key/value head, T tokens times G heads of a group, are packed as the
rows of one tile: row r is token r // G. Token t of T stands at position ``length - T + t`` and sees
the keys

    position - left <= s  and  (s <= position + right  or  s < prefix)  and  start <= s < length

where causal is right = 0. All rows of a batch entry together need the keys `keys_needed`, and
nothing else of the cache or of the page table is data.
"""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import _options
from pallas_kernels._compat import Device
from pallas_kernels.attention import hiding, tuning
from pallas_kernels.attention.integers import FAR, number_or_entries, to_int32
from pallas_kernels.attention.placement import Leading
from pallas_kernels.attention.position_bias import Rule, check_rule

QUANTIZED = (jnp.dtype(jnp.int8), jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2))


class Operands(NamedTuple):
    """The arrays of one call. R = T G rows for each of the K key/value heads."""

    query: jax.Array  # (B, K, R, d)
    key: jax.Array  # (B, S, K, d), or pages (P, page_size, K, d)
    value: jax.Array  # (B, S, K, dv), or pages (P, page_size, K, dv)
    lengths: jax.Array  # int32 (B,), from 0 to the capacity
    page_table: jax.Array | None = None  # int32 (B, pages), all in range
    key_scale: jax.Array | None = None  # float32 (B, S, K), or (P, page_size, K)
    value_scale: jax.Array | None = None  # as key_scale
    starts: jax.Array | None = None  # int32 (B,), from 0 to the length
    prefixes: jax.Array | None = None  # int32 (B,)
    head_scale: jax.Array | None = None  # float32 (K,), of the scores
    value_head_scale: jax.Array | None = None  # float32 (K,), of the output: no implementation's
    rule: Rule | None = None  # a bias for each distance

    @property
    def capacity(self) -> int:
        """The number of tokens that a sequence may have."""
        pages = 1 if self.page_table is None else self.page_table.shape[1]
        return pages * self.key.shape[1]


class Settings(NamedTuple):
    """What is known at trace time."""

    scale: float
    queries: int  # T
    left: int | None = None  # keys that a row sees before its own position, None for all
    right: int | None = 0  # likewise after it
    soft_cap: float | None = None
    num_splits: int | None = None
    interpret: Any = False


def keys_needed(settings: Settings, length: Any, start: Any = None) -> tuple[Any, Any]:
    """Returns start and stop of the keys that some row of a sequence of `length` sees."""
    first = jnp.zeros_like(length) if start is None else start
    if settings.left is None:
        return first, length
    return jnp.minimum(
        jnp.maximum(length - settings.queries - settings.left, first), length
    ), length


def lookup_of(operands: Operands, place: Device) -> tuning.Lookup:
    """Describes a call to the file of block sizes, by the dtype of its cache."""
    widest = max(operands.key.shape[3], operands.value.shape[3])
    chips = (place.kind, place.platform)
    return tuning.Lookup(
        chips, str(operands.key.dtype), widest, tuning.longest(operands.capacity), True, 0
    )


def sees(settings: Settings, length: Any, token: Any, key: Any, prefix: Any = None) -> Any:
    """Returns whether `token` (0 to T - 1) sees the key at position `key`, one of `keys_needed`."""
    position = length - settings.queries + token
    seen = key < length
    if settings.right is not None:
        near = key <= position + settings.right
        seen &= near if prefix is None else near | (key < prefix)
    if settings.left is not None:
        seen &= key >= position - settings.left
    return seen


def blocks_of_split(
    start: Any, stop: Any, block: int, split: Any, num_splits: Any
) -> tuple[Any, Any]:
    """Returns first and end block of one part, when start:stop is shared out evenly in blocks."""
    first = start // block
    last = (stop + block - 1) // block
    share = (last - first + num_splits - 1) // num_splits
    lower = jnp.minimum(first + split * share, last)
    return lower, jnp.minimum(lower + share, last)


def canonical(
    query: jax.Array,
    key_cache: jax.Array,
    value_cache: jax.Array,
    lengths: Any,
    page_table: jax.Array | None,
    key_scale: Any,
    value_scale: Any,
    scale: float | None,
    local_window_size: int | tuple[int | None, int | None] | None,
    logits_soft_cap: float | None,
    num_splits: int | None,
    interpret: Any,
    is_causal: bool = True,
    key_value_start: Any = None,
    prefix_lengths: Any = None,
    bias: Any = None,
) -> tuple[Settings, Operands]:
    """Checks the arguments of `decode_attention`, with query (B, T, N, d), and packs the rows."""
    query, key_cache, value_cache = (
        _options.array(name, x)
        for name, x in (("query", query), ("key_cache", key_cache), ("value_cache", value_cache))
    )
    page_table = None if page_table is None else _options.array("page_table", page_table)
    _check_arrays(query, key_cache, value_cache, page_table)
    b, t, n, d = query.shape
    kv_heads = key_cache.shape[2]
    key_scale, head_scale = _scales("key_scale", key_scale, key_cache)
    value_scale, value_head_scale = _scales("value_scale", value_scale, value_cache)
    check_rule(bias)
    if bias is not None:
        bias.check(n)
    left, right = hiding.window(local_window_size, is_causal)
    hiding.check_prefix(prefix_lengths is not None, right)
    lengths = lengths if isinstance(lengths, jax.Array) else np.asarray(lengths)
    if lengths.shape not in ((), (b,)) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"lengths has shape {lengths.shape} and dtype {lengths.dtype}; expected an integer for "
            f"each of the batch entries, ({b},), or one for all"
        )
    if num_splits is not None and (
        not isinstance(num_splits, numbers.Integral) or num_splits < 1 or num_splits is True
    ):
        raise ValueError(f"num_splits={num_splits!r}; expected a positive int or None")
    if page_table is not None:
        pages = key_cache.shape[0]
        last = pages - 1 if isinstance(pages, int) else FAR  # all reads are clipped besides
        page_table = to_int32("page_table", page_table, 0, last)
    group = n // kv_heads
    packed = query.reshape(b, t, kv_heads, group, d).transpose(0, 2, 1, 3, 4)
    operands = Operands(
        query=packed.reshape(b, kv_heads, t * group, d),
        key=key_cache,
        value=value_cache,
        lengths=jnp.zeros((b,), jnp.int32),
        page_table=page_table,
        key_scale=key_scale,
        value_scale=value_scale,
        starts=_per_sequence("key_value_start", key_value_start, b),
        prefixes=_per_sequence("prefix_lengths", prefix_lengths, b),
        head_scale=head_scale,
        value_head_scale=value_head_scale,
        rule=bias,
    )
    full = operands.capacity
    most = full if isinstance(full, int) else FAR
    lengths = jnp.broadcast_to(to_int32("lengths", lengths, 0, most), (b,))
    if most is not full:  # symbolic, in a program to be exported
        lengths = jnp.minimum(lengths, jnp.asarray(full, jnp.int32))
    settings = Settings(
        scale=1 / math.sqrt(d) if scale is None else _options.number("scale", scale),
        queries=t,
        # No position is beyond the last of the cache, or before that of the first of the queries.
        left=_side(left, full - 1 if isinstance(full, int) else FAR),
        right=_side(right, t),
        soft_cap=_options.soft_cap(logits_soft_cap),
        num_splits=None if num_splits is None else int(num_splits),
        interpret=bool(interpret) if interpret in (None, False, True) else interpret,
    )
    starts = operands.starts
    starts = None if starts is None else jnp.clip(starts, 0, lengths)
    return settings, operands._replace(lengths=lengths, starts=starts)


def checked_sinks(sinks: Any, heads: int) -> jax.Array:
    """Returns the sinks in float32, or raises ValueError where they do not fit `heads`."""
    sinks = _options.array("sinks", sinks)
    if sinks.shape != (heads,) or not jnp.issubdtype(sinks.dtype, jnp.floating):
        raise ValueError(
            f"sinks has shape {sinks.shape} and dtype {sinks.dtype}; expected a float for each "
            f"query head, ({heads},)"
        )
    return sinks.astype(jnp.float32)


def _check_arrays(
    query: jax.Array, key: jax.Array, value: jax.Array, page_table: jax.Array | None
) -> None:
    axes = "(B, S, K, d)" if page_table is None else "(P, page_size, K, d)"
    for name, cache in (("key_cache", key), ("value_cache", value)):
        if cache.ndim != 4 or 0 in cache.shape[1:]:
            raise ValueError(f"{name} has shape {cache.shape}; expected {axes}, none of them 0")
        if cache.dtype not in QUANTIZED and cache.dtype != query.dtype:
            raise ValueError(
                f"{name} has dtype {cache.dtype}; expected the query's, {query.dtype}, or one of "
                f"{', '.join(str(x) for x in QUANTIZED)}"
            )
    if query.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"query has dtype {query.dtype}; expected float32, bfloat16 or float16")
    b, _, n, d = query.shape
    if key.shape[3] != d:
        raise ValueError(
            f"key_cache has shape {key.shape}; expected the last axis to be the query's, d={d}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value_cache has shape {value.shape}; expected {(*key.shape[:3], 'dv')}, as key_cache"
        )
    if n % key.shape[2]:
        swapped = n % key.shape[1] == 0 and page_table is None
        hint = "; are its axes 1 and 2, length and heads, swapped?" if swapped else ""
        raise ValueError(
            f"key_cache has shape {key.shape}, K={key.shape[2]} heads; expected {axes} with K a "
            f"divisor of the query's N={n}{hint}"
        )
    if page_table is None and key.shape[0] != b:
        raise ValueError(
            f"key_cache has shape {key.shape}; expected the query's batch size, B={b}, first "
            "(or pages and a page_table)"
        )
    if page_table is not None and (
        page_table.ndim != 2
        or page_table.shape[0] != b
        or page_table.shape[1] == 0
        or not jnp.issubdtype(page_table.dtype, jnp.integer)
    ):
        raise ValueError(
            f"page_table has shape {page_table.shape} and dtype {page_table.dtype}; expected "
            f"integers ({b}, pages of a sequence)"
        )
    if page_table is not None and key.shape[0] == 0:
        raise ValueError(f"key_cache has shape {key.shape}; expected at least one page")


def _scales(name: str, scale: Any, cache: jax.Array) -> tuple[jax.Array | None, jax.Array | None]:
    """Returns float32 scales of tokens and heads, or else of heads alone (K,)."""
    shape = cache.shape[:3]
    if cache.dtype not in QUANTIZED:
        if scale is not None:
            raise ValueError(
                f"{name} was given for a cache of {cache.dtype}; expected None, scales are for "
                "int8 and float8 caches"
            )
        return None, None
    kinds = f"{shape}, one for each token and head of the cache, or {shape[2:]} or ()"
    if scale is None:
        if cache.dtype == jnp.int8:
            raise ValueError(f"{name}=None for a cache of int8; expected floating scales {kinds}")
        return None, None
    scale = jnp.asarray(scale)
    floating = jnp.issubdtype(scale.dtype, jnp.floating)
    if scale.shape not in ((), shape[2:], shape) or not floating:
        raise ValueError(
            f"{name} has shape {scale.shape} and dtype {scale.dtype}; expected floating scales "
            f"{kinds}"
        )
    scale = scale.astype(jnp.float32)
    if scale.ndim == 3:
        return scale, None
    return None, jnp.broadcast_to(scale, shape[2:])


def _per_sequence(name: str, value: Any, batch: int) -> jax.Array | None:
    """Returns int32 (B,) from one number or one for each sequence."""
    number, numbers = number_or_entries(name, value, Leading((batch,)), 0)
    if numbers is None and number > 0:
        numbers = jnp.full((batch,), min(number, FAR), jnp.int32)
    return numbers


def _side(side: int | None, most: int) -> int | None:
    """Returns how far a row looks to one side, None where nothing is farther away than `most`."""
    return None if side is None or side >= most else side
