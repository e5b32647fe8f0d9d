"""Hypergradient descent beside loops written out in NumPy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab import schedules, testing
from jaxopt_lab.schedules.hypergradient import CONTRACT_EXCEPTIONS, RULES

PARAMS = {"a": np.array([1.0, -2.0, 0.5]), "b": np.array([[3.0], [-1.0]])}
SCALES = {"a": np.array([1.0, 2.0, 3.0]), "b": np.array([[0.5], [4.0]])}
STEPS = 12


def run(tx: Any, steps=STEPS, dtype: Any = jnp.float64) -> Any:
    """Parameters and learning rates of each step on a quadratic."""
    with jax.enable_x64(True):
        params: Any = jax.tree.map(lambda x: jnp.asarray(x, dtype), PARAMS)

        def step(carry, _):
            params, state = carry
            grads = jax.tree.map(lambda s, p: jnp.asarray(s, dtype) * p, SCALES, params)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            rate = state.learning_rate if hasattr(state, "learning_rate") else 0.0
            return (params, state), (params, jnp.asarray(rate))

        _, (found, rates) = jax.lax.scan(step, (params, tx.init(params)), length=steps)
        path: Any = found
        flat = np.concatenate([np.reshape(path[k], (steps, -1)) for k in sorted(path)], axis=1)
        return flat, np.asarray(rates)


def oracle(inner, kappa, rule, eta=0.05, low=-np.inf, high=np.inf):
    """One flat vector: the sum over leaves comes first of itself."""
    theta = np.concatenate([PARAMS[k].ravel() for k in sorted(PARAMS)])
    scales = np.concatenate([SCALES[k].ravel() for k in sorted(SCALES)])
    previous, state, base = np.zeros_like(theta), {}, eta
    path, rates, factor = [], [], 0.0
    for t in range(1, STEPS + 1):
        g = scales * theta
        d = inner(g, state, t)
        if rule == "additive":
            eta = eta + kappa * (g @ previous)
        elif rule == "multiplicative":
            lengths = np.linalg.norm(g) * np.linalg.norm(previous)
            eta = eta * np.exp(kappa * (g @ previous) / lengths) if t > 1 else eta
        else:
            # A sum of products that is clipped, and 1 plus it.
            factor = np.clip(factor + kappa * (d @ previous), low, high)
            eta = base * (1 + factor)
        if rule != "fedhyper":
            eta = np.clip(eta, low * base, high * base)
        theta = theta - eta * d
        previous = d
        path.append(theta)
        rates.append(eta)
    return np.array(path), np.array(rates)


def sgd(g, state, t):
    del state, t
    return g


def momentum(g, state, t):
    state["m"] = g + 0.9 * state.get("m", 0) if t > 1 else g
    return state["m"]


def adam(g, state, t):
    state["m"] = 0.9 * state.get("m", 0) + 0.1 * g
    state["v"] = 0.999 * state.get("v", 0) + 0.001 * g * g
    return state["m"] / (1 - 0.9**t) / (np.sqrt(state["v"] / (1 - 0.999**t)) + 1e-8)


INNER = {
    "sgd": (sgd, optax.identity()),
    "momentum": (momentum, optax.trace(0.9)),
    "adam": (adam, optax.scale_by_adam()),
}
KAPPA = {"additive": 1e-3, "multiplicative": 0.1, "fedhyper": 1e-2}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("inner", INNER)
def test_follows_the_formula(inner, rule):
    slow, transformation = INNER[inner]
    bounds = (-0.8, 4.0) if rule == "fedhyper" else (-np.inf, np.inf)
    path, rates = oracle(slow, KAPPA[rule], rule, 0.05, *bounds)
    found, found_rates = run(schedules.hypergradient(transformation, 0.05, KAPPA[rule], rule))
    assert np.ptp(rates) > 1e-3
    # Twelve steps in float64; optax keeps Adam's bias corrections in float32 (1e-7 of a step).
    tolerance = 1e-6 if inner == "adam" else 1e-12
    np.testing.assert_allclose(found_rates, rates, rtol=tolerance)
    np.testing.assert_allclose(found, path, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rule", RULES)
def test_bounds(rule):
    given = {"fedhyper": (-0.1, 0.3)}.get(rule, (0.9, 1.3))
    path, rates = oracle(sgd, 10 * KAPPA[rule], rule, 0.05, *given)
    tx = schedules.hypergradient(optax.identity(), 0.05, 10 * KAPPA[rule], rule, (0.9, 1.3))
    found, found_rates = run(tx)
    np.testing.assert_allclose(found_rates, rates, rtol=1e-12)
    np.testing.assert_allclose(found, path, rtol=1e-12)
    assert found_rates.max() == pytest.approx(0.05 * 1.3, rel=1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_meta_rate_0_is_the_base(rule, dtype):
    found, rates = run(schedules.hypergradient(optax.scale_by_adam(), 0.05, 0.0, rule), dtype=dtype)
    base, _ = run(
        optax.chain(
            optax.scale_by_adam(),
            optax.stateless(lambda u, _: jax.tree.map(lambda x: -(x * 0.05).astype(x.dtype), u)),
        ),
        dtype=dtype,
    )
    assert (rates == np.float32(0.05)).all()
    if dtype == jnp.float32:
        np.testing.assert_array_equal(found, base)
    else:  # ours multiplies in float32 and rounds once
        np.testing.assert_allclose(found, base, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("eta", [0.1, 0.9, 1.1, 1.9])
def test_sign_on_a_parabola(eta):
    tx = schedules.hypergradient(optax.identity(), eta, 1e-4)
    theta = jnp.array(3.0)
    state: Any = tx.init(theta)
    for g in (theta, theta - eta * theta):
        _, state = tx.update(g, state)
    assert np.sign(float(state.learning_rate) - np.float32(eta)) == np.sign(1 - eta)


def test_too_short_and_too_long_steps_are_mended():
    for eta in (0.001, 0.45):  # the largest curvature is 4
        path, rates = run(
            schedules.hypergradient(optax.identity(), eta, 0.05, "multiplicative"), 400
        )
        fixed, _ = run(schedules.hypergradient(optax.identity(), eta, 0.0), 400)
        assert np.isfinite(rates).all()
        assert np.linalg.norm(path[-1]) < 1e-6 * np.linalg.norm(fixed[-1])


def test_products_without_a_number_leave_the_rate_alone():
    for rule in RULES:
        tx = schedules.hypergradient(optax.identity(), 0.1, 1e-3, rule)
        state: Any = tx.update(jnp.ones(2), tx.init(jnp.zeros(2)))[1]
        for bad in (jnp.array([jnp.nan, 1.0]), jnp.array([jnp.inf, 1.0])):
            after: Any = tx.update(bad, state)[1]
            assert float(after.learning_rate) == float(state.learning_rate)


def test_mapped_meta_rates():
    tx = schedules.hypergradient
    grads = jnp.array([1.0, 2.0])

    def rate(kappa):
        rule = tx(optax.identity(), 0.1, kappa)
        state: Any = rule.init(grads)
        for _ in range(2):
            _, state = rule.update(grads, state)
        return state.learning_rate

    np.testing.assert_allclose(
        jax.vmap(rate)(jnp.array([0.0, 0.01, 0.02])), [0.1, 0.15, 0.2], rtol=1e-6
    )


def test_extra_arguments_reach_the_inner_rule():
    def update(updates, state, params=None, **extra_args):
        return jax.tree.map(lambda u: extra_args["factor"] * u, updates), state

    inner = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    tx = schedules.hypergradient(inner, 0.1, 0.0)
    updates, _ = tx.update(jnp.ones(2), tx.init(jnp.ones(2)), factor=3.0)
    np.testing.assert_allclose(jnp.asarray(updates), -0.3, rtol=1e-6)


@pytest.mark.slow
def test_contract():
    def make(learning_rate, meta_rate):
        return schedules.hypergradient(
            optax.identity(), learning_rate, meta_rate, "multiplicative", (0.1, 10.0)
        )

    testing.check_transform(
        make, learning_rate=0.01, meta_rate=1e-3, exceptions=CONTRACT_EXCEPTIONS
    )
