"""Tiles whose entries depend on key minus row alone, from one vector and back to one.

    tile[r, c] = band[c - r + rows - 1]

A band has rows + keys entries, of which the last is not used. Laid out anew for each row, with a
row length of one entry less, the band moves by one entry a row: no index is computed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def tile(band: jax.Array, rows: int, keys: int) -> jax.Array:
    """Returns (..., rows, keys) from a band (..., rows + keys)."""
    width = rows + keys
    flat = jnp.broadcast_to(band[..., None, :], (*band.shape[:-1], rows, width))
    flat = flat.reshape(*band.shape[:-1], rows * width)
    flat = flat[..., rows - 1 : rows - 1 + rows * (width - 1)]
    return flat.reshape(*band.shape[:-1], rows, width - 1)[..., :keys]


def sums(x: jax.Array) -> jax.Array:
    """Returns the band (..., rows + keys) of sums along the diagonals of (..., rows, keys)."""
    *leading, rows, keys = x.shape
    nothing = [(0, 0)] * len(leading)
    flat = jnp.pad(x, [*nothing, (0, 0), (0, rows - 1)]).reshape(*leading, -1)
    flat = jnp.pad(flat, [*nothing, (rows - 1, 1)])
    return flat.reshape(*leading, rows, rows + keys).sum(axis=-2)
