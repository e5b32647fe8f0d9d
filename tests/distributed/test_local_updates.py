"""Local updates and DiLoCo: the simulation, the invariants, the ways to run it, and refusals."""

from __future__ import annotations

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab import lion
from jaxopt_lab.distributed.diloco import DilocoState, diloco, diloco_exchange
from jaxopt_lab.distributed.gossip import gossip_exchange
from jaxopt_lab.distributed.local_updates import Exchange, LocalUpdatesState, local_updates
from tests.distributed import local_runs, modes
from tests.oracles import diloco as oracle

AXIS = modes.AXIS
ROUNDS, STEPS = 20, 3


@pytest.mark.parametrize("replicas", [1, 2, 3, 4, 8])
def test_follows_the_simulation(replicas):
    expected = oracle.rounds(
        local_runs.problem(replicas)[0][0],
        local_runs.gradients(replicas),
        number=ROUNDS,
        steps=STEPS,
        eta=0.1,
    )
    with jax.enable_x64(True):
        tx = diloco(optax.sgd(0.1), sync_every=STEPS, axis_name=AXIS)
        params, _ = local_runs.run(tx, replicas, ROUNDS * STEPS, dtype=jnp.float64)
    # Both in double precision: sums in another order, over 60 steps.
    np.testing.assert_allclose(local_runs.after_rounds(params, STEPS), expected, rtol=0, atol=1e-12)


@functools.cache
def under(mode, replicas):
    tx = diloco(optax.adam(0.1), sync_every=2, axis_name=AXIS)
    return local_runs.run(tx, replicas, 6, mode)


@pytest.mark.parametrize("mode", modes.MODES[1:])
@pytest.mark.parametrize("replicas", modes.REPLICAS)
def test_modes_agree(mode, replicas):
    for found, expected in zip(
        *map(jax.tree.leaves, (under(mode, replicas), under("vmap", replicas)))
    ):
        # The replicas' sum is taken in another order; Adam's steps are of size 0.1.
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("mode", modes.MODES)
def test_slow_weights_are_equal_to_the_bit(mode):
    params, state = under(mode, 8)
    for leaf in jax.tree.leaves(state.exchange_state):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    # Where the step crosses zero, params + (slow - params) rounds.
    np.testing.assert_allclose(params[:, -1], state.exchange_state.slow, rtol=0, atol=5e-7)
    assert np.ptp(params[:, -2], axis=0).min() > 1e-3  # within a round replicas do differ


def test_slow_weights_are_known_to_be_equal():
    """Where shard_map checks, their type says so; the inner state and parameters are not."""
    tx = diloco(optax.adam(0.1), sync_every=2, axis_name=AXIS)
    params = jnp.ones(3)

    def steps(params, gradient):
        state: Any = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(gradient[0], state, params)
            params = jnp.asarray(optax.apply_updates(params, updates))
        return params[None], state.exchange_state

    mapped: Any = jax.shard_map(
        steps,
        mesh=modes.mesh(2),
        in_specs=(jax.P(), jax.P(AXIS)),
        out_specs=(jax.P(AXIS), jax.P()),
    )
    params, exchange_state = jax.jit(mapped)(params, jnp.array([[1.0, 2.0, 3.0], [-1.0, 2.0, 0.5]]))
    np.testing.assert_allclose(params[0], exchange_state.slow, atol=5e-7)


def test_exchange_at_each_step_averages_gradients():
    tx = diloco(optax.sgd(0.1), optax.sgd(1.0), sync_every=1, axis_name=AXIS)
    params, _ = local_runs.run(tx, 4, 10)
    start, curvatures, minima = local_runs.problem(4)
    x = start[0]
    for step in range(10):
        x = x - 0.1 * np.mean(curvatures * (x - minima), axis=0)
        # float32 against float64, ten steps that contract
        np.testing.assert_allclose(params[0, step], x, rtol=0, atol=1e-6)


