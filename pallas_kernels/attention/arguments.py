"""Checks the arguments of `attention` and brings them into the one form that the routes take.

Every error is raised while tracing and names the argument, what was found and what was expected.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import _options
from pallas_kernels._dtypes import wide
from pallas_kernels.attention import dropout, hiding, integers
from pallas_kernels.attention.integers import number_or_entries, per_entry
from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.placement import Leading
from pallas_kernels.attention.position_bias import RULES, diagonals_of
from pallas_kernels.attention.problem import Operands, Settings


class Canonical(NamedTuple):
    """A checked call: what routes take, and how the results get their leading axes back."""

    settings: Settings
    operands: Operands
    leading: Leading  # the axes before (T, N, d), which became one batch axis

    def output(self, x: jax.Array) -> jax.Array:
        """Gives the axes (B, T, N, dv) their leading ones back."""
        return self.leading.split(x)

    def residual(self, lse: jax.Array) -> jax.Array:
        """Turns a route's lse (B, N, T) into the public (..., T, N)."""
        return self.leading.split(lse.transpose(0, 2, 1))


def canonical(
    query: Any,
    key: Any,
    value: Any,
    bias: Any,
    mask: Any,
    *,
    scale: float | None,
    is_causal: bool,
    query_seq_lengths: Any,
    key_value_seq_lengths: Any,
    key_value_start: Any = None,
    prefix_lengths: Any = None,
    local_window_size: Any,
    logits_soft_cap: float | None,
    sinks: Any,
    query_segment_ids: Any,
    key_value_segment_ids: Any,
    query_offset: Any,
    dropout_rate: float,
    dropout_rng: Any,
    precision: Any,
    config: Any,
    interpret: Any,
    broadcast_dropout: bool = False,
    axis_size: int = 1,
    key_positions: jax.Array | None = None,
) -> Canonical:
    """Returns the call in canonical form; see `attention` for the arguments.

    `broadcast_dropout` gives all batch entries and heads one dropout mask, as Flax can. Where query
    and key are slices of a sequence over `axis_size` devices, lengths, bias by rule and the columns
    of the mask are over all of it, and these keys are at `key_positions`.

    Raises:
      ValueError: A shape or a value is wrong.
      TypeError: A dtype is wrong.
    """
    query, key, value = map(_options.array, ("query", "key", "value"), (query, key, value))
    _check_shapes(query, key, value)
    _check_dtypes(query, key, value)
    leading = Leading.of(query, query.ndim - 3)
    t, n, d = query.shape[-3:]
    s, k = key.shape[-3:-1]
    query, key, value = (leading.merge(x) for x in (query, key, value))
    sizes = _Shape(leading, t, s, n, k)

    if mask is not None:
        mask = _options.array("mask", mask)
        if mask.dtype != jnp.bool_:
            raise TypeError(
                f"mask has dtype {mask.dtype}; expected bool, True where attention is allowed "
                "(for a mask of zeros and ones: mask != 0)"
            )
        mask = _four(mask, "mask", sizes._replace(keys=s * axis_size))
    rule, bias = (bias, None) if isinstance(bias, RULES) else (None, bias)
    if rule is not None:
        rule.check(n)
    if isinstance(bias, (str, type)):
        kinds = ", ".join(kind.__name__ for kind in RULES)
        raise TypeError(
            f"bias is {bias!r}; expected an array, or one of {kinds} made of its numbers"
        )
    if bias is not None:
        bias = _options.array("bias", bias)
        if not jnp.issubdtype(bias.dtype, jnp.floating):
            raise TypeError(f"bias has dtype {bias.dtype}; expected a floating dtype")
        bias = _four(bias, "bias", sizes)
    left, right = hiding.window(local_window_size, is_causal)
    offset, offsets = number_or_entries("query_offset", query_offset, leading, -integers.FAR)
    start, starts = number_or_entries("key_value_start", key_value_start, leading, 0)
    prefix, prefix_lengths = number_or_entries("prefix_lengths", prefix_lengths, leading, 0)
    hiding.check_prefix(prefix != 0 or prefix_lengths is not None, right)
    start, prefix, distance = (
        max(low, min(x, integers.FAR))
        for x, low in ((start, 0), (prefix, 0), (offset, -integers.FAR))
    )
    if offsets is None:
        left, right, offset = integers.narrowed(left, right, offset, t * axis_size, s * axis_size)
    else:
        left = integers.narrowed_from_anywhere(left, t)
        right = integers.narrowed_from_anywhere(right, s)
    ids = _segment_ids(query_segment_ids, key_value_segment_ids, sizes)
    q_lengths = _lengths("query_seq_lengths", query_seq_lengths, leading)
    kv_lengths = _lengths("key_value_seq_lengths", key_value_seq_lengths, leading)
    # What is beyond a length may be anything, NaN included, and 0 * NaN is NaN in a product.
    query = _zero_beyond(query, q_lengths)
    key, value = (_zero_beyond(x, kv_lengths, key_positions) for x in (key, value))
    key, value = (_zero_before(x, start, starts) for x in (key, value))

    if sinks is not None:
        sinks = _options.array("sinks", sinks)
        if sinks.shape != (n,):
            raise ValueError(f"sinks has shape {sinks.shape}; expected ({n},), one for each head")
        sinks = sinks.astype(wide(query.dtype))
    rate, seeds = _dropout(dropout_rate, dropout_rng, leading, n, broadcast_dropout)
    settings = Settings(
        scale=d**-0.5 if scale is None else _options.number("scale", scale),
        soft_cap=_options.soft_cap(logits_soft_cap),
        dropout_rate=rate,
        precision=_options.precision(precision),
        config=_options.hashable("config", config),
        interpret=False if interpret is None else interpret,
    )
    diagonals = None
    if rule is not None:
        whole = (t * axis_size, s * axis_size)
        diagonals = diagonals_of(rule, *whole, distance, offsets, wide(query.dtype))
    operands = Operands(
        query=query,
        key=key,
        value=value,
        bias=bias,
        sinks=sinks,
        mask=Mask(
            left=left,
            right=right,
            offset=offset,
            offsets=offsets,
            query_lengths=q_lengths,
            key_value_lengths=kv_lengths,
            query_segment_ids=ids[0],
            key_value_segment_ids=ids[1],
            dense=mask,
            start=start,
            starts=starts,
            prefix=prefix,
            prefix_lengths=prefix_lengths,
        ),
        seeds=seeds,
        diagonals=diagonals,
    )
    return Canonical(settings, operands, leading)


