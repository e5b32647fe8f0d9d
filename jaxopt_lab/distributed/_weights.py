"""Weights of replicas in a mean, such as their numbers of tokens.

sum_i w_i x_i / sum_i w_i  =  (1/N) sum_i  (N w_i / sum_j w_j) x_i
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_lab import _checks, _tree
from jaxopt_lab.distributed import _axes


def weighted(tree: Any, weight: Any, axis_name: _axes.AxisName, times: int = 1) -> Any:
    """Returns the replica's share of a weighted mean: `tree` times its part of all weights.

    Args:
      tree: the replica's arrays.
      weight: a number that is not negative, shape (); at 0 the share is 0 whatever the arrays are.
      axis_name: the mapped axis, or a tuple of several, which count as one.
      times: what the share is multiplied by.

    Raises:
      TypeError: a weight that is no real number.
      ValueError: a weight with axes, or a number that is negative, infinite or NaN.
    """
    own = checked(weight)
    total = _axes.psum(own, axis_name)
    share = times * own / jnp.where(own == 0, 1, total)

    def scaled(x: jax.Array) -> jax.Array:
        wide = x.astype(_tree.compute_dtype(x.dtype))
        return jnp.where(own == 0, 0, wide * share.astype(wide.dtype)).astype(x.dtype)

    return jax.tree.map(scaled, tree)


def checked(weight: Any) -> jax.Array:
    """Returns a weight as float32, NaN in place of a negative one, so that no mean hides it.

    Raises:
      TypeError: a weight that is no real number.
      ValueError: a weight with axes, or a number that is negative, infinite or NaN.
    """
    _checks.check_non_negative(weight=weight)
    own = jnp.asarray(weight, jnp.float32)
    return jnp.where(own < 0, jnp.nan, own)


def for_mean(tree: Any, weight: Any, axis_name: _axes.AxisName) -> Any:
    """Returns arrays whose plain mean over the replicas is the weighted one.

    Args:
      tree: the replica's arrays.
      weight: see `weighted`, or None, which leaves the arrays as they are.
      axis_name: the mapped axis, or a tuple of several, which count as one.
    """
    if weight is None:
        return tree
    return weighted(tree, weight, axis_name, times=_axes.size(axis_name))
