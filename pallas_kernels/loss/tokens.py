"""What a token costs, given the sums of its row of logits; shards and reductions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.loss.problem import Operands, Rows, Settings, Tokens


def across_shards(settings: Settings, rows: Rows) -> Rows:
    """Returns the sums over the whole vocabulary, of which each shard has those of a part."""
    if settings.axis_name is None:
        return rows
    peak = lax.pmax(lax.stop_gradient(rows.lse), settings.axis_name)
    peak = jnp.where(peak == -jnp.inf, 0, peak)
    mass = lax.psum(jnp.exp(rows.lse - peak), settings.axis_name)
    picked, total = lax.psum((rows.picked, rows.total), settings.axis_name)
    return Rows(peak + jnp.log(mass), picked, total)


def without_ignored(operands: Operands, counted: jax.Array | None) -> Operands:
    """Returns the operands with hidden states of 0 where ignored.

    They may be anything there, NaN included, and 0 * NaN is NaN in a product.
    """
    if counted is None:
        return operands
    hidden = operands.hidden
    zero = jnp.zeros((), hidden.dtype)
    return operands._replace(hidden=jnp.where(counted[..., None], hidden, zero))


def losses(settings: Settings, rows: Rows, tokens: Tokens) -> jax.Array:
    """Returns the loss of each token, 0 where ignored and NaN where the label names no class."""
    loss = rows.lse - rows.picked
    if tokens.weights is not None:
        loss *= tokens.weights
    if rows.total is not None:
        total = settings.vocabulary if tokens.total is None else tokens.total
        spread = rows.lse * total - rows.total
        part = settings.label_smoothing
        loss = (1 - part) * loss + part / settings.vocabulary * spread
    if settings.z_loss:
        loss += settings.z_loss * jnp.square(rows.lse)
    loss *= jnp.where(tokens.known, 1, jnp.nan).astype(loss.dtype)  # of its gradient, too
    return of_counted(loss, tokens)


def of_counted(x: jax.Array, tokens: Tokens) -> jax.Array:
    """Returns `x` (...), 0 where ignored."""
    return x if tokens.counted is None else jnp.where(tokens.counted, x, 0)


def mean(total: jax.Array, tokens: Tokens) -> jax.Array:
    """Divides the sum of all losses by what counted tokens weigh; 0 where none counts."""
    weights = tokens.weights
    if weights is None:
        weights = jnp.ones(tokens.known.shape, total.dtype)
    weight = of_counted(weights, tokens).sum()
    return total / jnp.where(weight == 0, 1, weight)
