"""A tree as one vector: one message instead of one a leaf, and padding at one end only."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_lab import _tree


def size(tree: Any) -> int:
    """Returns the number of entries of all leaves."""
    return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(tree))


def ravel(tree: Any) -> jax.Array:
    """Returns all entries in the order of the leaves, in the widest of float32 and their dtypes."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    dtype = _tree.compute_dtype(*(leaf.dtype for leaf in leaves))
    if not leaves:
        return jnp.zeros(0, dtype)
    return jnp.concatenate([leaf.astype(dtype).reshape(-1) for leaf in leaves])


def unravel(vector: jax.Array, like: Any) -> Any:
    """Returns the tree whose entries `ravel` would put in `vector`; dtypes are those of `like`."""
    leaves, structure = jax.tree.flatten(like)
    found, start = [], 0
    for leaf in leaves:
        shape = jnp.shape(leaf)
        stop = start + math.prod(shape)
        found.append(vector[start:stop].reshape(shape).astype(jnp.result_type(leaf)))
        start = stop
    return structure.unflatten(found)


def padded(vector: jax.Array, multiple: int) -> jax.Array:
    """Returns `vector` with zeros behind it, up to a multiple of `multiple`."""
    return jnp.pad(vector, (0, -vector.shape[0] % multiple))
