"""SVD and cosine bases: signs, what is degenerate, and what becomes of the moments."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab import subspace
from jaxopt_lab.subspace.dct import cosine_basis
from tests.oracles import dct_adamw
from tests.subspace.trees import assert_close, assert_same, selection

RNG = np.random.default_rng(5)
MATRIX = jnp.asarray(RNG.standard_normal((6, 9)), jnp.float32)
PARAMS = {"w": MATRIX}


def split(projection: Any, kept: int = 2, gap: int = 1, **options: Any) -> Any:
    options = {"full": optax.identity(), "free": optax.set_to_zero(), **options}
    return subspace.frugal(
        projection=projection, density=lambda size: kept, update_gap=gap, **options
    )


def step(tx: Any, grad: Any, state: Any = None) -> tuple[Any, Any]:
    state = tx.init(PARAMS) if state is None else state
    updates, state = tx.update({"w": jnp.asarray(grad, jnp.float32)}, state, PARAMS)
    return updates["w"], state


@pytest.mark.parametrize("method", ["full", "gram", "randomized"])
@pytest.mark.parametrize("side", ["smaller", "larger", "both"])
def test_bases_are_the_leading_directions_with_positive_signs(method, side):
    # Singular values 2^-i: well separated for every method.
    u, _ = np.linalg.qr(RNG.standard_normal((6, 6)))
    v, _ = np.linalg.qr(RNG.standard_normal((9, 9)))
    grad = u * 2.0 ** -np.arange(6) @ v[:6]
    # The range finder with as many test vectors as rows is exact.
    _, state = step(split(subspace.svd(side, method, power_iterations=2), 3), grad)
    found = selection(state, "w")
    expected = {"smaller": [u[:, :3]], "larger": [v[:3].T], "both": [u[:, :3], v[:3].T]}[side]
    for basis, right in zip(found if side == "both" else [found], expected):
        largest = np.argmax(np.abs(right), axis=0)
        right = right * np.sign(right[largest, range(3)])
        # The Gram matrix squares the ratio 4 of the directions that are kept: 16 units of rounding.
        np.testing.assert_allclose(basis, right, atol=2e-5)


def test_randomized_finds_the_space_of_a_matrix_of_low_rank():
    left, right = RNG.standard_normal((40, 3)), RNG.standard_normal((3, 60))
    grad = jnp.asarray(left @ right, jnp.float32)
    tx = split(subspace.svd(method="randomized", oversampling=2, power_iterations=0), 3)
    updates, _ = tx.update({"w": grad}, tx.init({"w": grad}), {"w": grad})
    # One product with a random matrix has the whole space; float32 rounds entries of order one.
    assert_close(updates["w"], grad, 2e-5)


def test_basis_of_more_directions_than_the_other_side_has():
    tall = jnp.asarray(RNG.standard_normal((9, 2)), jnp.float32)
    for method in ("full", "gram"):
        tx = split(subspace.svd("in", method), 5)
        updates, state = tx.update({"w": tall}, tx.init({"w": tall}), {"w": tall})
        basis = selection(state, "w")
        assert_close(basis.T @ basis, np.eye(5), 2e-6)
        assert_close(updates["w"], tall, 2e-6)


@pytest.mark.parametrize("bad", [0.0, jnp.nan, jnp.inf])
@pytest.mark.parametrize(
    "projection",
    [
        subspace.svd(),
        subspace.svd("both", "gram"),
        subspace.svd(method="randomized"),
        subspace.dct(),
    ],
    ids=["full", "gram", "randomized", "dct"],
)
def test_nothing_is_learned_from_a_gradient_without_information(projection, bad):
    tx = split(projection)
    _, before = step(tx, MATRIX)
    grad = jnp.zeros_like(MATRIX) if bad == 0 else MATRIX.at[2, 3].set(bad)
    _, after = step(tx, grad, before)
    assert_same(selection(after, "w"), selection(before, "w"))
    _, later = step(tx, MATRIX[::-1], after)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(selection(later, "w")))


@pytest.mark.parametrize(
    "projection", [subspace.svd(method="randomized"), subspace.dct()], ids=["randomized", "dct"]
)
def test_nan_is_seen_in_a_large_gradient(projection):
    """Of this size, the maximum of XLA's library for CPUs passes over it."""
    tx, grad = split(projection), jnp.ones((64, 256)).at[5, 6].set(2.0)
    _, before = jax.jit(tx.update)({"w": grad}, tx.init({"w": grad}), {"w": grad})
    _, after = jax.jit(tx.update)({"w": grad.at[2, 3].set(jnp.nan)}, before, {"w": grad})
    assert_same(selection(after, "w"), selection(before, "w"))


