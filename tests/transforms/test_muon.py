"""Muon's iteration: 16 bits, coefficients for each step, presets."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_lab
from jaxopt_lab.transforms._newton_schulz import PRESETS

SHAPES = [(6, 5), (5, 6), (24, 16), (64, 256), (256, 64)]


def movement(shape: tuple[int, int], **options: Any) -> jax.Array:
    """How far ten steps of drawn gradients move three matrices."""
    shapes = (3, *shape)
    numbers = optax.contrib.MuonDimensionNumbers(1, 2)
    tx: Any = jaxopt_lab.scale_by_muon(dimension_numbers=numbers, **options)

    @jax.jit
    def run(keys: jax.Array) -> jax.Array:
        def step(carry: Any, key: jax.Array) -> Any:
            w, state = carry
            updates, state = tx.update(jax.random.normal(key, shapes), state)
            return (w + updates, state), None

        w = jnp.zeros(shapes)
        return jax.lax.scan(step, (w, tx.init(w)), keys)[0][0]

    return run(jax.random.split(jax.random.key(0), 10))


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_iteration_stays_near_the_exact_one(shape):
    exact = movement(shape)
    error = movement(shape, ns_dtype=jnp.bfloat16) - exact
    # One rounding an expression gives 5e-3 to 8e-3, as torch's; coefficients or terms rounded by
    # themselves 2e-2 to 4.5e-2.
    relative = float(jnp.linalg.norm(error) / jnp.linalg.norm(exact))
    assert 0 < relative < 8e-3


def singular_values(**options: Any) -> np.ndarray:
    """Of the update of a matrix whose own go from 0.003 to 1, relative to its norm."""
    tx: Any = jaxopt_lab.scale_by_muon(nesterov=False, **options)
    u, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (8, 8)))
    grads = u * jnp.geomspace(0.02, 1.0, 8)
    updates, _ = tx.update(grads, tx.init(grads))
    return np.asarray(jnp.linalg.svdvals(updates))


@pytest.mark.parametrize(
    ("preset", "low", "high"),
    [("original", 0.65, 1.25), ("quintic", 0.85, 1.15), ("polar_express", 0.99, 1.01)],
)
def test_presets_orthogonalise_as_their_papers_say(preset, low, high):
    values = singular_values(ns_coeffs=preset)
    assert low < values.min()
    assert values.max() < high


def test_names_of_optax_are_the_same_coefficients():
    for ours, theirs in (("original", "standard"), ("quintic", "dion")):
        found, expected = (singular_values(ns_coeffs=name) for name in (ours, theirs))
        np.testing.assert_array_equal(found, expected)
    with_optax = optax.contrib.scale_by_muon(ns_coeffs=PRESETS["quintic"], nesterov=False)
    grads = jax.random.normal(jax.random.key(0), (4, 6))
    theirs, _ = with_optax.update(grads, with_optax.init(grads))
    tx: Any = jaxopt_lab.scale_by_muon(ns_coeffs="quintic", nesterov=False, eps=1e-8)
    ours, _ = tx.update(grads, tx.init(grads))
    # optax has another shape factor; the directions are equal.
    ratio = np.asarray(ours / theirs)
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-3)


def test_equal_triples_for_each_step_are_one_triple():
    triple = (3.4445, -4.7750, 2.0315)
    found = movement((6, 5), ns_coeffs=[triple] * 3)
    np.testing.assert_allclose(found, movement((6, 5), ns_coeffs=triple, ns_steps=3), rtol=2e-4)


def test_fewer_steps_take_the_first_triples():
    table = PRESETS["polar_express"]
    found = movement((6, 5), ns_coeffs="polar_express", ns_steps=2)
    np.testing.assert_array_equal(found, movement((6, 5), ns_coeffs=table[:2]))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ns_coeffs": "quntic"}, ValueError, "ns_coeffs must be one of original, "),
        ({"ns_coeffs": (1.0, 2.0)}, ValueError, "ns_coeffs must be three numbers, a triple for"),
        ({"ns_coeffs": ()}, ValueError, "ns_coeffs must be three numbers"),
        ({"ns_coeffs": (1.0, "b", 2.0)}, TypeError, "ns_coeffs b must be a number"),
        ({"ns_coeffs": [(1, 2, 3), (1, 2, np.inf)]}, ValueError, "ns_coeffs c of iteration 1 must"),
        ({"ns_coeffs": "quintic", "ns_steps": 6}, ValueError, "ns_steps is 6, but .* 5 iterations"),
        ({"ns_steps": 0}, ValueError, "ns_steps must be a positive integer"),
        ({"ns_steps": True}, TypeError, "ns_steps must be a positive integer"),
        ({"ns_dtype": jnp.int8}, ValueError, "ns_dtype must be floating"),
    ],
)
def test_coefficients_and_steps_that_do_not_fit(options, error, message):
    with pytest.raises(error, match=message):
        jaxopt_lab.muon(0.1, **options)


def test_many_equal_matrices_are_iterated_in_several_batches_and_not_mixed():
    tx: Any = jaxopt_lab.scale_by_muon(ns_steps=1)
    keys = jax.random.split(jax.random.key(0), 70)
    grads = [jax.random.normal(key, (3, 4)) for key in keys]
    together, _ = jax.jit(tx.update)(grads, tx.init(grads))
    for index in (0, 31, 32, 69):
        alone, _ = tx.update(grads[index], tx.init(grads[index]))
        np.testing.assert_allclose(together[index], alone, rtol=1e-5, atol=1e-6)


def test_a_state_made_with_other_dimension_numbers_is_refused():
    params = {"up": jnp.ones((4, 6)), "down": jnp.ones((6, 4)), "bias": jnp.ones(4)}
    numbers = optax.contrib.MuonDimensionNumbers(0, 1)
    plain = jaxopt_lab.muon(0.1)
    other = jaxopt_lab.muon(0.1, dimension_numbers={"up": None, "down": numbers})
    for made, used, rule in ((plain, other, "Muon"), (other, plain, "Adam")):
        with pytest.raises(ValueError, match=f"another transformation: 'up' is left to {rule} the"):
            used.update(params, made.init(params), params)
    for rule in (plain, other):  # also where a wrapper hides a part of the tree
        masked = optax.masked(rule, {"up": True, "down": True, "bias": False})
        masked.update(params, masked.init(params), params)
    parts = optax.partition({"a": optax.adam(0.1)}, dict.fromkeys(params, "a"))
    with pytest.raises(ValueError, match="it has parts for a, expected muon and adam"):
        plain.update(params, parts.init(params), params)
