"""Positions, lengths and ids in any integer type, without a wrap or a truncation."""

from __future__ import annotations

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.placement import Leading

FAR = 2**29
"""Further than any position of a sequence; sums of four of them are still int32."""


def as_integers(name: str, values: Any) -> Any:
    """Returns an array of integers, of JAX if it was one, else of numpy, which keeps 64 bits."""
    values = values if isinstance(values, jax.Array) else np.asarray(values)
    if not jnp.issubdtype(values.dtype, jnp.integer):
        is_array = values.ndim and values.dtype.kind in "biufcV"
        found = f"dtype {jnp.asarray(values).dtype}" if is_array else f"value {values}"
        raise TypeError(f"{name} has {found}; expected integers")
    return values


def to_int32(name: str, values: Any, low: int, high: int) -> jax.Array:
    """Returns integers of any type and kind, clipped to low ... high, as int32."""
    values = as_integers(name, values)
    info = jnp.iinfo(values.dtype)
    # A bound that the type cannot have is none; cast to the type it would be another number.
    low, high = max(low, int(info.min)), min(high, int(info.max))
    if isinstance(values, jax.Array):
        return jnp.clip(values, low, high).astype(jnp.int32)
    return jnp.asarray(np.clip(values, low, high).astype(np.int32))


def as_array(values: Any) -> jax.Array:
    """Returns an array of JAX; integers that were none are clipped and not cut off."""
    if not isinstance(values, jax.Array) and np.asarray(values).dtype.kind in "iu":
        return to_int32("values", values, -FAR, FAR)
    return jnp.asarray(values)


def number_or_entries(
    name: str, value: Any, leading: Leading, low: int
) -> tuple[int, jax.Array | None]:
    """Returns a number known while tracing, or else 0 and one number for each batch entry.

    Numbers of entries are clipped to `low` ... `FAR`, a number known while tracing is not.
    """
    if value is None:
        return 0, None
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value), None
    return 0, per_entry(name, value, leading, low)


def per_entry(name: str, values: Any, leading: Leading, low: int) -> jax.Array:
    """Returns one int32 for each batch entry, clipped to `low` ... `FAR`."""
    values = to_int32(name, values, low, FAR)
    if values.ndim == 0:
        values = jnp.broadcast_to(values, leading.shape)
    if values.shape == (math.prod(leading.shape),):
        values = values.reshape(leading.shape)
    if values.shape != leading.shape:
        raise ValueError(
            f"{name} has shape {values.shape}; expected {leading.shape}, one number for each batch "
            "entry, or one number for all"
        )
    return leading.merge(values)


def narrowed(
    left: int | None, right: int | None, offset: int, queries: Any, keys: Any
) -> tuple[int | None, int | None, int]:
    """Returns the same window and offset in numbers that int32 can add.

    A side that hides nothing from any of the `queries` rows or `keys` keys becomes None.
    """
    queries, keys = (x if isinstance(x, int) else FAR for x in (queries, keys))
    low = None if left is None else offset - left
    high = None if right is None else offset + right
    if low is not None and low <= 1 - queries:
        low = None
    if high is not None and high >= keys - 1:
        high = None
    if not -FAR < offset < FAR:
        low = None if low is None else min(low, keys)
        high = None if high is None else max(high, -queries)
        offset = next((x for x in (high, low) if x is not None), 0)
    return (
        None if low is None else offset - low,
        None if high is None else high - offset,
        offset,
    )


def narrowed_from_anywhere(side: int | None, length: Any) -> int | None:
    """As `narrowed`, for one side of a window around positions between -FAR and FAR."""
    length = length if isinstance(length, int) else FAR
    return None if side is None or side >= length - 1 + FAR else side


def same_ids(query_ids: Any, key_ids: Any) -> tuple[jax.Array, jax.Array]:
    """Returns int32 ids (B, T) and (B, S) of which the same are equal; those of a row, in order.

    Raises:
      TypeError: The types have no integer type in common here.
    """
    fits = jnp.iinfo(jnp.int32)
    ids: list[Any] = [
        x.astype(np.int32)
        if isinstance(x, np.ndarray) and ((x >= fits.min) & (x <= fits.max)).all()
        else x
        for x in (query_ids, key_ids)
    ]
    dtypes = [x.dtype for x in ids]
    if all(jnp.iinfo(x).min >= fits.min and jnp.iinfo(x).max <= fits.max for x in dtypes):
        return jnp.asarray(ids[0], jnp.int32), jnp.asarray(ids[1], jnp.int32)
    if dtypes[0] == dtypes[1] == jnp.uint32:  # the wrap is one to one
        return jnp.asarray(ids[0].astype(np.int32)), jnp.asarray(ids[1].astype(np.int32))
    if all(isinstance(x, np.ndarray) for x in ids):
        _, found = np.unique(np.concatenate(ids, axis=1), return_inverse=True)
        found = jnp.asarray(found.reshape(ids[0].shape[0], -1).astype(np.int32))
        return found[:, : ids[0].shape[1]], found[:, ids[0].shape[1] :]
    with jax.numpy_dtype_promotion("standard"):  # both are cast, also where mixing is refused
        common = jnp.promote_types(*dtypes)
    has_64_bits = jnp.result_type(int) == jnp.int64
    if not jnp.issubdtype(common, jnp.integer) or (common.itemsize > 4 and not has_64_bits):
        raise TypeError(
            f"query_segment_ids and key_value_segment_ids have dtypes {dtypes[0]} and {dtypes[1]}; "
            "expected one integer dtype, or jax_enable_x64 for ids of 64 bits"
        )
    return ranks(*(jnp.asarray(x, common) for x in ids))


def ranks(query_ids: jax.Array, key_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns for each id how many smaller ones its row of both arrays has, int32."""
    both = jnp.concatenate([query_ids, key_ids], axis=1)
    order = jnp.argsort(both, axis=1)
    in_order = jnp.take_along_axis(both, order, axis=1)
    steps = (in_order[:, 1:] != in_order[:, :-1]).astype(jnp.int32)
    rank = jnp.pad(jnp.cumsum(steps, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
    rank = jnp.take_along_axis(rank, jnp.argsort(order, axis=1), axis=1)
    return rank[:, : query_ids.shape[1]], rank[:, query_ids.shape[1] :]
