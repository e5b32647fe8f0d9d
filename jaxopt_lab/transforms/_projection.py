r"""The projection that AdamP and SGDP share (Heo et al., 2021, Algorithms 1 and 2).

A weight whose loss does not change with its length has gradients at right angles to it, and a
momentum step with a radial part only makes it longer. For the *channel* view (one vector an
output) and then the *layer* view (the whole matrix as one vector), of dimension D:

    if max_i |<g_i, theta_i>| / (|g_i| |theta_i|) < delta / sqrt(D):
        p_i <- p_i - theta_i <theta_i, p_i> / |theta_i|^2, and weight decay is scaled by wd_ratio
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_lab import _hyperparams, _matrices, _roles


def channel_axes(role: _roles.Role) -> _matrices.MatrixAxes | None:
    """Default axes: those of a matrix, a channel for each output; of a table, for each row.

    A row of a table of embeddings is what the authors' code, which takes the first axis of all
    that has two, calls its channel.
    """
    if role.kind == "embedding" and role.axes is not None:
        batch, reduction, output = role.axes
        return _matrices.MatrixAxes(batch, output, reduction)
    return role.axes


def radial_part(
    p: jax.Array,
    g: jax.Array,
    theta: jax.Array,
    axes: _matrices.MatrixAxes,
    *,
    delta: _hyperparams.Scalar,
    eps: _hyperparams.Scalar,
) -> tuple[jax.Array, jax.Array]:
    """Returns what to take out of the direction `p` where the weights look scale-invariant.

    Returns:
      The factor of `theta` in the radial part of `p`, zero where nothing is to be taken out, and
      whether it is: one boolean a matrix. Both broadcast to the parameter.
    """
    per_channel = [_sum(x, axes.reduction) for x in (g * theta, g * g, theta * theta, theta * p)]
    per_layer = [jnp.sum(x, axes.output, keepdims=True) for x in per_channel]

    def view(sums: list[jax.Array], dimension: int) -> tuple[jax.Array, jax.Array]:
        g_theta, g_g, theta_theta, theta_p = sums
        length = _hyperparams.sqrt(theta_theta)
        cosine = jnp.abs(g_theta) / (
            jnp.maximum(_hyperparams.sqrt(g_g), eps) * jnp.maximum(length, eps)
        )
        fires = jnp.max(cosine, axes.output, keepdims=True) < delta / math.sqrt(dimension)
        return fires, theta_p / jnp.square(length + eps)

    fan_in = math.prod(p.shape[a] for a in axes.reduction)
    fan_out = math.prod(p.shape[a] for a in axes.output)
    channel_fires, channel_radial = view(per_channel, fan_in)
    layer_fires, layer_radial = view(per_layer, fan_in * fan_out)
    radial = jnp.where(channel_fires, channel_radial, jnp.where(layer_fires, layer_radial, 0))
    return radial, channel_fires | layer_fires


def apart(
    direction: Callable[..., tuple[jax.Array, ...]],
    p: jax.Array,
    theta: jax.Array,
    g: jax.Array,
    *state: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the operands of `radial_part`: direction, gradient and weights.

    On accelerators the direction is computed a second time, inside the sums: behind the barrier XLA
    does not see that it is `p`, which it would write to memory because two kernels want it. On a
    CPU a root or a quotient inside a column sum is not vectorised, and `p` is better written once.
    """

    def again(_: jax.Array, *inputs: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        theta, g, *state = jax.lax.optimization_barrier(inputs)
        return direction(g, *state)[0], g, theta

    def as_it_is(p: jax.Array, theta: jax.Array, g: jax.Array, *_: jax.Array) -> Any:
        return p, g, theta

    return jax.lax.platform_dependent(p, theta, g, *state, cpu=as_it_is, default=again)


def _sum(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Sums over `axes`, which stay with length 1, in two stages.

    XLA would merge the stages, and the sum over the layer that follows, into one pass each over the
    whole matrix; the barriers, on what is small by then, prevent it.
    """
    longest = max(axes, key=lambda axis: x.shape[axis])
    length = x.shape[longest]
    rows = math.gcd(length, 16)
    blocks = x.reshape(*x.shape[:longest], length // rows, rows, *x.shape[longest + 1 :])
    partial = jnp.sum(blocks, longest + 1)
    partial = jax.lax.optimization_barrier(partial)
    return jax.lax.optimization_barrier(jnp.sum(partial, axes, keepdims=True))