def test_one_replica_with_a_plain_outer_step_is_the_inner_optimizer():
    tx = diloco(optax.adam(0.1), optax.sgd(1.0), sync_every=3, axis_name=AXIS)
    params, _ = local_runs.run(tx, 1, 9)
    alone, _ = local_runs.run(optax.adam(0.1), 1, 9)
    # slow - (slow - theta) is theta but for the rounding of two sums a round
    np.testing.assert_allclose(params, alone, rtol=0, atol=1e-6)


def test_outer_rate_of_zero_keeps_the_slow_weights():
    tx = diloco(optax.sgd(0.1), optax.sgd(0.0), sync_every=3, axis_name=AXIS)
    params, state = local_runs.run(tx, 2, 6)
    start = local_runs.problem(2)[0].astype(np.float32)
    np.testing.assert_array_equal(state.exchange_state.slow, start)
    assert np.abs(params[:, 4] - start).max() > 0.01  # local steps were taken


def test_small_outer_steps_of_16_bit_parameters_are_not_lost():
    # A step of 2^-10 at 1 is a quarter of bfloat16's spacing below 1, and an eighth of that above.
    exchange = diloco_exchange(optax.sgd(2.0**-4), axis_name=AXIS)

    def rounds(params):
        state = exchange.init(params)
        for _ in range(16):
            params = params + jnp.asarray(2.0**-6, jnp.bfloat16)
            params, state = exchange.finish(params, state, exchange.begin(state))
        return params, state.slow

    params, slow = modes.mapped("vmap", rounds, 2)(jnp.ones(2, jnp.bfloat16))
    assert (params.dtype, slow.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(slow, 1 + 16 * 2.0**-10)  # all sums are exact
    np.testing.assert_array_equal(params.astype(jnp.float32), 1 + 2.0**-6)


def test_updates_lead_16_bit_parameters_to_the_target():
    tx = diloco(optax.sgd(0.1), sync_every=2, axis_name=AXIS)
    params, state = local_runs.run(tx, 2, 6, dtype=jnp.bfloat16)
    slow = state.exchange_state.slow
    np.testing.assert_array_equal(params[:, -1], slow.astype(jnp.bfloat16))
    shapes = jax.eval_shape(
        jax.vmap(lambda g: tx.update(g, tx.init(g), g)[0], axis_name=AXIS), params[:, 0]
    )
    assert shapes.dtype == jnp.float32


def test_slow_dtype():
    tx = diloco(optax.sgd(0.1), sync_every=2, axis_name=AXIS, slow_dtype=jnp.bfloat16)
    params, state = local_runs.run(tx, 2, 4)
    leaves = jax.tree.leaves(state.exchange_state)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}
    assert params.dtype == jnp.float32


@pytest.mark.parametrize(
    "outer", [optax.adam(0.1), lion(0.01), optax.adamw(0.1)], ids=["adam", "lion", "adamw"]
)
def test_any_rule_is_an_outer_rule(outer):
    tx = diloco(optax.adam(0.01), outer, sync_every=2, axis_name=AXIS)
    params, state = local_runs.run(tx, 2, 6)
    assert np.isfinite(params).all()
    assert (state.exchange_state.slow != local_runs.problem(2)[0].astype(np.float32)).all()


