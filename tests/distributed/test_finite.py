"""A step that is not finite on one replica: skipped by all, and kept by no memory."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab import distributed
from tests.distributed import modes
from tests.distributed.modes import AXIS

N, D = 2, 6
FEEDBACK = {
    "error_feedback": distributed.error_feedback(distributed.top_k(0.5), AXIS),
    "random": distributed.error_feedback(distributed.random_k(0.5, unbiased=False), AXIS),
    "two phases": distributed.error_feedback(distributed.sign(), AXIS, two_phase=True),
    "ef21": distributed.ef21(distributed.top_k(0.5), AXIS, momentum=0.5),
    "ef21 from gradients": distributed.ef21(distributed.top_k(0.5), AXIS, init="gradient"),
    "econtrol": distributed.econtrol(distributed.top_k(0.5), AXIS),
    "powersgd": distributed.powersgd(1, AXIS, min_compression_rate=0.5),
}
AROUND = {
    **{name: optax.chain(tx, optax.adam(0.1)) for name, tx in FEEDBACK.items()},
    "sync_gradients": optax.chain(distributed.sync_gradients(AXIS), optax.adam(0.1)),
    "one_bit_adam": distributed.one_bit_adam(0.1, 2, AXIS),
    "diloco": distributed.diloco(optax.adam(0.1), sync_every=2, axis_name=AXIS),
    "noloco": distributed.noloco(optax.adam(0.1), sync_every=2, axis_name=AXIS),
    "co2": distributed.co2(optax.adam(0.1), sync_every=2, axis_name=AXIS, clip=1.0),
    "gossip": distributed.local_updates(
        optax.adam(0.1), distributed.gossip_exchange(axis_name=AXIS), sync_every=2
    ),
}
GRADS = np.random.default_rng(0).normal(size=(N, 6, D)).astype(np.float32)


def run(tx, gradients):
    def step(carry, gradient):
        params, state = carry
        update, state = tx.update(gradient.reshape(3, 2), state, params)
        return (optax.apply_updates(params, update), state), update

    params = distributed.vary(jnp.ones((3, 2)), AXIS)
    (params, state), updates = jax.lax.scan(step, (params, tx.init(params)), gradients)
    return params, state, updates


@functools.cache
def program(mode, tx):
    return modes.mapped(mode, lambda g: run(tx, g), N)


def mapped(mode, tx, gradients):
    return program(mode, tx)(gradients)


def with_bad(place, value, replica=1, entry=2):
    bad = np.insert(GRADS, place, GRADS[:, 0], axis=1)
    bad[replica, place, entry] = value
    return bad


CASES = [(method, "vmap") for method in AROUND] + [
    (method, "shard_map") for method in ("error_feedback", "powersgd", "one_bit_adam", "diloco")
]


@pytest.mark.parametrize(("method", "mode"), CASES)
def test_a_step_that_one_replica_cannot_make_is_as_if_it_had_never_been(method, mode):
    tx = distributed.apply_if_finite(AROUND[method], AXIS, 3)
    params, state, updates = mapped(mode, tx, with_bad(3, np.nan))
    expected, clean, _ = mapped(mode, tx, GRADS)
    np.testing.assert_array_equal(params, expected)
    for a, b in zip(jax.tree.leaves(state.inner_state), jax.tree.leaves(clean.inner_state)):
        np.testing.assert_array_equal(a, b)
    assert not np.any(updates[:, 3])
    np.testing.assert_array_equal(state.total_notfinite, [1, 1])
    np.testing.assert_array_equal(state.notfinite_count, [0, 0])


def test_after_too_many_bad_steps_in_a_row_they_are_applied_until_one_is_good():
    tx = distributed.apply_if_finite(optax.sgd(1.0), AXIS, 2)
    bad = jnp.full((N, 1), jnp.nan)
    steps = jnp.stack([bad, bad, bad, jnp.ones((N, 1)), bad], axis=1)

    def one(gradients):
        state, updates = tx.init(gradients[0]), []
        for gradient in gradients:
            update, state = tx.update(gradient, state)
            updates.append(jnp.asarray(update)[0])
        return jnp.stack(updates), state

    updates, state = modes.mapped("vmap", one, N)(steps)
    np.testing.assert_array_equal(updates[0], [0.0, 0.0, np.nan, -1.0, 0.0])
    np.testing.assert_array_equal(state.total_notfinite, [4, 4])
    np.testing.assert_array_equal(state.last_finite, [False, False])


@pytest.mark.parametrize(
    ("method", "value"), [*((name, np.nan) for name in FEEDBACK), ("error_feedback", np.inf)]
)
def test_no_memory_takes_up_what_is_not_finite(method, value):
    _, state, updates = mapped("vmap", FEEDBACK[method], with_bad(3, value))
    for name, leaf in jax.tree_util.tree_leaves_with_path(state):
        assert np.all(np.isfinite(leaf)), name
    assert np.all(np.isfinite(updates[:, 4:]))
    if method != "random":  # which may not have sent the entry
        assert not np.all(np.isfinite(updates[:, 3])), "a NaN is told, not swallowed"


@pytest.mark.parametrize("method", ["ef21", "econtrol"])
def test_estimates_keep_their_mean_over_a_bad_step(method):
    _, state, _ = mapped("vmap", FEEDBACK[method], with_bad(3, np.nan))
    # Sums of two replicas in float32.
    np.testing.assert_allclose(
        np.mean(state.estimate, axis=0), state.mean_estimate[0], rtol=1e-5, atol=1e-6
    )


WEIGHTED = {
    "sync_gradients": distributed.sync_gradients(AXIS),
    "error_feedback": FEEDBACK["error_feedback"],
    "ef21": FEEDBACK["ef21"],
    "powersgd": FEEDBACK["powersgd"],
    "one_bit_adam": distributed.scale_by_one_bit_adam(2, AXIS),
    "hierarchical_mean": distributed.hierarchical_mean(distributed.sync_gradients("host"), AXIS),
}


def weighted_steps(tx, gradients, weights):
    """The state and updates of three steps, the replicas of one host or of several."""

    def steps(gradients, weights):
        state, updates = tx.init(gradients[0]), []
        for gradient, weight in zip(gradients, weights):
            update, state = tx.update(gradient, state, gradient, weight=weight)
            updates.append(update)
        return jnp.stack(updates), state

    inside = jax.vmap(steps, axis_name=AXIS)
    return jax.jit(jax.vmap(inside, axis_name="host"))(gradients[None], weights[None])


@pytest.mark.parametrize("method", WEIGHTED)
def test_a_weight_that_makes_no_mean_is_told_and_skipped(method):
    gradients = jnp.asarray(GRADS[:, :3].reshape(N, 3, 3, 2))
    ones = jnp.ones((N, 3))
    tx = distributed.apply_if_finite(WEIGHTED[method], AXIS, 5)
    for bad in (-1.0, jnp.nan, jnp.inf):
        updates, state = weighted_steps(tx, gradients, ones.at[1, 1].set(bad))
        assert not np.any(updates[:, :, 1])
        np.testing.assert_array_equal(state.total_notfinite, 1)
        for leaf in jax.tree.leaves((updates, state)):
            assert np.all(np.isfinite(leaf))
        if method in ("sync_gradients", "hierarchical_mean"):
            alone, _ = weighted_steps(WEIGHTED[method], gradients, ones.at[1, 1].set(bad))
            assert np.all(np.isnan(alone[:, :, 1]))
            assert np.all(np.isfinite(alone[:, :, ::2]))


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_is_known_and_makes_no_mean_is_refused(weight):
    tx = distributed.sync_gradients(AXIS)
    with pytest.raises(ValueError, match=r"weight must be (non-negative|finite), got"):
        jax.vmap(lambda g: tx.update(g, tx.init(g), weight=weight)[0], axis_name=AXIS)(jnp.ones(N))


def test_one_bit_errors_stay_finite():
    tx = distributed.scale_by_one_bit_adam(2, AXIS)
    _, state, _ = mapped("vmap", tx, with_bad(3, np.nan))
    assert np.all(np.isfinite(state.worker_error))
    assert np.all(np.isfinite(state.server_error))


def test_one_number_is_reduced():
    tx = distributed.apply_if_finite(optax.sgd(1.0), AXIS, 2)
    grads = {"a": jnp.zeros(1000), "b": jnp.zeros(1000, jnp.bfloat16)}
    found = distributed.wire_bytes(
        lambda g: tx.update(g, tx.init(g))[0], grads, axis_sizes={AXIS: 4}
    )
    assert found.by_kind() == {"all-reduce": 2 * 3 / 4 * 4}


def test_bad_input():
    with pytest.raises(ValueError, match="max_consecutive_errors must be non-negative, got -1"):
        distributed.apply_if_finite(optax.sgd(1.0), AXIS, -1)
    with pytest.raises(TypeError, match=r"max_consecutive_errors must be an integer, got 1\.5"):
        distributed.apply_if_finite(optax.sgd(1.0), AXIS, 1.5)  # pyright: ignore
    with pytest.raises(TypeError, match=r"inner must be an optax.GradientTransformation"):
        distributed.apply_if_finite(optax.sgd, AXIS, 1)  # pyright: ignore
    tx = distributed.apply_if_finite(optax.sgd(1.0), AXIS, 1)
    with pytest.raises(ValueError, match="axis 'replica' is not bound"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    other = optax.apply_if_finite(optax.sgd(1.0), 1).init(jnp.ones(2))
    with pytest.raises(TypeError, match=r"got optax\..*\.ApplyIfFiniteState"):
        modes.mapped("vmap", lambda g: tx.update(g, other)[0], 2)(jnp.ones((2, 2)))
