"""Cross-entropy of a linear layer as its definition reads: all logits in memory.

    z = hidden weight + bias;   s = cap tanh(z / cap);   lse = log sum_v exp s_v
    loss = (1 - a) w_y (lse - s_y) + (a / V) sum_v w_v (lse - s_v) + z_loss lse^2

The specification that `chunked` is tested against, and what serves derivatives of every kind.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels._dtypes import wide
from pallas_kernels.loss import tokens
from pallas_kernels.loss.problem import Operands, Rows, Settings


def row_sums(settings: Settings, operands: Operands, counted: jax.Array | None) -> Rows:
    """Returns the sums of rows that the loss of a token is made of."""
    operands = tokens.without_ignored(operands, counted)
    dtype = wide(operands.hidden.dtype)
    weight = operands.weight if settings.vocabulary_axis == 1 else operands.weight.T
    weight = weight.astype(operands.hidden.dtype).astype(dtype)
    s = jnp.matmul(operands.hidden.astype(dtype), weight, precision=settings.precision)
    if operands.bias is not None:
        s += jnp.expand_dims(operands.bias.astype(dtype), range(s.ndim - 1))
    if settings.soft_cap is not None:
        s = jnp.where(s == -jnp.inf, -jnp.inf, settings.soft_cap * jnp.tanh(s / settings.soft_cap))
    index = jnp.maximum(operands.labels, 0)[..., None]
    picked = jnp.take_along_axis(s, index, axis=-1)[..., 0]
    total = None
    if settings.smooths:
        u = operands.class_weights
        total = s.sum(axis=-1) if u is None else jnp.matmul(s, u, precision="highest")
    return Rows(jax.nn.logsumexp(s, axis=-1), jnp.where(operands.labels < 0, 0, picked), total)
