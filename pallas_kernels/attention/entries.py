"""Numbers of a batch entry: one for each, or one for all; and what lies outside of them."""

from __future__ import annotations

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp


def number_or_entries(
    name: str, value: Any, leading: tuple[int, ...]
) -> tuple[int, jax.Array | None]:
    """Returns a number known while tracing, or else 0 and one number for each batch entry."""
    if value is None:
        return 0, None
    if isinstance(value, numbers.Integral):
        return int(value), None
    value = jnp.asarray(value)
    value = jnp.broadcast_to(value, leading) if value.ndim == 0 else value
    return 0, per_entry(name, value, leading)


def per_entry(name: str, values: Any, leading: tuple[int, ...]) -> jax.Array:
    """Returns one int32 for each batch entry."""
    values = jnp.asarray(values)
    if not jnp.issubdtype(values.dtype, jnp.integer):
        raise TypeError(f"{name} has dtype {values.dtype}; expected integers")
    if values.shape != leading and values.shape != (math.prod(leading),):
        raise ValueError(
            f"{name} has shape {values.shape}; expected {leading}, one number for each batch entry"
        )
    return values.reshape(-1).astype(jnp.int32)


def zero_before(x: jax.Array, start: int, starts: jax.Array | None) -> jax.Array:
    """Returns (B, S, K, d) with 0 before the first key, which may be anything."""
    if starts is None:
        return x.at[:, :start].set(0) if start > 0 else x
    before = jnp.arange(x.shape[1], dtype=jnp.int32) < starts[:, None]
    return jnp.where(before[:, :, None, None], 0, x)
