"""NoLoCo: the simulation, what couples replicas and what does not, and where it is stable."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab.distributed import pairing
from jaxopt_lab.distributed.diloco import diloco
from jaxopt_lab.distributed.noloco import largest_stable_gamma, noloco, noloco_exchange
from tests.distributed import local_runs, modes
from tests.oracles import noloco as oracle

AXIS = modes.AXIS
ROUNDS, STEPS = 20, 2


@functools.cache
def partners(replicas: int, seed: int = 0) -> list[list[int]]:
    """Returns who meets whom in each round, drawn as the documentation says."""
    table = pairing.matchings(replicas, seed=seed)
    keys = [jax.random.fold_in(jax.random.key(seed), count) for count in range(ROUNDS)]
    return [table[int(jax.random.randint(key, (), 0, len(table)))].tolist() for key in keys]


@pytest.mark.parametrize(
    ("replicas", "coupling"), [(1, 1.0), (2, 1.0), (3, 1.0), (4, 0.5), (8, 1.0), (8, 0.5)]
)
def test_follows_the_simulation(replicas, coupling):
    with jax.enable_x64(True):
        tx = noloco(optax.sgd(0.1), sync_every=STEPS, axis_name=AXIS, coupling=coupling)
        params, _ = local_runs.run(tx, replicas, ROUNDS * STEPS, dtype=jnp.float64)
        expected = oracle.rounds(
            local_runs.problem(replicas)[0],
            local_runs.gradients(replicas),
            partners(replicas),
            steps=STEPS,
            eta=0.1,
            gamma=0.7 * coupling,
        )
    # Both in double precision: sums in another order, over 40 steps.
    np.testing.assert_allclose(local_runs.after_rounds(params, STEPS), expected, rtol=0, atol=1e-12)


def test_one_payload_and_two_are_the_same_rule():
    def run(coupling):
        tx = noloco(optax.sgd(0.1), sync_every=STEPS, axis_name=AXIS, coupling=coupling)
        return local_runs.run(tx, 4, 10)[0]

    # An array for 1 is not known while tracing, and takes the path of two payloads.
    np.testing.assert_allclose(run(1.0), run(jnp.float32(1.0)), rtol=0, atol=1e-6)


@functools.cache
def under(mode, replicas):
    tx = noloco(optax.adam(0.1), sync_every=2, axis_name=AXIS)
    return local_runs.run(tx, replicas, 6, mode)


@pytest.mark.parametrize("mode", modes.MODES[1:])
@pytest.mark.parametrize("replicas", modes.REPLICAS)
def test_modes_agree(mode, replicas):
    for found, expected in zip(
        *map(jax.tree.leaves, (under(mode, replicas), under("vmap", replicas)))
    ):
        # What is sent is equal to the bit (test_pairing); Adam's steps are compiled differently.
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("coupling", [1.0, 0.5])
def test_the_only_collective_is_a_permute(coupling):
    tx = noloco(optax.adam(0.1), sync_every=2, axis_name=AXIS, coupling=coupling)
    traced = jax.make_jaxpr(local_runs.trajectory(tx, 2), axis_env=[(AXIS, 4)])(*[jnp.ones(3)] * 3)
    names = local_runs.primitives(traced.jaxpr)
    assert "ppermute" in names
    forbidden = ("psum", "pmax", "pmin", "all_gather", "all_to_all", "reduce_scatter")
    assert not [name for name in names if name.startswith(forbidden)]


def test_mean_is_that_of_heavy_ball_on_the_mean():
    replicas, mu, lr = 8, 0.5, 0.7
    exchange = noloco_exchange(axis_name=AXIS)
    generator = np.random.default_rng(0)
    changes = generator.normal(size=(replicas, 12, 3)).astype(np.float32)
    starts = generator.normal(size=(replicas, 3)).astype(np.float32)

    def rounds(start, changes):
        def one(carry, change):
            params, state = carry
            carry = exchange.finish(params + change, state, exchange.begin(state))
            return carry, carry[0]

        return jax.lax.scan(one, (start, exchange.init(start)), changes)[1]

    found = modes.mapped("vmap", rounds, replicas)(starts, changes)
    phi, m = starts.astype(np.float64).mean(0), np.zeros(3)
    for count in range(12):
        m = mu * m + lr * changes[:, count].mean(0)
        phi = phi + m
        # float32: values of size 5, 12 rounds
        np.testing.assert_allclose(np.mean(found[:, count], 0), phi, rtol=0, atol=5e-6)
    assert np.ptp(found[:, -1], axis=0).min() > 0.1  # and the replicas are not equal


def test_identical_replicas_do_what_diloco_does():
    start = local_runs.problem(4)[0]
    curvature, minimum = np.ones_like(start), np.zeros_like(start)

    def run(tx):
        mapped = modes.mapped("vmap", local_runs.trajectory(tx, 9), 4)
        return mapped(*(jnp.asarray(x, jnp.float32) for x in (start, curvature, minimum)))[0]

    found = run(noloco(optax.sgd(0.1), sync_every=3, axis_name=AXIS))
    outer = optax.sgd(0.7, momentum=0.5)
    expected = run(diloco(optax.sgd(0.1), outer, sync_every=3, axis_name=AXIS))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)  # rounding, nine steps


def test_without_coupling_and_outer_rate_replicas_stay():
    tx = noloco(optax.sgd(0.1), sync_every=2, axis_name=AXIS, learning_rate=0.0, coupling=0.0)
    _, state = local_runs.run(tx, 4, 4)
    np.testing.assert_array_equal(
        state.exchange_state.slow, local_runs.problem(4)[0].astype(np.float32)
    )


def test_two_replicas_agree_after_a_full_step():
    exchange = noloco_exchange(axis_name=AXIS, learning_rate=1.0, momentum=0.0)

    def one(start, change):
        state = exchange.init(start)
        return exchange.finish(start + change, state, exchange.begin(state))[0]

    found = modes.mapped("vmap", one, 2)(jnp.array([1.0, 5.0]), jnp.array([1.0, 3.0]))
    np.testing.assert_array_equal(found, [5.0, 5.0])  # mean start 3, mean change 2


def spread_after(momentum, gamma, rounds, replicas=64):
    """Returns by what the spread has grown without local steps (numpy, random pairs)."""
    generator = np.random.default_rng(0)
    phi = generator.normal(size=(replicas, 50))
    m, before = np.zeros_like(phi), phi.std(0).mean()
    for _ in range(rounds):
        order = generator.permutation(replicas)
        partner = np.empty(replicas, int)
        partner[order] = np.roll(order.reshape(2, -1), 1, axis=0).ravel()
        m = momentum * m + gamma * ((phi + phi[partner]) / 2 - phi)
        phi = phi + m
    return phi.std(0).mean() / before


@pytest.mark.parametrize(
    ("momentum", "largest"), [(0.0, 2.00), (0.3, 1.82), (0.5, 1.50), (0.9, 0.38)]
)
def test_region_of_stability(momentum, largest):
    assert round(largest_stable_gamma(momentum), 2) == largest
    # Close to the border the spread moves slowly: 10 % from it, 200 rounds.
    assert spread_after(momentum, 0.9 * largest, 200) < 0.5
    assert spread_after(momentum, 1.1 * largest, 200) > 2


def test_refuses_what_drifts_apart():
    with pytest.raises(
        ValueError, match=r"momentum=0\.9 and gamma = .* = 0\.7 the .* must be below 0\.38 at this"
    ):
        noloco_exchange(axis_name=AXIS, momentum=0.9)
    with pytest.raises(ValueError, match=r"momentum=0\.5 and gamma = .* = 1\.6 .* below 1\.5 at"):
        noloco_exchange(axis_name=AXIS, coupling=1.6 / 0.7)
    noloco_exchange(axis_name=AXIS, momentum=0.9, coupling=0.5)  # gamma 0.35


def test_small_outer_steps_of_16_bit_parameters_are_not_lost():
    exchange = noloco_exchange(axis_name=AXIS, learning_rate=2.0**-4, momentum=0.0)

    def one(carry, _):
        params, state = carry
        params = params + jnp.asarray(2.0**-6, jnp.bfloat16)
        return exchange.finish(params, state, exchange.begin(state)), None

    def rounds(params):
        start = params, exchange.init(params)
        (params, state), _ = jax.lax.scan(one, start, length=16)
        return params, state.slow

    params, slow = modes.mapped("vmap", rounds, 2)(jnp.ones(2, jnp.bfloat16))
    assert (params.dtype, slow.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(slow, 1 + 16 * 2.0**-10)  # all sums are exact


def test_a_round_without_local_steps_leaves_16_bit_replicas_alone():
    exchange = noloco_exchange(axis_name=AXIS)
    slow = jnp.full(2, 1 + 2.0**-12)  # not a bfloat16

    def one(slow):
        params = slow.astype(jnp.bfloat16)
        state = exchange.init(params)._replace(slow=slow)
        return exchange.finish(params, state, exchange.begin(state))[1].slow

    np.testing.assert_array_equal(modes.mapped("vmap", one, 2)(slow), slow)


def test_a_run_resumes_with_the_same_bits():
    exchange = noloco_exchange(axis_name=AXIS)

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
    assert whole[1].round.tolist() == [4] * 4


def test_another_outer_step():
    given = noloco(
        optax.sgd(0.1), optax.sgd(0.7, momentum=0.5), sync_every=STEPS, axis_name=AXIS, seed=3
    )
    default = noloco(optax.sgd(0.1), sync_every=STEPS, axis_name=AXIS, seed=3)
    other_pairs = noloco(optax.sgd(0.1), sync_every=STEPS, axis_name=AXIS, seed=4)
    found, expected, other = (local_runs.run(tx, 8, 6)[0] for tx in (given, default, other_pairs))
    np.testing.assert_array_equal(found, expected)
    assert (found != other).any()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"outer": optax.sgd(1.0), "learning_rate": 0.7}, ValueError, "either them or outer"),
        ({"outer": optax.sgd(1.0), "momentum": 0.5}, ValueError, "either them or outer"),
        ({"learning_rate": -0.1}, ValueError, "learning_rate must be non-negative, got -0.1"),
        ({"momentum": 1.0}, ValueError, r"momentum must be in \[0, 1\), got 1.0"),
        ({"coupling": -1.0}, ValueError, "coupling must be non-negative, got -1.0"),
        ({"seed": 0.5}, TypeError, "seed must be an integer, got float"),
    ],
)
def test_refusals(options, error, match):
    with pytest.raises(error, match=match):
        noloco_exchange(axis_name=AXIS, **options)


def test_refuses_another_state():
    exchange = noloco_exchange(axis_name=AXIS)
    with pytest.raises(TypeError, match="expected a state of type NolocoState, got EmptyState"):
        exchange.finish(jnp.ones(2), optax.EmptyState(), ())
