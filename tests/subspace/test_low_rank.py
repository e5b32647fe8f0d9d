"""What is only the rounding of a projection gets no step from a rule that normalises."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_lab
from jaxopt_lab import subspace

PROJECTIONS = {
    "full": subspace.svd(),
    "gram": subspace.svd(method="gram"),
    "randomized": subspace.svd(method="randomized"),
    "in": subspace.svd("in"),
    "both": subspace.svd("both"),
}


def gradient(rank: int, shape: tuple[int, int] = (48, 64)) -> tuple[jax.Array, np.ndarray]:
    """The gradient of a layer for a batch of `rank` examples, and the span of its inputs."""
    rng = np.random.default_rng(rank)
    inputs, errors = rng.standard_normal((rank, shape[0])), rng.standard_normal((rank, shape[1]))
    return jnp.asarray(inputs.T @ errors, jnp.float32), np.linalg.qr(inputs.T)[0]


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("rank", [1, 8])
def test_directions_beyond_the_rank_get_no_step(name, rank):
    g, span = gradient(rank)
    params = {"w": jnp.zeros_like(g)}
    for tx in (
        jaxopt_lab.frugal_adamw(1.0, 0.25, projection=PROJECTIONS[name], free=optax.set_to_zero()),
        jaxopt_lab.galore_adamw(1.0, 12, projection=PROJECTIONS[name]),
    ):
        update, sizes = jax.jit(tx.update), []
        for scale in (1.0, 1000.0):
            state = tx.init(params)
            for _ in range(2):  # the basis is renewed in the first step only
                updates, state = update({"w": scale * g}, state, params)
            step = np.asarray(updates["w"], np.float64)
            noise = step - span @ (span.T @ step)
            # One direction that is noise has a step of the size of a direction with a gradient.
            assert np.linalg.norm(noise) < 1e-4 * np.linalg.norm(step)
            sizes.append(np.linalg.norm(step))
        np.testing.assert_allclose(sizes[1], sizes[0], rtol=2e-3)  # eps is 1e-6, a gradient 1


@pytest.mark.slow
def test_a_direction_is_stepped_along_once_a_gradient_has_something_of_it():
    g, _ = gradient(2)
    other, _ = gradient(8)
    params = {"w": jnp.zeros_like(g)}
    tx: Any = subspace.frugal(
        None, optax.set_to_zero(), subspace.svd(), lambda size: 6, update_gap=10
    )
    _, state = tx.update({"w": g}, tx.init(params), params)
    basis = state.treatments[0].selection
    assert np.sum(np.any(state.selected[0].mu["w"] != 0, axis=1)) == 2
    updates, state = tx.update({"w": other}, state, params)
    assert np.sum(np.any(state.selected[0].mu["w"] != 0, axis=1)) == 6
    assert np.all(np.linalg.norm(basis.T @ updates["w"], axis=1) > 0.1)


@pytest.mark.parametrize(
    ("projection", "decades"), [(subspace.svd(), 2), (subspace.dct(), 12)], ids=["svd", "dct"]
)
def test_a_gradient_of_full_rank_loses_nothing(projection, decades):
    g = jnp.asarray(np.random.default_rng(0).standard_normal((24, 32)), jnp.float32)
    # Columns of very different sizes: what is small is not noise. (Singular directions turn to the
    # large ones, until nothing but rounding is left of them in the others.)
    g = g * 10.0 ** -jnp.linspace(0, decades, 32)
    params = {"w": jnp.zeros_like(g)}
    tx: Any = subspace.frugal(optax.identity(), optax.set_to_zero(), projection, 0.5)
    _, state = tx.update({"w": g}, tx.init(params), params)
    leaf = [state.treatments[0].leaf]
    compact = projection.project(leaf, [state.treatments[0].selection], [g])
    np.testing.assert_array_equal(projection.without_rounding(leaf, [g], compact)[0], compact[0])


def test_a_cosine_alone_gets_a_step():
    # Constant over the inputs: one column of the basis has all of it.
    row = jnp.asarray(np.random.default_rng(0).standard_normal(32), jnp.float32)
    g = jnp.broadcast_to(row, (16, 32))
    params = {"w": jnp.zeros_like(g)}
    tx: Any = subspace.frugal(None, optax.set_to_zero(), subspace.dct(2), 0.5)
    updates, _ = tx.update({"w": g}, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], jnp.sign(g) / 4, rtol=1e-5)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_what_is_not_finite_is_not_taken_for_rounding(bad):
    g, _ = gradient(8)
    params = {"w": jnp.zeros_like(g)}
    tx: Any = subspace.frugal(optax.identity(), optax.set_to_zero(), subspace.svd(), 0.5)
    _, state = tx.update({"w": g}, tx.init(params), params)
    updates, _ = tx.update({"w": g.at[2, 3].set(bad)}, state, params)
    assert not np.all(np.isfinite(updates["w"]))
