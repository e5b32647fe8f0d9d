"""Normalisation over the last axis as its definition reads.

    rms(x)   = x rho,          rho = (mean x^2 + epsilon)^-1/2
    layer(x) = (x - mean) rho, rho = (mean (x - mean)^2 + epsilon)^-1/2

Statistics are float32, or float64 for float64 inputs. They have a name each, by which `norms` keeps
them for the backward pass.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels._dtypes import wide

KEPT = ("norm_mean", "norm_mean_square")


def rms_norm(
    x: jax.Array, scale: jax.Array | None, *, epsilon: float, scale_offset: float, casting: str
) -> jax.Array:
    """Returns x rho (scale_offset + scale), in the dtype of x."""
    exact = x.astype(wide(x.dtype))
    normal = exact * _inverse(exact, epsilon)
    if casting == "llama":
        normal = normal.astype(x.dtype).astype(exact.dtype)
    return _scaled(normal, scale, scale_offset).astype(x.dtype)


def layer_norm(
    x: jax.Array, scale: jax.Array | None, bias: jax.Array | None, *, epsilon: float
) -> jax.Array:
    """Returns (x - mean) rho scale + bias, in the dtype of x."""
    exact = x.astype(wide(x.dtype))
    centred = exact - checkpoint_name(jnp.mean(exact, -1, keepdims=True), "norm_mean")
    found = _scaled(centred * _inverse(centred, epsilon), scale, 0.0)
    if bias is not None:
        found += bias.reshape((1,) * (x.ndim - 1) + bias.shape).astype(exact.dtype)
    return found.astype(x.dtype)


def _inverse(x: jax.Array, epsilon: float) -> jax.Array:
    # The derivative of the root takes what is below it, so that is kept and not the root.
    mean_square = checkpoint_name(jnp.mean(x * x, -1, keepdims=True), "norm_mean_square")
    return lax.rsqrt(mean_square + epsilon)


def _scaled(normal: jax.Array, scale: jax.Array | None, offset: float) -> jax.Array:
    if scale is None:
        return normal
    scale = scale.reshape((1,) * (normal.ndim - 1) + scale.shape).astype(normal.dtype)
    return normal * (scale + offset if offset else scale)
