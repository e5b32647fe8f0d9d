"""The gradient of a bias, in plain JAX.

    dbias = ds  summed over the axes along which the bias has length 1,    ds = p (dp - delta)

A scan over blocks of rows computes ds once more and sums it at once, so that no more than
B N S `_ROWS` entries exist at a time beside the gradient itself. The products go to the matrix unit
through XLA: this is not a kernel, and slower than one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention import dropout
from pallas_kernels.attention import mask as masks
from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.mosaic_gpu._common import pad
from pallas_kernels.attention.problem import Operands, Settings, Sizes

_ROWS = 128


def bias_gradient(
    settings: Settings,
    operands: Operands,
    lse: jax.Array,
    cotangent: jax.Array,
    delta: jax.Array,
) -> jax.Array:
    """Returns the gradient of ``operands.bias``, in its shape and dtype.

    Args:
      settings: Of the call.
      operands: Of the call, with a bias.
      lse: float32 (B, N, T).
      cotangent: (B, T, N, dv).
      delta: float32 (B, N, T), as `Route.backward` gets it.
    """
    bias = operands.bias
    assert bias is not None
    size = operands.sizes
    axes = tuple(axis for axis in range(4) if bias.shape[axis] == 1)
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def of_block(first_row: jax.Array) -> jax.Array:
        def rows(x: jax.Array, axis: int) -> jax.Array:
            if x.shape[axis] == 1 < size.queries:
                return x
            return lax.dynamic_slice_in_dim(pad(x, axis, _ROWS), first_row, _ROWS, axis)

        grouped = (size.batch, _ROWS, size.kv_heads, size.group, -1)
        per_head = (size.batch, size.heads, _ROWS, size.keys)
        q, d_o = (rows(x, 1).reshape(grouped) for x in (operands.query, cotangent))
        z = dot("btkgd,bskd->bkgts", q, operands.key).reshape(per_head) * settings.scale
        z += rows(bias, 2)
        slope = 1.0
        if settings.soft_cap is not None:
            tanh = jnp.tanh(z / settings.soft_cap)
            z, slope = settings.soft_cap * tanh, 1 - tanh * tanh
        mask = _of_rows(operands.mask, size, first_row, rows)
        seen = masks.visible(mask, size.batch, _ROWS, size.keys)
        shift = rows(lse, 2)[..., None]
        p = jnp.exp(jnp.where(seen, z - jnp.where(shift == -jnp.inf, 0, shift), -jnp.inf))
        dp = dot("btkgd,bskd->bkgts", d_o, operands.value).reshape(per_head)
        if operands.seeds is not None:
            t = first_row + jnp.arange(_ROWS, dtype=jnp.int32)[:, None]
            s = jnp.arange(size.keys, dtype=jnp.int32)
            keep = dropout.keep(operands.seeds[..., None, None], t, s, settings.dropout_rate)
            dp = jnp.where(keep, dp / (1 - settings.dropout_rate), 0)
        ds = jnp.where(seen, p * (dp - rows(delta, 2)[..., None]) * slope, 0)
        return ds.sum(axis=axes, keepdims=True)

    first_rows = jnp.arange(0, size.queries, _ROWS, dtype=jnp.int32)
    if 2 in axes:
        shape = jax.eval_shape(of_block, first_rows[0])
        total = jnp.zeros(shape.shape, shape.dtype)
        total, _ = lax.scan(lambda sum_, row: (sum_ + of_block(row), None), total, first_rows)
    else:
        blocks = lax.map(of_block, first_rows)  # (blocks, B or 1, N or 1, _ROWS, S or 1)
        total = jnp.moveaxis(blocks, 0, 2)
        total = total.reshape(*bias.shape[:2], -1, bias.shape[3])[:, :, : size.queries]
    return total.astype(bias.dtype)


def _of_rows(
    mask: Mask, size: Sizes, first_row: jax.Array, rows: Callable[[jax.Array, int], jax.Array]
) -> Mask:
    """Returns the mask of rows counted from `first_row`; those past the end are hidden."""
    lengths = mask.query_lengths
    whole = jnp.full((size.batch,), size.queries, jnp.int32)
    offsets = jnp.zeros_like(whole) if mask.offsets is None else mask.offsets
    ids = mask.query_segment_ids
    return dataclasses.replace(
        mask,
        offsets=offsets + first_row,
        query_lengths=(whole if lengths is None else jnp.minimum(lengths, whole)) - first_row,
        query_segment_ids=None if ids is None else rows(ids, 1),
        dense=None if mask.dense is None else rows(mask.dense, 2),
    )
