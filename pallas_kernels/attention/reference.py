"""Attention as its definition reads: O(T S) memory.

    z = scale q k^T + bias;   z = cap tanh(z / cap);   z = -inf where masked, or where the bias is
    p = exp(z - lse);   output = (p * keep / (1 - rate)) v
    lse = log(sum of exp(z) + exp(sink))

The route ``"reference"`` and the specification that all others are tested against. A row that sees
no key has output 0, gradient 0 and lse -inf.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._compat import Device
from pallas_kernels._dtypes import wide
from pallas_kernels.attention import dropout
from pallas_kernels.attention.mask import visible
from pallas_kernels.attention.problem import Operands, Settings


def attend(settings: Settings, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Returns output (B, T, N, dv), in the query's dtype, and lse (B, N, T).

    Scores, probabilities and sums are float32, or float64 for float64 inputs.
    """
    size = operands.sizes
    dtype = wide(operands.query.dtype)
    query, key, value = (x.astype(dtype) for x in (operands.query, operands.key, operands.value))
    query = query.reshape(size.batch, size.queries, size.kv_heads, size.group, size.head_dim)
    scores = settings.scale * jnp.einsum(
        "btkgd,bskd->bkgts", query, key, precision=settings.precision
    )
    scores = scores.reshape(size.batch, size.heads, size.queries, size.keys)
    if operands.bias is not None:
        scores += operands.bias.astype(dtype)
    if operands.diagonals is not None:
        rows, keys = jnp.arange(size.queries)[:, None], jnp.arange(size.keys)[None, :]
        scores += operands.diagonals[:, :, keys - rows + size.queries - 1].astype(dtype)
    if settings.soft_cap is not None:
        capped = settings.soft_cap * jnp.tanh(scores / settings.soft_cap)
        scores = jnp.where(scores == -jnp.inf, -jnp.inf, capped)
    seen = visible(operands.mask, size.batch, size.queries, size.keys)
    # Values behind the mask may be NaN, so they are selected away and not multiplied by zero; and
    # selected before and after the exponential, so that no gradient of it is NaN either.
    peak = jnp.max(scores, axis=-1, keepdims=True, where=seen, initial=-jnp.inf)
    if operands.sinks is not None:
        sinks = operands.sinks.astype(dtype)[None, :, None, None]
        peak = jnp.maximum(peak, sinks)
    peak = lax.stop_gradient(jnp.where(peak == -jnp.inf, 0, peak))
    weights = jnp.where(seen, jnp.exp(jnp.where(seen, scores, peak) - peak), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if operands.sinks is not None:
        total += jnp.exp(sinks - peak)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    lse = jnp.where(empty, -jnp.inf, peak + jnp.log(total))[..., 0]
    weights /= total
    if operands.seeds is not None:
        rows = jnp.arange(size.queries, dtype=jnp.int32)[None, None, :, None]
        keys = jnp.arange(size.keys, dtype=jnp.int32)[None, None, None, :]
        kept = dropout.keep(operands.seeds[..., None, None], rows, keys, settings.dropout_rate)
        weights = jnp.where(kept, weights / (1 - settings.dropout_rate), 0)
    weights = weights.reshape(size.batch, size.kv_heads, size.group, size.queries, size.keys)
    output = jnp.einsum("bkgts,bskd->btkgd", weights, value, precision=settings.precision)
    output = output.reshape(size.batch, size.queries, size.heads, size.value_dim)
    return output.astype(operands.query.dtype), lse


def refusal(settings: Settings, operands: Operands, device: Device) -> str | None:
    """Returns None: the reference serves everything."""
    del settings, operands, device
    return None
