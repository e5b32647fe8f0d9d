r"""The product of a matrix with its transpose, of whose blocks the mirrored ones are copied.

    X = (A; B),    X X^T = (A A^T, (B A^T)^T; B A^T, B B^T)

Three of four quarters are products, and those on the diagonal are split once more: 5/8 of the
arithmetic in all. A third split saves less than its smaller products lose.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _options

SPLITS = 2


def gram(
    x: jax.Array,
    *,
    least_side: int = 256,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    r"""The product :math:`x x^\top` by 5/8 of its arithmetic.

    What the product has twice is computed once and copied: in plain JAX, with derivatives and under
    all transformations. On two CPU cores it is faster from a side of 256 on; on GPUs and TPUs it
    has not been timed. `jaxopt_lab.muon` takes this function as its ``gram=``.

    Args:
      x: matrices (..., m, k), real.
      least_side: m from which on the product is split, at least 2; below it is a single one.
      precision: that of `jax.numpy.matmul`.
      preferred_element_type: dtype of the sums and of the result; by default that of `x`.

    Returns:
      (..., m, m).

    Raises:
      TypeError: `x` is no array of real numbers, or `least_side` no integer.
      ValueError: `x` has less than two axes, or `least_side` is below 2.

    Examples:
      >>> import jax.numpy as jnp, pallas_kernels
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
      >>> print(pallas_kernels.gram(x, least_side=2))
      [[ 5. 11. 17.]
       [11. 25. 39.]
       [17. 39. 61.]]
    """
    x = _options.array("x", x)
    if x.ndim < 2:
        raise ValueError(f"x has shape {x.shape}; expected (..., m, k)")
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError(f"x has dtype {x.dtype}; expected a real dtype")
    if _options.index("least_side", least_side) < 2:
        raise ValueError(f"least_side={least_side}; expected an integer of at least 2")

    def product(left: jax.Array, right: jax.Array) -> jax.Array:
        return jnp.matmul(
            left, right.mT, precision=precision, preferred_element_type=preferred_element_type
        )

    def split(x: jax.Array, splits: int) -> jax.Array:
        if splits == 0:
            return product(x, x)
        upper, lower = jnp.split(x, [x.shape[-2] // 2], axis=-2)
        across = product(lower, upper)
        return jnp.concatenate(
            [
                jnp.concatenate([split(upper, splits - 1), across.mT], axis=-1),
                jnp.concatenate([across, split(lower, splits - 1)], axis=-1),
            ],
            axis=-2,
        )

    return split(x, SPLITS if x.shape[-2] >= least_side else 0)
