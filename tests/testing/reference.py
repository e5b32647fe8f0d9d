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


def _selected(mask: Any, params: Any) -> list[bool]:
    """One boolean a leaf; a tree whose leaves are no functions is a tree, callable or not."""
    if mask is None:
        return [True] * len(jax.tree.leaves(params))
    is_function = callable(mask) and all(map(callable, jax.tree.leaves(mask)))
    tree = mask(params) if is_function else mask
    selected: list[bool] = []
    jax.tree.map(lambda m, p: selected.extend([m] * len(jax.tree.leaves(p))), tree, params)
    return selected


def momentum(
    learning_rate: Any, b1: Any = 0.9, weight_decay: Any = 0.0, mask: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Momentum that keeps the whole contract: the reference of these tests."""

    def init(params: Any) -> MomentumState:
        _require_floating(params)
        return MomentumState(jnp.zeros((), jnp.int32), jax.tree.map(_zeros, params))

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, MomentumState]:
        del extra
        if params is None:
            raise ValueError("momentum needs params")
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

        def scale(m: jax.Array, p: Any, selected: bool) -> jax.Array:
            decay = jnp.asarray(weight_decay, m.dtype) * jnp.asarray(p, m.dtype)
            step = m + decay if selected else m
            # In the dtype of the weights: gradients may be narrower.
            return (-jnp.asarray(rate, m.dtype) * step).astype(jnp.result_type(p))

        moments = jax.tree.map(average, state.momentum, updates)
        count = jnp.asarray(optax.safe_increment(state.count))
        selected = jax.tree.unflatten(jax.tree.structure(params), _selected(mask, params))
        return jax.tree.map(scale, moments, params, selected), MomentumState(count, moments)

    return optax.GradientTransformationExtraArgs(init, update)


healthy = functools.partial(momentum, 0.1)