class _Shape(NamedTuple):
    leading: Leading
    queries: int
    keys: int
    heads: int
    kv_heads: int


def _check_shapes(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim < 3:
            raise ValueError(
                f"{name} must be [batch, length, heads, size], or without batch; "
                f"got shape {x.shape}"
            )
    if not query.shape[:-3] == key.shape[:-3] == value.shape[:-3]:
        raise ValueError(
            "query, key and value must agree in their batch axes; got shapes "
            f"{query.shape}, {key.shape} and {value.shape}"
        )
    if key.shape[-3:-1] != value.shape[-3:-1]:
        raise ValueError(
            f"key has length and heads {key.shape[-3:-1]}, value {value.shape[-3:-1]}; expected "
            f"the same; got shapes {key.shape} and {value.shape}"
        )
    if query.shape[-1] != key.shape[-1] or query.shape[-1] == 0:
        raise ValueError(
            f"query has head size {query.shape[-1]}, key {key.shape[-1]}; expected the same, at "
            f"least 1; got shapes {query.shape} and {key.shape}"
        )
    heads, kv_heads = query.shape[-2], key.shape[-2]
    if kv_heads == 0 or heads % kv_heads:
        length, kv_length = query.shape[-3], key.shape[-3]
        swapped = ""
        if kv_heads and length % kv_heads == 0 and heads == kv_length:
            swapped = "query"
        elif kv_length and heads % kv_length == 0 and kv_heads == length:
            swapped = "key and value"
        elif kv_length and length != kv_length and length % kv_length == 0:
            swapped = "query, key and value"
        raise ValueError(
            f"query has {heads} heads, key and value have {kv_heads}; expected a multiple of "
            f"theirs; got shapes {query.shape} and {key.shape}"
            + (f"; it looks like heads and length are swapped in {swapped}" if swapped else "")
        )


def _check_dtypes(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            "query, key and value must have one dtype; got "
            f"{query.dtype}, {key.dtype} and {value.dtype}"
        )
    if not jnp.issubdtype(query.dtype, jnp.floating):
        raise TypeError(f"query has dtype {query.dtype}; expected a floating dtype")


def _four(x: jax.Array, name: str, sizes: _Shape) -> jax.Array:
    """Gives a mask or bias the axes (B or 1, N or 1, T or 1, S or 1)."""
    leading = sizes.leading
    full = (*leading.shape, sizes.heads, sizes.queries, sizes.keys)
    if len(full) == 3:
        leading, full = Leading((1,)), (1, *full)  # the batch axis that an unbatched query gets
    shape = (1,) * (len(full) - x.ndim) + x.shape
    if len(shape) != len(full) or any(a not in (1, b) for a, b in zip(shape, full)):
        swapped = (*full[:-3], sizes.queries, sizes.heads, sizes.keys)
        hint = ""
        if x.ndim == len(full) and _swapped(x.shape[-3:], swapped[-3:]):
            hint = "; it looks like heads and length are swapped in query, key and value"
        raise ValueError(
            f"{name} has shape {x.shape}; expected one that broadcasts to "
            f"[batch, heads, queries, keys] = {full}{hint}"
        )
    if all(a == 1 for a in shape[:-3]):
        return x.reshape(1, *shape[-3:])
    return leading.merge(jnp.broadcast_to(x.reshape(shape), (*full[:-3], *shape[-3:])))


def _swapped(shape: Sequence[int], swapped: Sequence[int]) -> bool:
    """Whether a mask (N, T, S) fits once the two leading axes of the inputs change places."""
    return all(a in (1, b) for a, b in zip(shape[:2], swapped[:2])) and shape[:2] != (1, 1)


def _lengths(name: str, lengths: Any, leading: Leading) -> jax.Array | None:
    return None if lengths is None else per_entry(name, lengths, leading, 0)


def _segment_ids(query_ids: Any, key_ids: Any, sizes: _Shape) -> tuple[Any, Any]:
    if query_ids is None and key_ids is None:
        return None, None
    names, key_given = ("query_segment_ids", "key_value_segment_ids"), key_ids is not None
    if query_ids is None or key_ids is None:
        if sizes.queries != sizes.keys:
            raise ValueError(
                f"{names[not key_given]} is missing; with {sizes.queries} queries and "
                f"{sizes.keys} keys, expected segment ids for both (given alone, one serves for "
                "both)"
            )
        query_ids = key_ids = query_ids if key_ids is None else key_ids
        names = (names[key_given],) * 2
    checked, merge = [], sizes.leading.merge
    for name, ids, length in zip(names, (query_ids, key_ids), (sizes.queries, sizes.keys)):
        ids = integers.as_integers(name, ids)
        expected = (*sizes.leading.shape, length)
        if ids.shape != expected:
            heads = sizes.heads if name.startswith("query") else sizes.kv_heads
            swapped = ids.shape == (*expected[:-1], heads)
            raise ValueError(
                f"{name} has shape {ids.shape}; expected {expected}"
                + ("; it looks like heads and length are swapped" if swapped else "")
            )
        checked.append(ids.reshape(-1, length) if isinstance(ids, np.ndarray) else merge(ids))
    return integers.same_ids(*checked)


def _zero_beyond(
    x: jax.Array, lengths: jax.Array | None, positions: jax.Array | None = None
) -> jax.Array:
    if lengths is None:
        return x
    positions = jnp.arange(x.shape[1], dtype=jnp.int32) if positions is None else positions
    valid = positions[None, :] < lengths[:, None]
    return jnp.where(valid[:, :, None, None], x, 0)


def _zero_before(x: jax.Array, start: int, starts: jax.Array | None) -> jax.Array:
    if starts is None:
        return x.at[:, :start].set(0) if start > 0 else x
    before = jnp.arange(x.shape[1], dtype=jnp.int32)[None, :] < starts[:, None]
    return jnp.where(before[:, :, None, None], 0, x)


def _dropout(
    rate: Any, key: Any, leading: Leading, heads: int, broadcast: bool
) -> tuple[float, jax.Array | None]:
    rate = _options.number("dropout_rate", rate)
    if not 0 <= rate < 1:
        raise ValueError(f"dropout_rate={rate}; expected a probability in [0, 1)")
    if rate == 0:
        return 0.0, None
    if key is None:
        raise ValueError(f"dropout_rng is missing; expected a key, since dropout_rate={rate}")
    if not hasattr(key, "dtype"):
        raise TypeError(f"dropout_rng is of type {type(key).__name__}; expected a PRNG key")
    batch = math.prod(leading.shape)
    if broadcast:
        return rate, jnp.broadcast_to(dropout.seeds(key, 1, 1), (batch, heads))
    seeds = dropout.seeds(key, batch, heads).reshape(*leading.shape, heads)
    return rate, leading.merge(seeds)
