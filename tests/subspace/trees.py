"""Parameters, gradients and projections that the tests of this folder share."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_lab import subspace

PROJECTIONS = {
    "columns": subspace.columns(),
    "columns_out": subspace.columns("out"),
    "entries": subspace.entries(),
    "blocks": subspace.blocks(),
    "svd": subspace.svd(),
    "svd_both": subspace.svd("both", "gram"),
    "dct": subspace.dct(),
}
EXACT = ("columns", "columns_out", "entries", "blocks")
PARAMS = {
    "bias": jnp.linspace(-1, 1, 6),
    "first": jax.random.normal(jax.random.key(0), (4, 8)),
    "second": jax.random.normal(jax.random.key(1), (8, 6)),
}


def grads_at(step: int, params: Any = None) -> Any:
    """Normal gradients, of another draw for each step and leaf."""
    leaves, structure = jax.tree.flatten(PARAMS if params is None else params)
    rng = np.random.default_rng(step)
    return structure.unflatten([jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in leaves])


@functools.lru_cache(64)
def _jitted(tx: optax.GradientTransformation) -> Any:
    return jax.jit(tx.update)


def trajectory(
    tx: optax.GradientTransformation, steps: int, params: Any = None, state: Any = None
) -> tuple[list[Any], Any]:
    """The updates of each step with parameters that stay where they are, and the last state."""
    params = PARAMS if params is None else params
    state = tx.init(params) if state is None else state
    found = []
    for step in range(steps):
        updates, state = _jitted(tx)(grads_at(step, params), state, params)
        found.append(updates)
    return found, state


def states(tx: optax.GradientTransformation, steps: int, params: Any = None) -> list[Any]:
    """The states after each step."""
    params = PARAMS if params is None else params
    found, state = [], tx.init(params)
    for step in range(steps):
        _, state = _jitted(tx)(grads_at(step, params), state, params)
        found.append(state)
    return found


def assert_same(found: Any, expected: Any) -> None:
    """Bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def assert_close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        found,
        expected,
    )


def parts_of(state: Any) -> dict[str, subspace.Treatment]:
    """The treatments by path, with the selections."""
    is_treatment = lambda x: isinstance(x, subspace.Treatment)  # noqa: E731
    return {t.name: t for t in jax.tree.leaves(state.treatments, is_leaf=is_treatment)}


def selection(state: Any, name: str) -> Any:
    return jax.tree.map(np.asarray, parts_of(state)[name].selection)
