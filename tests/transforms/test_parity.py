"""Every rule reproduces the trajectories of its authors' implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.transforms import cases


def deviation(case: cases.Case, tx: optax.GradientTransformation, dtype: type) -> float:
    """Runs the case and returns the largest error, relative to the largest entry of its leaf."""
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), case.init)
    state = tx.init(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    worst = 0.0
    for t, grads in enumerate(case.grads, start=1):
        grads = jax.tree.map(lambda g: jnp.asarray(g, dtype), grads)
        params, state = step(params, state, grads)
        for name, expected in case.expected.get(t, {}).items():
            error = np.abs(np.asarray(params[name], np.float64) - expected)
            worst = max(worst, float(error.max() / np.abs(expected).max()))
    assert all(x.dtype == dtype for x in jax.tree.leaves(params))
    return worst


@pytest.mark.parametrize("name", cases.names())
def test_float64_equals_the_reference(name):
    case = cases.load(name)
    with jax.enable_x64(True):
        assert deviation(case, cases.transformation(case), jnp.float64) < 1e-9


@pytest.mark.parametrize("name", cases.names())
def test_float32_follows_the_reference(name):
    case = cases.load(name)
    # 1e-5 is the reference data's own tolerance for element-wise rules; the matrix products of
    # Muon amplify small singular values by up to 3.4445**5 and get ten times that.
    tolerance = 1e-4 if case.method.startswith("muon") else 1e-5
    assert deviation(case, cases.transformation(case), jnp.float32) < tolerance


def test_every_reference_is_mapped():
    assert cases.names(), f"no reference trajectories under {cases.GOLDEN}"
    for name in cases.names():
        cases.transformation(cases.load(name))


def test_an_unknown_hyperparameter_fails():
    case = cases.load("lion_default")
    odd = cases.Case(case.name, case.method, {**case.hyperparams, "new": 1}, {}, [], {})
    with pytest.raises(KeyError, match="new"):
        cases.transformation(odd)
