"""Dropout whose bits depend on nothing but a seed and the two positions.

Forward, backward and every implementation draw the same mask, whatever their blocks: the bits of an
entry are a hash of (seed of its batch entry and head, row, key),

    row_key = mix(row * 0x9E3779B1 + seed)
    bits    = mix((key * 0x85EBCA77) ^ row_key)

with Wellons' 32-bit mixing function (`mix`), in wrapping int32 arithmetic that all backends have.
An entry is kept iff the upper 24 bits are at least rate * 2^24.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def _int32(bits: int) -> np.int32:
    return np.uint32(bits).astype(np.int32)


ROW, KEY = _int32(0x9E3779B1), _int32(0x85EBCA77)
"""Odd numbers that rows and keys are multiplied by."""


def mix(x: Any) -> Any:
    """Mixes 32 bits so that each input bit changes each output bit with probability near 1/2.

    References:
      C. Wellons, `hash-prospector <https://github.com/skeeto/hash-prospector>`_ (``lowbias32``).
    """
    x = x ^ lax.shift_right_logical(x, jnp.int32(16))
    x = x * _int32(0x7FEB352D)
    x = x ^ lax.shift_right_logical(x, jnp.int32(15))
    x = x * _int32(0x846CA68B)
    return x ^ lax.shift_right_logical(x, jnp.int32(16))


def seeds(key: jax.Array, batch: int, heads: int) -> jax.Array:
    """Returns one seed for each batch entry and head, int32 (B, N), from a PRNG key."""
    bits = jax.random.bits(key, (2,), jnp.uint32).astype(jnp.int32)
    b = jnp.arange(batch, dtype=jnp.int32)[:, None]
    n = jnp.arange(heads, dtype=jnp.int32)[None, :]
    return mix(mix(b * ROW + bits[0]) + n * KEY + bits[1])


def keep(seed: Any, rows: Any, keys: Any, rate: float) -> Any:
    """Returns which entries are kept, bool.

    Args:
      seed: int32, the entry of `seeds` for the tile's batch entry and head; broadcasts.
      rows: int32 positions of the queries, broadcastable against `keys`.
      keys: int32 positions of the keys.
      rate: Probability that an entry is dropped, in [0, 1).
    """
    row_key = mix(rows * ROW + seed)
    bits = mix((keys * KEY) ^ row_key)
    return lax.shift_right_logical(bits, jnp.int32(8)) >= np.int32(math.ceil(rate * 2**24))
