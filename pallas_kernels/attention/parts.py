"""What a call over slices of two devices sees of arrays that are over the whole sequence.

Rows of device i meet keys of device j, at positions that `layouts` knows. Lengths and the columns
of a dense mask become a dense mask of the two slices, the biases of all distances those of the
distances between two runs, and the dropout seeds others for each pair.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.attention import dropout, layouts
from pallas_kernels.attention.problem import Operands


class Pair(NamedTuple):
    """Two devices, as they are known when the program runs."""

    offsets: jax.Array  # int32 (pairs of runs,), see `layouts.Plan`
    device: jax.Array  # int32, whose queries they are
    source: jax.Array  # int32, whose keys


def key_positions(layout: str, axis_size: int, length: int, device: Any) -> jax.Array:
    """Returns the positions of a device's keys in the whole sequence, int32 (length,)."""
    first = jnp.asarray(layouts.starts(layout, axis_size, length).astype(np.int32))[device]
    run = length // layouts.runs_of(layout)
    within = jnp.arange(run, dtype=jnp.int32) * layouts.stride_of(layout, axis_size)
    return (first[:, None] + within[None, :]).reshape(length)


def dense_mask(
    operands: Operands, layout: str, axis_size: int, call: layouts.Call, pair: Pair
) -> jax.Array | None:
    """Returns what lengths and dense mask leave of the call's keys to its rows."""
    dense, lengths = operands.mask.dense, operands.mask.key_value_lengths
    keys = operands.key.shape[1]
    if dense is not None and dense.shape[3] != 1:
        dense = lax.dynamic_slice_in_dim(dense, pair.source * keys, keys, axis=3)
        dense = dense[..., call.keys]
    if dense is not None and dense.shape[2] != 1:
        dense = dense[:, :, call.rows]
    if lengths is not None:
        positions = key_positions(layout, axis_size, keys, pair.source)[call.keys]
        valid = (positions[None, :] < lengths[:, None])[:, None, None]
        dense = valid if dense is None else dense & valid
    return dense


def seeds(of_call: jax.Array | None, first_row: int, first_key: int, number: Any) -> Any:
    """Returns dropout seeds (B, N) that no other pair of slices, by its number, has."""
    if of_call is None:
        return None
    other = dropout.mix(of_call + number * dropout.ROW)
    first = jnp.int32(first_row) * dropout.ROW + jnp.int32(first_key) * dropout.KEY
    return dropout.mix(other + first)


class Band(NamedTuple):
    """Where the distances of a call are among those of the whole sequence."""

    start: Any
    length: int
    stride: int

    def read(self, diagonals: jax.Array) -> jax.Array:
        """Returns the biases of the call, (1, N, rows + keys - 1), from those of all distances."""
        found = lax.dynamic_slice_in_dim(diagonals, self.start, self.length, axis=2)
        return found[:, :, :: self.stride]

    def add(self, total: jax.Array, found: jax.Array | None) -> jax.Array:
        """Adds gradients of the call's biases to those of all distances."""
        assert found is not None
        here = lax.dynamic_slice_in_dim(total, self.start, self.length, axis=2)
        here = here.at[:, :, :: self.stride].add(found.astype(total.dtype))
        return lax.dynamic_update_slice_in_dim(total, here, self.start, axis=2)


def band(operands: Operands, layout: str, axis_size: int, call: layouts.Call, pair: Pair) -> Band:
    """Returns the distances of a call between one run of rows and one of keys."""
    queries, keys = operands.query.shape[1], operands.key.shape[1]
    stride = layouts.stride_of(layout, axis_size)

    def first(length: int, part: slice, device: Any) -> Any:
        starts = layouts.starts(layout, axis_size, length).astype(np.int32)
        return jnp.asarray(starts)[device, part.start // (length // layouts.runs_of(layout))]

    rows, columns = call.rows.stop - call.rows.start, call.keys.stop - call.keys.start
    distance = first(keys, call.keys, pair.source) - first(queries, call.rows, pair.device)
    start = distance - (rows - 1) * stride + axis_size * queries - 1
    return Band(start, (rows + columns - 2) * stride + 1, stride)