@pytest.mark.parametrize(
    ("projection", "rank"),
    [
        (subspace.svd(), 3),
        (subspace.svd("both"), 3),
        (subspace.svd(method="gram"), 3),
        (subspace.svd("larger", "randomized"), 3),
    ],
    ids=["full", "both", "gram", "randomized"],
)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_rounding_of_the_remainder_is_not_a_sign_step(projection, rank, scale):
    # All of the gradient is inside the subspace: what is left is rounding, about 1e-7 of it.
    # Without a shared generator: the same matrix whatever ran before.
    rng = np.random.default_rng(7)
    left, right = rng.standard_normal((6, 2)), rng.standard_normal((2, 9))
    tx = split(projection, rank, full=optax.set_to_zero(), free=optax.scale_by_sign())
    updates, state = step(tx, scale * left @ right)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))
    np.testing.assert_array_equal(updates, 0)


def test_remainder_outside_of_the_basis_is_a_sign_step():
    tx = split(subspace.svd(), 2, full=optax.set_to_zero(), free=optax.scale_by_sign())
    updates, _ = step(tx, MATRIX)
    u, s, vt = np.linalg.svd(np.asarray(MATRIX, np.float64), full_matrices=False)
    np.testing.assert_array_equal(updates, np.sign(u[:, 2:] * s[2:] @ vt[2:]))


def test_rotating_a_basis_in_itself_changes_nothing():
    """Momentum of a space that stays, in a basis that turns, is momentum."""
    basis = np.linalg.qr(RNG.standard_normal((6, 2)))[0].astype(np.float32)

    def choose(name: str, count: jax.Array, grad: jax.Array) -> jax.Array:
        angle = count.astype(jnp.float32)
        c, s = jnp.cos(angle), jnp.sin(angle)
        return jnp.asarray(basis) @ jnp.array([[c, -s], [s, c]])

    turning = split(subspace.svd(choose=choose), full=optax.trace(0.9), on_refresh="project")
    still = split(
        subspace.svd(choose=lambda name, count, grad: jnp.asarray(basis)),
        full=optax.trace(0.9),
        on_refresh="keep",
    )
    slots = split(subspace.svd(choose=choose), full=optax.trace(0.9), on_refresh="keep")
    ends = []
    for tx in (turning, still, slots):
        state, total = None, 0.0
        for k in range(4):
            updates, state = step(tx, MATRIX + k, state)
            total = total + updates
        ends.append(total)
    # Cosines and products of float32 numbers of order ten.
    assert_close(ends[0], ends[1], 1e-5)
    assert np.max(np.abs(ends[2] - ends[1])) > 0.1


def test_projected_second_moments_stay_non_negative():
    tx = split(subspace.svd(), full=None, on_refresh="project")
    state = None
    for k in range(6):
        updates, state = step(tx, np.roll(MATRIX, k, 0) - k, state)
        assert np.all(np.isfinite(updates))
        assert np.all(state.selected[0].nu["w"] >= 0)


@pytest.mark.parametrize("type", [2, 3])
@pytest.mark.parametrize("size", [1, 5, 300])
def test_cosine_basis_is_exact_in_float32(type, size):
    found = cosine_basis(jnp.arange(size), size, type, jnp.dtype(jnp.float32))
    kind: dct_adamw.Kind = "dct2" if type == 2 else "dct3"
    # The table is rounded once; a product of float32 cosine arguments would be off by size * 1e-7.
    np.testing.assert_allclose(found, dct_adamw.dct_basis(size, kind), atol=1e-7)


def test_dct_by_length_leaves_the_least():
    q = dct_adamw.dct_basis(6, "dct3")
    lengths = np.sum((q.T @ np.asarray(MATRIX)) ** 2, 1)
    _, state = step(split(subspace.dct(norm=2), 3), MATRIX)
    np.testing.assert_array_equal(selection(state, "w"), np.argsort(-lengths)[:3])


def test_scores_survive_gradients_of_any_size():
    tx = split(subspace.dct(norm=2), 3)
    expected = selection(step(tx, MATRIX)[1], "w")
    for scale in (1e-30, 1e25):
        assert_same(selection(step(tx, scale * MATRIX)[1], "w"), expected)
