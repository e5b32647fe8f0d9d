"""The driver: the same lines, and the same numbers, on devices and in a simulation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab.distributed import (
    device_replicas,
    diloco,
    noloco,
    simulated_replicas,
    sync_gradients,
)
from jaxopt_lab.distributed.replicas import shared_counters
from tests.distributed.modes import AXIS

PARAMS = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
BATCHES = np.random.default_rng(0).normal(size=(6, 4, 5, 3)).astype(np.float32)
KINDS = {
    "devices": lambda: device_replicas(devices=jax.devices()[:4]),
    "simulated": lambda: simulated_replicas(4),
}


def loss(params, batch):
    return jnp.mean((jnp.tanh(batch @ params["w"]) + params["b"] - 0.5) ** 2)


def local(replicas):
    return diloco(optax.adam(1e-2), sync_every=2, axis_name=replicas.axis_name)


def trained(replicas, tx):
    state = replicas.init(tx, PARAMS)
    step = replicas.train_step(loss, tx)
    losses = []
    for batch in BATCHES:
        state, value = step(state, replicas.shard(batch))
        losses.append(np.asarray(value))
    return state, np.stack(losses)


def test_devices_and_simulation_agree():
    (one, losses), (other, simulated) = (
        trained(replicas, local(replicas)) for replicas in (make() for make in KINDS.values())
    )
    np.testing.assert_allclose(losses, simulated, rtol=1e-6)  # the order of sums over replicas
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_synchronous_training_is_training_on_the_whole_batch(kind):
    replicas = KINDS[kind]()
    tx = optax.chain(sync_gradients(AXIS), optax.sgd(0.1, momentum=0.9))
    state, _ = trained(replicas, tx)
    params: Any = PARAMS
    plain = optax.sgd(0.1, momentum=0.9)
    plain_state = plain.init(params)
    for batch in BATCHES:
        grads = jax.grad(loss)(params, batch.reshape(-1, 3))
        updates, plain_state = plain.update(grads, plain_state)
        params = optax.apply_updates(params, updates)
    replicas.check_equal(state.params)
    for key, found in replicas.consensus(state.params).items():
        np.testing.assert_allclose(found, params[key], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(found, state.params[key][0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_branch_on_the_step_stays_a_branch(kind):
    replicas = KINDS[kind]()
    state = replicas.init(local(replicas), PARAMS)
    shared = shared_counters(state.opt_state)
    assert shared.count is True
    assert state.opt_state.count.shape == ()
    assert state.opt_state.inner_state[0].count.shape == (4,)
    step = replicas.train_step(loss, local(replicas))
    traced = str(jax.make_jaxpr(step)(state, BATCHES[0]))
    assert "cond[" in traced


def test_counters_of_nested_states_are_shared():
    tx = noloco(optax.adam(1e-2), sync_every=2, axis_name=AXIS)
    shared = shared_counters(simulated_replicas(3).init(tx, PARAMS).opt_state)
    assert (shared.count, shared.exchange_state.round) == (True, True)
    assert not any(jax.tree.leaves((shared.inner_state, shared.exchange_state.slow)))


@pytest.mark.parametrize("kind", KINDS)
def test_consensus_keeps_dtypes_and_takes_the_first_of_what_is_no_float(kind):
    replicas = KINDS[kind]()
    tree = {
        "half": np.asarray([1.0, 2.0, 3.0, 6.0], jnp.bfloat16),
        "count": np.arange(4, dtype=np.int32) + 5,
    }
    found = replicas.consensus(replicas.shard(tree))
    assert found["half"].dtype == jnp.bfloat16
    assert (float(found["half"]), int(found["count"])) == (3.0, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_replicas_that_differ_are_named(kind):
    replicas = KINDS[kind]()
    same = np.stack([np.asarray([0.0, np.nan], np.float32)] * 4)
    different = same.copy()
    different[2, 0] = -0.0
    replicas.check_equal(replicas.shard({"a": same}))
    with pytest.raises(ValueError, match="parameter 'b' differs between replica 0 and replica 2"):
        replicas.check_equal(replicas.shard({"a": same, "b": different}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_function_of_one_replica(kind):
    replicas = KINDS[kind]()
    total = replicas.map(lambda x: jax.lax.psum(x, AXIS))
    np.testing.assert_array_equal(total(replicas.shard(np.arange(4.0))), np.full(4, 6.0))


def test_has_aux():
    replicas = simulated_replicas(2)
    tx = optax.chain(sync_gradients(AXIS), optax.sgd(0.1))
    step = replicas.train_step(lambda p, b: (loss(p, b), b[0, 0]), tx, has_aux=True)
    _, (_, aux) = step(replicas.init(tx, PARAMS), BATCHES[0, :2])
    np.testing.assert_array_equal(aux, BATCHES[0, :2, 0, 0])


def test_bad_input():
    with pytest.raises(ValueError, match="count must be a positive integer, got 0"):
        simulated_replicas(0)
    replicas = simulated_replicas(4)
    with pytest.raises(ValueError, match=r"leaf 'x' has shape \(3, 2\); expected the 4 replicas"):
        replicas.shard({"x": np.ones((3, 2))})
    with pytest.raises(ValueError, match="axis 'replica' is not bound"):
        diloco(optax.sgd(1.0), sync_every=1, axis_name=AXIS).update(
            PARAMS, local(replicas).init(PARAMS), PARAMS
        )
