"""Going on with another number of replicas: nothing unsent is lost, nothing counted twice."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab import distributed, quantization, quantize_state
from jaxopt_lab.distributed import device_replicas, simulated_replicas
from tests.distributed.modes import AXIS

SHAPE = (5, 4)
DATA = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32)


def loss(params, batch):
    return jnp.mean((jnp.tanh(batch @ params) - 1.0) ** 2)


def trained(tx, count, steps=3):
    replicas = simulated_replicas(count)
    state, step = replicas.init(tx, jnp.ones(SHAPE)), replicas.train_step(loss, tx)
    for _ in range(steps):
        state, _ = step(state, DATA[:count])
    return state


def mean(tree):
    return jax.tree.map(lambda x: np.mean(x, axis=0), tree)


def assert_mean_kept(new, old):
    # The mean of at most four float32 numbers.
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old)):
        np.testing.assert_allclose(np.mean(a, axis=0), np.mean(b, axis=0), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4), (4, 1)])
@pytest.mark.parametrize("kind", ["simulated", "devices"])
def test_errors_keep_their_mean_and_parts_their_entries(before, after, kind):
    new = {
        "simulated": simulated_replicas,
        "devices": lambda count: device_replicas(devices=jax.devices()[:count]),
    }[kind](after)
    tx = optax.chain(
        distributed.error_feedback(distributed.sign(), AXIS, two_phase=True), optax.sgd(0.1)
    )
    old = trained(tx, before)
    state = new.resize(tx, jax.tree.map(np.asarray, old))
    errors, kept = old.opt_state[0], state.opt_state[0]
    assert kept.error.shape == (after, *SHAPE)
    assert_mean_kept(kept.error, errors.error)
    parts = np.reshape(errors.server_error, -1)[:20]
    np.testing.assert_array_equal(np.reshape(kept.server_error, -1)[:20], parts)
    assert int(kept.count) == 3
    new.check_equal(state.params)
    np.testing.assert_array_equal(state.params[0], old.params[0])
    step = new.train_step(loss, tx)
    state, _ = step(state, new.shard(DATA[:after]))
    assert np.all(np.isfinite(state.params))


@pytest.mark.parametrize("params", ["mean", "first"])
def test_local_weights_are_the_mean_or_the_first(params):
    tx = distributed.gossip(optax.adam(0.1), sync_every=5, axis_name=AXIS)
    old = trained(tx, 4)
    state = simulated_replicas(2).resize(tx, old, params=params)
    for new, was in ((state.params, old.params), (state.opt_state.inner_state[0].mu,
                     old.opt_state.inner_state[0].mu)):  # fmt: skip
        expected = np.mean(was, axis=0) if params == "mean" else was[0]
        np.testing.assert_allclose(new, [expected] * 2, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(state.opt_state.inner_state[0].count, [3, 3])
    assert int(state.opt_state.count) == 3


def test_estimates_stay_what_all_take_them_for():
    tx = distributed.ef21(distributed.top_k(0.25), AXIS)
    old = trained(optax.chain(tx, optax.sgd(0.1)), 4)
    state = simulated_replicas(2).resize(optax.chain(tx, optax.sgd(0.1)), old).opt_state[0]
    np.testing.assert_array_equal(state.estimate, state.mean_estimate)
    np.testing.assert_array_equal(state.mean_estimate[0], old.opt_state[0].mean_estimate[0])


@pytest.mark.slow
def test_the_memory_of_one_bit_adam_goes_to_who_averages_its_entries():
    tx = distributed.one_bit_adam(0.1, 1, AXIS)
    old, new = trained(tx, 4), simulated_replicas(2)
    state = new.resize(tx, old)
    before, after = old.opt_state[0], state.opt_state[0]
    assert_mean_kept(after.worker_error, before.worker_error)
    np.testing.assert_array_equal(
        np.reshape(after.server_error, -1)[:20], np.reshape(before.server_error, -1)[:20]
    )
    assert np.any(after.server_error)
    np.testing.assert_array_equal(after.nu[1], before.nu[0])
    new.train_step(loss, tx)(state, DATA[:2])


@pytest.mark.parametrize("name", ["diloco", "noloco", "co2"])
def test_rounds_go_on(name):
    make = getattr(distributed, name)
    tx = make(optax.adam(0.1), sync_every=2, axis_name=AXIS)
    old, new = trained(tx, 4, steps=4), simulated_replicas(2)
    state = new.resize(tx, old)
    exchange, was = state.opt_state.exchange_state, old.opt_state.exchange_state
    assert_mean_kept(exchange.slow, was.slow)
    if name == "co2":
        assert_mean_kept(exchange.pending, was.pending)
    new.train_step(loss, tx)(state, DATA[:2])


def test_codes_are_not_averaged():
    inner = quantize_state(optax.adam(0.1), quantization.int8(), min_size=1)
    tx = distributed.gossip(inner, sync_every=5, axis_name=AXIS)
    old = trained(tx, 4)
    state = simulated_replicas(2).resize(tx, old)
    for a, b in zip(
        jax.tree.leaves(state.opt_state.inner_state), jax.tree.leaves(old.opt_state.inner_state)
    ):
        np.testing.assert_array_equal(a, np.stack([b[0]] * 2))


def test_accumulated_gradients_and_statistics():
    tx = optax.MultiSteps(
        optax.chain(distributed.sync_gradients(AXIS), optax.adam(0.1)), 4
    ).gradient_transformation()
    replicas = simulated_replicas(4)
    state = replicas.init(tx, jnp.ones(SHAPE), {"mean": jnp.zeros(3)})
    step = replicas.train_step(lambda p, s, b: (loss(p, b), {"mean": jnp.mean(b, -1)}), tx)
    state, _ = step(state, DATA)
    old = jax.tree.map(np.array, state)
    new = simulated_replicas(2).resize(tx, old, params="first")
    assert_mean_kept(new.opt_state.acc_grads, old.opt_state.acc_grads)
    assert int(new.opt_state.mini_step) == 1
    np.testing.assert_array_equal(new.mutable["mean"], [old.mutable["mean"][0]] * 2)


def test_bad_input():
    tx = distributed.gossip(optax.sgd(0.1), axis_name=AXIS)
    state = simulated_replicas(4).init(tx, jnp.ones(SHAPE))
    two = simulated_replicas(2)
    with pytest.raises(ValueError, match="params must be one of mean, first, got 'sum'"):
        two.resize(tx, state, params="sum")  # pyright: ignore
    with pytest.raises(TypeError, match="state must be a TrainState, got tuple"):
        two.resize(tx, (1, 2))
    with pytest.raises(ValueError, match="not one that tx makes"):
        two.resize(optax.adam(0.1), state)
    with pytest.raises(ValueError, match=r"state 'params' has shape|leading axis"):
        two.resize(tx, state._replace(params=state.params[0, 0, 0]))
