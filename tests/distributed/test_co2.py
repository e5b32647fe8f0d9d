"""CO2: the simulation, what its all-reduce waits for, clipping, staleness, and refusals."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab.distributed.co2 import co2, co2_exchange, gap_aware
from tests.distributed import local_runs, modes
from tests.oracles import co2 as oracle

AXIS = modes.AXIS
ROUNDS, STEPS = 20, 2

SETTINGS = {
    "default": ({}, {}),
    "clip": ({"momentum": 0.5, "clip": 0.05}, {"mu": 0.5, "clip": 0.05}),
    "constant": (
        {"learning_rate": 0.7, "staleness_penalty": 1.5},
        {"alpha": 0.7, "penalty": lambda gap, t: 1.5},
    ),
    "gap_aware": (
        {"staleness_penalty": gap_aware(0.1, STEPS)},
        {"penalty": lambda gap, t: 1 + gap / (STEPS * 0.1)},
    ),
}


@pytest.mark.parametrize(
    ("replicas", "setting"),
    [(1, "default"), (2, "clip"), (3, "constant"), (4, "gap_aware"), (8, "default")],
)
def test_follows_the_simulation(replicas, setting):
    ours, theirs = SETTINGS[setting]
    expected = oracle.rounds(
        local_runs.problem(replicas)[0][0],
        local_runs.gradients(replicas),
        number=ROUNDS,
        tau=STEPS,
        eta=0.1,
        **theirs,
    )
    with jax.enable_x64(True):
        tx = co2(optax.sgd(0.1), sync_every=STEPS, axis_name=AXIS, **ours)
        params, _ = local_runs.run(tx, replicas, ROUNDS * STEPS, dtype=jnp.float64)
    # Double precision in another order; the gap, which divides, is kept in float32.
    tolerance = 1e-6 if setting == "gap_aware" else 1e-12
    found = local_runs.after_rounds(params, STEPS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


@functools.cache
def under(mode, replicas):
    tx = co2(optax.adam(0.1), sync_every=2, axis_name=AXIS, staleness_penalty=gap_aware(0.1, 2))
    return local_runs.run(tx, replicas, 6, mode)


@pytest.mark.parametrize("mode", modes.MODES[1:])
@pytest.mark.parametrize("replicas", modes.REPLICAS)
def test_modes_agree(mode, replicas):
    for found, expected in zip(
        *map(jax.tree.leaves, (under(mode, replicas), under("vmap", replicas)))
    ):
        # The replicas' sum is taken in another order; Adam's steps are of size 0.1.
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_all_but_the_pending_difference_is_equal_to_the_bit():
    state = under("shard_map", 8)[1].exchange_state
    assert np.ptp(state.pending, axis=0).min() > 1e-3
    for leaf in jax.tree.leaves(state._replace(pending=())):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))


def test_the_all_reduce_does_not_wait_for_the_local_steps():
    exchange = co2_exchange(axis_name=AXIS)

    def one_round(state, params, gradients):
        message = exchange.begin(state)
        params, _ = jax.lax.scan(lambda p, g: (p - 0.1 * g, None), params, gradients)
        return exchange.finish(params, state, message)

    state = exchange.init(jnp.ones(3))
    traced = jax.make_jaxpr(one_round, axis_env=[(AXIS, 4)])(
        state, jnp.ones(3), jnp.ones((5, 3))
    ).jaxpr
    needs = {id(v): {v} for v in traced.invars}
    sums = []
    for equation in traced.eqns:
        inputs = set().union(*(needs.get(id(v), set()) for v in equation.invars))
        needs |= {id(v): inputs for v in equation.outvars}
        if equation.primitive.name.startswith("psum"):
            sums.append(inputs)
        else:
            assert "psum" not in local_runs.primitives(traced.replace(eqns=[equation]))
    pending = traced.invars[2]  # after `round` and `slow`
    assert sums == [{pending}]
    ends = needs[id(traced.outvars[0])]  # the new start needs the steps of the round before alone
    assert not ends & set(traced.invars[-2:])


def trajectory(replicas, **options):
    tx = co2(optax.sgd(0.1), sync_every=STEPS, axis_name=AXIS, **options)
    return local_runs.after_rounds(local_runs.run(tx, replicas, 12)[0], STEPS)


def test_first_round_holds_whatever_the_outer_step():
    found = trajectory(2, outer=optax.chain(optax.add_decayed_weights(0.1), optax.adam(0.1)))
    start = local_runs.problem(2)[0].astype(np.float32)
    # params + (start - params) rounds
    np.testing.assert_allclose(found[0], start, rtol=0, atol=5e-7)
    # Adam's first step is of its rate's size: its counter was held, too.
    np.testing.assert_allclose(np.abs(found[1] - start), 0.1, rtol=1e-3)


def test_an_infinite_bound_is_none_and_a_bound_of_zero_freezes():
    np.testing.assert_array_equal(trajectory(2, clip=jnp.inf), trajectory(2))
    start = local_runs.problem(2)[0].astype(np.float32)
    np.testing.assert_allclose(
        trajectory(2, clip=0.0), np.broadcast_to(start, (6, *start.shape)), rtol=0, atol=5e-7
    )


def test_without_inner_steps_nothing_moves():
    tx = co2(optax.sgd(0.0), sync_every=2, axis_name=AXIS, momentum=0.5)
    params, _ = local_runs.run(tx, 2, 8)
    start = local_runs.problem(2)[0].astype(np.float32)
    np.testing.assert_array_equal(params, np.broadcast_to(start[:, None], params.shape))


def test_plain_is_local_sgd_delayed_by_a_round():
    found = trajectory(1, momentum=0.0).astype(np.float64)
    gradient = local_runs.gradients(1)[0]
    starts = [local_runs.problem(1)[0][0], *found[:, 0]]
    for t in range(1, 6):
        moved = oracle.local_steps(starts[t - 1], gradient, STEPS, 0.1) - starts[t - 1]
        # float32 against float64, one round
        np.testing.assert_allclose(starts[t + 1], starts[t] + moved, rtol=0, atol=2e-6)


def test_staleness_needs_a_smaller_momentum():
    """On this quadratic a momentum of 0.8 converges if synchronous and diverges one round late."""
    curvature, eta, tau = 1.0, 0.1, 5
    gradients = [lambda x, c=c: curvature * (x - c) for c in (-1.0, 1.0)]

    def last(momentum, stale):
        run = oracle.rounds(
            np.array(3.0), gradients, number=60, tau=tau, eta=eta, mu=momentum, stale=stale
        )
        return abs(run[-1][0])

    assert last(0.8, stale=False) < 1e-2
    assert last(0.8, stale=True) > 3
    assert last(0.2, stale=True) < 1e-2

    tx = co2(optax.sgd(eta), sync_every=tau, axis_name=AXIS, momentum=0.8)
    run = modes.mapped("vmap", local_runs.trajectory(tx, 60 * tau), 2)
    params, _ = run(jnp.full(2, 3.0), jnp.full(2, curvature), jnp.array([-1.0, 1.0]))
    assert float(jnp.abs(params[0, -1])) > 3


def test_small_outer_steps_of_16_bit_parameters_are_not_lost():
    exchange = co2_exchange(axis_name=AXIS, learning_rate=2.0**-4, momentum=0.0)

    def rounds(params):
        state = exchange.init(params)
        for _ in range(17):  # the first has nothing to apply
            params = params + jnp.asarray(2.0**-6, jnp.bfloat16)
            params, state = exchange.finish(params, state, exchange.begin(state))
        return params, state.slow

    params, slow = modes.mapped("vmap", rounds, 2)(jnp.ones(2, jnp.bfloat16))
    assert (params.dtype, slow.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(slow, 1 + 16 * 2.0**-10)  # all sums are exact


def test_a_run_resumes_with_the_same_bits():
    exchange = co2_exchange(axis_name=AXIS, staleness_penalty=gap_aware(0.1, 2))

    def rounds(params, state, change):
        for _ in range(2):
            params, state = exchange.finish(params + change, state, exchange.begin(state))
        return params, state

    start, change = jnp.arange(8.0).reshape(4, 2), jnp.linspace(0, 1, 8).reshape(4, 2)
    step = modes.mapped("unchecked", rounds, 4)
    state = jax.vmap(exchange.init)(start)
    whole = step(*step(start, state, change), change)
    saved = jax.tree.map(lambda x: jnp.asarray(np.array(x)), step(start, state, change))
    for found, expected in zip(*map(jax.tree.leaves, (step(*saved, change), whole))):
        np.testing.assert_array_equal(found, expected)


def test_gap_aware_takes_a_schedule_of_local_steps():
    penalty = gap_aware(optax.exponential_decay(1.0, 4, 0.5), sync_every=4)
    assert [float(penalty(jnp.float32(2.0), jnp.int32(t))) for t in (0, 1)] == [1.5, 2.0]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda **o: co2_exchange(optax.sgd(1.0), momentum=0.2, **o), "either them or outer"),
        (lambda **o: co2_exchange(optax.sgd(1.0), clip=1.0, **o), "either them or outer"),
        (lambda **o: co2_exchange(learning_rate=-1.0, **o), "learning_rate must be non-negative"),
        (lambda **o: co2_exchange(momentum=1.0, **o), r"momentum must be in \[0, 1\), got 1.0"),
        (lambda **o: co2_exchange(clip=-1.0, **o), "clip must be non-negative, got -1.0"),
        (lambda **o: co2_exchange(staleness_penalty=0.0, **o), "staleness_penalty must be posi"),
        (lambda **o: co2(optax.sgd(1.0), sync_every=0, **o), "sync_every must be a positive"),
        (lambda **o: gap_aware(0.0, 4), "learning_rate must be positive, got 0.0"),
        (lambda **o: gap_aware(0.1, 0), "sync_every must be a positive integer, got 0"),
    ],
)
def test_refusals(make, match):
    with pytest.raises(ValueError, match=match):
        make(axis_name=AXIS)


def test_refuses_another_state():
    exchange = co2_exchange(axis_name=AXIS)
    for call in (exchange.begin, lambda state: exchange.finish(jnp.ones(2), state, jnp.ones(2))):
        with pytest.raises(TypeError, match="expected a state of type Co2State, got EmptyState"):
            call(optax.EmptyState())
