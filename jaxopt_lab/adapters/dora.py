r"""DoRA: a kernel's direction is adapted by low rank, its length per output unit for itself.

    V = K + s a b,      K' = m V / |V|,      |V| over the inputs, a constant to the gradient

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024, arXiv:2402.09353, equations 5
and 11. It is `LoraConfig(use_dora=True)`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxopt_lab.adapters._kernels import Kernel


def lengths(kernel: Kernel, whole: jax.Array) -> jax.Array:
    """Returns the length of each output unit of a kernel, with ones for its inputs' axes."""
    return jnp.sqrt(jnp.sum(jnp.square(whole), kernel.axes.reduction, keepdims=True))


def rescaled(kernel: Kernel, whole: jax.Array, magnitude: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gives each output unit another length.

    Args:
      kernel: which kernel it is.
      whole: V, with the kernel's axes.
      magnitude: m, shape (batch..., outputs...); what has the length zero has no direction and
        keeps the factor 1.

    Returns:
      K' and the factors m / |V|, which broadcast over the kernel.
    """
    length = jax.lax.stop_gradient(lengths(kernel, whole))
    magnitude = kernel.by_output(magnitude)
    factor = jnp.where(length == 0, 1, magnitude / jnp.where(length == 0, 1, length))
    return whole * factor, factor
