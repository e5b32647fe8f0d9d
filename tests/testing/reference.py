"""A small transformation that keeps the whole contract."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class MomentumState(NamedTuple):
    count: jax.Array
    momentum: Any


def _named(tree: Any) -> list[tuple[str, Any]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in flat]


def _require_floating(tree: Any) -> None:
    for name, leaf in _named(tree):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(f"{name} is {jnp.result_type(leaf)}, expected real floating point")


def _zeros(leaf: Any) -> jax.Array:
    dtype = jnp.result_type(leaf)
    if jnp.finfo(dtype).bits < 32:
        dtype = jnp.dtype(jnp.float32)
    zeros = jnp.zeros_like(leaf, dtype)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return zeros
    # A select on the weight keeps its sharding, which zeros made from nothing do not have.
    return jnp.where(jnp.zeros((), bool), jnp.asarray(leaf, dtype), zeros)


def momentum(learning_rate: Any, b1: Any = 0.9) -> optax.GradientTransformation:
    """Momentum that keeps the whole contract: the reference of these tests."""

    def init(params: Any) -> MomentumState:
        _require_floating(params)
        return MomentumState(jnp.zeros((), jnp.int32), jax.tree.map(_zeros, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, MomentumState]:
        del params
        if not isinstance(state, MomentumState):
            raise TypeError(f"expected MomentumState, got {type(state).__name__}")
        _require_floating(updates)
        new, old = dict(_named(updates)), dict(_named(state.momentum))
        if new.keys() != old.keys():
            raise ValueError(f"leaves differ: {new.keys() ^ old.keys()}")
        for name, leaf in new.items():
            if jnp.shape(leaf) != old[name].shape:
                raise ValueError(f"{name}: {jnp.shape(leaf)}, expected {old[name].shape}")

        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate

        def average(m: jax.Array, g: Any) -> jax.Array:
            b = jnp.asarray(b1, m.dtype)
            return b * m + (1 - b) * jnp.asarray(g, m.dtype)

        def scale(m: jax.Array, g: Any) -> jax.Array:
            return (-jnp.asarray(rate, m.dtype) * m).astype(jnp.result_type(g))

        moments = jax.tree.map(average, state.momentum, updates)
        count = jnp.asarray(optax.safe_increment(state.count))
        state = MomentumState(count, moments)
        return jax.tree.map(scale, moments, updates), state

    return optax.GradientTransformation(init, update)


healthy = functools.partial(momentum, 0.1)