def test_a_run_resumes_with_the_same_bits():
    tx = diloco(optax.adam(0.1), sync_every=2, axis_name=AXIS)

    def some(params, state, gradient):
        for _ in range(3):
            updates, state = tx.update(gradient * params, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    start = jnp.ones((2, 3))
    gradient = jnp.arange(6.0).reshape(2, 3)
    unmapped: Any = None
    adam_axes = (optax.ScaleByAdamState(unmapped, 0, 0), optax.EmptyState())
    axes = LocalUpdatesState(unmapped, adam_axes, 0)  # counters stay unmapped
    step = jax.jit(jax.vmap(some, in_axes=(0, axes, 0), out_axes=(0, axes), axis_name=AXIS))
    state = jax.vmap(tx.init, out_axes=axes)(start)
    whole = step(*step(start, state, gradient), gradient)
    half = jax.tree.map(lambda x: jnp.asarray(np.array(x)), step(start, state, gradient))
    for found, expected in zip(*map(jax.tree.leaves, (step(*half, gradient), whole))):
        np.testing.assert_array_equal(found, expected)


def test_state_can_be_donated_beside_the_parameters():
    params = jnp.ones(3)
    state: Any = diloco(optax.sgd(0.1), axis_name=AXIS).init(params)
    assert state.exchange_state.slow.unsafe_buffer_pointer() != params.unsafe_buffer_pointer()


def test_sync_every_may_be_traced():
    def after(sync_every):
        tx = local_updates(optax.sgd(1.0), gossip_exchange(axis_name=AXIS), sync_every)
        return jax.vmap(local_runs.trajectory(tx, 4), axis_name=AXIS)(
            jnp.zeros(2), jnp.zeros(2), jnp.zeros(2)
        )[1].exchange_state.round

    assert jax.jit(after)(2).tolist() == [2, 2]


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: diloco(optax.sgd(1.0), sync_every=0, axis_name=AXIS), ValueError,
         "sync_every must be a positive integer, got 0"),
        (lambda: diloco(optax.sgd(1.0), sync_every=cast(Any, 2.5), axis_name=AXIS), TypeError,
         "sync_every must be a positive integer, got 2.5"),
        (lambda: diloco(optax.sgd(1.0), axis_name=AXIS, slow_dtype=jnp.int32), ValueError,
         "slow_dtype must be floating, got int32"),
        (lambda: local_updates(optax.sgd(1.0), cast(Any, optax.sgd(1.0)), 2), TypeError,
         "exchange must be an Exchange, .* got GradientTransformationExtraArgs"),
        (lambda: diloco(optax.sgd(1.0), axis_name=AXIS).init({"w": jnp.ones(2, jnp.int32)}),
         TypeError, "'w' has dtype int32: integer parameters cannot be optimized"),
    ],
)  # fmt: skip
def test_refuses_when_made(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_refuses_at_update():
    tx = diloco(optax.sgd(1.0), axis_name=AXIS)
    params = {"w": jnp.ones(2)}
    state: Any = tx.init(params)
    with pytest.raises(ValueError, match=r"local_updates needs params; call update\("):
        tx.update(params, state)
    with pytest.raises(ValueError, match="axis 'replica' is not bound; call inside shard_map"):
        tx.update(params, state, params)
    with pytest.raises(TypeError, match="expected a state of type LocalUpdatesState, got EmptySt"):
        tx.update(params, optax.EmptyState(), params)

    def update(gradients, state=state):
        return jax.vmap(lambda _: tx.update(gradients, state, params), axis_name=AXIS, axis_size=2)(
            jnp.zeros(2)
        )

    with pytest.raises(ValueError, match="updates do not match params: 'w' is missing"):
        update({"v": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"leaf 'w' has shape \(3,\), but in params .* \(2,\)"):
        update({"w": jnp.ones(3)})
    with pytest.raises(TypeError, match="updates leaf 'w' has dtype int32"):
        update({"w": jnp.ones(2, jnp.int32)})
    other = state._replace(exchange_state=optax.EmptyState())
    with pytest.raises(TypeError, match="expected a state of type DilocoState, got EmptyState"):
        update({"w": jnp.ones(2)}, other)


def test_refuses_gradients_that_autodiff_has_summed():
    tx = diloco(optax.sgd(1.0), axis_name=AXIS)

    def step(params, batch):
        gradient = jax.grad(lambda w: jnp.sum(w * batch))(params)
        return tx.update(gradient, tx.init(params), params)[0]

    mapped = jax.shard_map(
        step, mesh=modes.mesh(2), in_specs=(jax.P(), jax.P(AXIS)), out_specs=jax.P()
    )
    with pytest.raises(ValueError, match=r"local_updates: the gradient of '' is the same on all"):
        jax.jit(mapped)(jnp.ones(1), jnp.ones(2))


def test_exchange_is_a_tuple_of_functions_and_an_axis():
    exchange = diloco_exchange(axis_name=AXIS)
    assert isinstance(exchange, Exchange)
    assert exchange.axis_name == AXIS
    state = exchange.init({"w": jnp.ones(2)})
    assert isinstance(state, DilocoState)
    assert exchange.begin(state) == ()
