r"""DoRA: a kernel's direction is adapted by low rank, its length per output unit for itself.

    V = K + s a b,      K' = m V / |V|,      |V| over the inputs, a constant to the gradient

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024, arXiv:2402.09353, equations 5
and 11. It is `LoraConfig(use_dora=True)`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def lengths(matrices: jax.Array) -> jax.Array:
    """Returns the length of each output unit, (matrices, outputs)."""
    return jnp.linalg.norm(matrices, axis=-2)


def rescaled(matrices: jax.Array, magnitude: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gives each output unit the length `magnitude`, shape (matrices, outputs).

    Args:
      matrices: V, shape (matrices, inputs, outputs).
      magnitude: m; what has the length zero has no direction and keeps the factor 1.

    Returns:
      K' and the factors m / |V|, shape (matrices, outputs).
    """
    length = jax.lax.stop_gradient(lengths(matrices))
    factor = jnp.where(length == 0, 1, magnitude / jnp.where(length == 0, 1, length))
    return matrices * factor[:, None, :], factor
