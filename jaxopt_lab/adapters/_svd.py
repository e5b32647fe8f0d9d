"""Leading singular triplets of a stack of matrices, exactly or from a random range.

Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 53, 2011,
arXiv:0909.4061, algorithms 4.4 and 5.1.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from jaxopt_lab.adapters import _kernels

Method = Literal["auto", "full", "randomized"]
METHODS: tuple[Method, ...] = get_args(Method)
# Up to this smaller side a full decomposition is quick.
_FULL = 2048


class Triplets(NamedTuple):
    """The leading singular triplets, in falling order of the singular values."""

    u: jax.Array  # (matrices, inputs, k), orthonormal columns
    s: jax.Array  # (matrices, k)
    vt: jax.Array  # (matrices, k, outputs), orthonormal rows


def check_method(method: str) -> None:
    """Refuses unknown methods."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")


def leading(
    matrices: jax.Array,
    k: int,
    method: str = "auto",
    power_iterations: int = 4,
    key: jax.Array | None = None,
) -> Triplets:
    """Returns the k leading triplets; of each left vector the largest entry is positive.

    Args:
      matrices: shape (matrices, inputs, outputs), float32 or float64.
      k: how many.
      method: "full", "randomized", or "auto", which is full up to a smaller side of 2048.
      power_iterations: of "randomized", with max(2 k, k + 10) test vectors.
      key: of "randomized".

    Raises:
      ValueError: a key is needed and missing.
    """
    smaller = min(matrices.shape[1:])
    if method == "auto":
        method = "full" if smaller <= _FULL else "randomized"
    if method == "full":
        u, s, vt = jnp.linalg.svd(matrices, full_matrices=False)
    else:
        if key is None:
            raise ValueError("a randomized singular value decomposition needs a key")
        u, s, vt = _randomized(matrices, min(smaller, max(2 * k, k + 10)), power_iterations, key)
    u, s, vt = u[..., :k], s[..., :k], vt[..., :k, :]
    largest = jnp.take_along_axis(u, jnp.argmax(jnp.abs(u), -2, keepdims=True), -2)
    sign = jnp.where(largest < 0, -1, 1).astype(u.dtype)
    return Triplets(u * sign, s, vt * jnp.swapaxes(sign, -1, -2))


def _randomized(
    matrices: jax.Array, width: int, power_iterations: int, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    count, _, columns = matrices.shape
    transposed = jnp.swapaxes(matrices, -1, -2)
    sample = jax.random.normal(key, (count, columns, width), matrices.dtype)
    q = jnp.linalg.qr(_kernels.product(matrices, sample))[0]
    for _ in range(power_iterations):
        # The orthonormal basis after each product keeps directions apart that differ by rounding.
        q = jnp.linalg.qr(_kernels.product(transposed, q))[0]
        q = jnp.linalg.qr(_kernels.product(matrices, q))[0]
    small = _kernels.product(jnp.swapaxes(q, -1, -2), matrices)
    u, s, vt = jnp.linalg.svd(small, full_matrices=False)
    return _kernels.product(q, u), s, vt
