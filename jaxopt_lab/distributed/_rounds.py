"""Weights from which replicas start a round of local steps, and how far the steps went.

Slow weights are at least float32, so that an outer step smaller than the spacing of 16-bit
parameters is not lost.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_lab import _compat, _tree


def slow_weights(params: Any, dtype: Any = None) -> Any:
    """Returns a copy of `params` in `dtype`, by default the widest of float32 and their own.

    Raises:
      TypeError: a parameter is not real floating point.
    """
    _tree.check_params(params)

    def copy(x: Any) -> jax.Array:
        # A state that shares buffers with the parameters could not be donated beside them.
        return jnp.array(x, dtype or _tree.compute_dtype(jnp.result_type(x)), copy=True)

    return jax.tree.map(copy, params)


def start(slow: Any, params: Any) -> Any:
    """Returns the slow weights in the dtypes of `params`: what a round starts from."""
    return jax.tree.map(lambda s, p: _compat.rounded(s, p.dtype).astype(p.dtype), slow, params)


def descent(slow: Any, params: Any) -> Any:
    """Returns start minus `params`, the pseudo-gradient of a round, in the dtypes of `slow`.

    The start is rounded as the parameters are: a round without steps gives zero.
    """

    def difference(s: jax.Array, p: jax.Array) -> jax.Array:
        compute = _tree.compute_dtype(s.dtype, p.dtype)
        begun = _compat.rounded(s, p.dtype).astype(compute)
        return (begun - p.astype(compute)).astype(s.dtype)

    return jax.tree.map(difference, slow, params)
