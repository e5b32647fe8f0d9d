"""The driver: what it refuses, what it hands on, and its states as data."""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxopt_lab import distributed
from jaxopt_lab.distributed import device_replicas, simulated_replicas, sync_gradients
from tests.distributed.modes import AXIS

N = 2
KINDS = {
    "devices": lambda count=N: device_replicas(devices=jax.devices()[:count]),
    "simulated": lambda count=N: simulated_replicas(count),
}
DATA = np.random.default_rng(0).normal(size=(N, 3, 4)).astype(np.float32)
each_kind = pytest.mark.parametrize("kind", KINDS)


def loss(params, batch):
    return jnp.mean((batch @ params - 1.0) ** 2)


def sync(*links):
    return optax.chain(sync_gradients(AXIS), *links)


@each_kind
def test_data_of_another_number_of_replicas_are_refused_by_every_function(kind):
    two, tx = KINDS[kind](), distributed.gossip(optax.sgd(0.1), axis_name=AXIS)
    state = two.init(tx, jnp.ones(4))
    wanted = "expected the 2 replicas as its leading axis"
    for batch in (DATA.reshape(6, 4), np.concatenate([DATA, DATA])):
        with pytest.raises(ValueError, match=rf"batch has shape .*; {wanted}"):
            two.train_step(loss, tx)(state, batch)
        with pytest.raises(ValueError, match=rf"argument 0 'x' has shape .*; {wanted}"):
            two.map(lambda tree: tree["x"])({"x": batch})
        for function in (two.consensus, two.check_equal):
            with pytest.raises(ValueError, match=rf"leaf 'x' has shape .*; {wanted}"):
                function({"x": batch})
    four = jax.tree.map(np.array, KINDS["simulated"](4).init(tx, jnp.ones(4)))
    with pytest.raises(ValueError, match=rf"state 'params' has shape \(4, 4\); {wanted}"):
        two.train_step(loss, tx)(four, DATA)
    rounds = distributed.train_rounds(
        two, loss, optax.sgd(0.1), distributed.gossip_exchange(axis_name=AXIS), 1
    )
    with pytest.raises(ValueError, match=rf"state 'params' has shape \(4, 4\); {wanted}"):
        rounds.step(four, DATA[:, None])
    stacked = state._replace(opt_state=state.opt_state._replace(count=jnp.zeros(2, jnp.int32)))
    with pytest.raises(ValueError, match=r"'opt_state/count' has shape \(2,\); expected \(\)"):
        two.train_step(loss, tx)(stacked, DATA)


@pytest.mark.parametrize(
    "make",
    [
        lambda: distributed.one_bit_adam(0.1, 2, AXIS),
        lambda: distributed.error_feedback(distributed.sign(), AXIS, two_phase=True),
    ],
)
def test_a_part_of_a_vector_of_other_replicas_is_named(make):
    tx = make()
    states = jax.vmap(tx.init, axis_name=AXIS)(jnp.ones((4, 20)))
    two = jax.tree.map(lambda x: x[:2], states)

    def update(g, state):
        return tx.update(g, state, g)[0]

    with pytest.raises(ValueError, match=r"server_error has shape .*; expected .* of the 2"):
        jax.vmap(update, axis_name=AXIS)(jnp.ones((2, 20)), two)


@each_kind
def test_an_exchange_in_a_branch_that_replicas_choose_for_themselves_is_refused(kind):
    replicas = KINDS[kind]()

    def refused(tx, match):
        state = replicas.init(tx, jnp.ones(4))
        with pytest.raises(ValueError, match=match):
            replicas.train_step(loss, tx)(state, replicas.shard(DATA))

    own = "a branch that each of them chooses"
    refused(optax.apply_if_finite(sync(optax.adam(0.1)), 5), rf"{own}.*distributed.apply_if_finite")
    refused(
        optax.MultiSteps(
            distributed.one_bit_adam(0.1, 2, AXIS), 2, should_skip_update_fn=optax.skip_not_finite
        ).gradient_transformation(),
        rf"{own}.*optax.MultiSteps with a should_skip_update_fn",
    )
    # Nothing is exchanged here, but the counters would differ.
    skip: Any = lambda g, *_: (g[0] > 0, ())  # noqa: E731
    by_value = optax.MultiSteps(
        optax.sgd(0.1), 2, should_skip_update_fn=skip
    ).gradient_transformation()
    refused(by_value, "counter 'mini_step', which all replicas share")


@pytest.mark.parametrize(
    "search", [optax.scale_by_zoom_linesearch(5), optax.scale_by_backtracking_linesearch(5)]
)
def test_a_line_search_behind_an_exchange_is_refused_by_name(search):
    replicas, tx = simulated_replicas(N), sync(optax.chain(optax.sgd(0.1), search))
    state = replicas.init(tx, jnp.ones(4))
    with pytest.raises(ValueError, match=r"a line search of optax .* inside diloco"):
        replicas.train_step(loss, tx)(state, DATA)


@pytest.mark.parametrize(
    "dtype", ["bool", "int4", "uint8", "float8_e4m3fn", "bfloat16", "complex64"]
)
def test_leaves_of_every_dtype_are_compared(dtype):
    replicas = simulated_replicas(2)
    values = jnp.array([[0, 1], [0, 1]]).astype(dtype)
    replicas.check_equal(values)
    with pytest.raises(ValueError, match="differs between replica 0 and replica 1"):
        replicas.check_equal(values.at[1, 1].set(values[0, 0]))


@each_kind
def test_local_rules_may_decide_for_themselves(kind):
    replicas = KINDS[kind]()
    skipping = optax.MultiSteps(
        optax.sgd(0.1), 1, should_skip_update_fn=optax.skip_not_finite
    ).gradient_transformation()
    inner = optax.chain(optax.apply_if_finite(optax.identity(), 5), skipping)
    tx = distributed.diloco(inner, sync_every=2, axis_name=AXIS)
    state, step = replicas.init(tx, jnp.ones(4)), replicas.train_step(loss, tx)
    bad = DATA.copy()
    bad[1, 0, 0] = np.nan
    state, _ = step(state, replicas.shard(bad))
    state, _ = step(state, replicas.shard(DATA))
    replicas.check_equal(state.opt_state.exchange_state)
    # An update leads to the exchange's result but for the rounding of one sum.
    np.testing.assert_allclose(state.params[0], state.params[1], rtol=1e-6)
    assert np.all(np.isfinite(state.params))
    np.testing.assert_array_equal(state.opt_state.inner_state[0].total_notfinite, [0, 1])


@each_kind
def test_states_with_counters_and_keys_are_compared_and_averaged(kind):
    replicas = KINDS[kind]()
    tx = distributed.diloco(
        optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.adam(0.1)),
        sync_every=2,
        axis_name=AXIS,
    )
    state, step = replicas.init(tx, jnp.ones(4)), replicas.train_step(loss, tx)
    for _ in range(2):
        state, _ = step(state, replicas.shard(DATA))
    found = replicas.consensus(state)
    assert (int(found.opt_state.count), type(found.opt_state.count)) == (2, np.ndarray)
    assert jnp.issubdtype(found.opt_state.inner_state[0].rng_key.dtype, jax.dtypes.prng_key)
    replicas.check_equal(state.opt_state.exchange_state)
    with pytest.raises(ValueError, match=r"'inner_state/1/0/mu' differs between replica 0 and"):
        replicas.check_equal(state.opt_state)


@each_kind
def test_typed_keys_are_data(kind):
    replicas = KINDS[kind]()
    keys = jax.random.split(jax.random.key(1), N)
    batch = replicas.shard({"x": DATA, "dropout": keys})
    assert batch["dropout"].dtype == keys.dtype
    drawn = replicas.map(lambda b: jax.random.uniform(b["dropout"]))(batch)
    np.testing.assert_array_equal(drawn, jax.vmap(jax.random.uniform)(keys))
    first = replicas.consensus(batch)["dropout"]
    np.testing.assert_array_equal(jax.random.key_data(first), jax.random.key_data(keys[0]))
    with pytest.raises(ValueError, match="'dropout' differs between replica 0 and replica 1"):
        replicas.check_equal({"dropout": batch["dropout"]})
    replicas.check_equal(replicas.replicate({"key": jax.random.key(3)}))


@each_kind
def test_a_state_is_described_without_being_made(kind):
    replicas = KINDS[kind]()
    tx = distributed.diloco(optax.adam(0.1), sync_every=2, axis_name=AXIS)
    made = replicas.init(tx, jnp.ones(4))
    rounds = distributed.train_rounds(
        replicas, loss, optax.adam(0.1), distributed.diloco_exchange(axis_name=AXIS), 2
    )
    shape = jax.ShapeDtypeStruct((4,), jnp.float32)
    for described in (
        jax.eval_shape(lambda p: replicas.init(tx, p), jnp.ones(4)),
        jax.eval_shape(rounds.init, shape),
        replicas.init(tx, shape),
        rounds.init(shape),
    ):
        assert jax.tree.structure(described) == jax.tree.structure(made)
        for a, b in zip(jax.tree.leaves(described), jax.tree.leaves(made)):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
    if kind == "devices":
        for a, b in zip(jax.tree.leaves(replicas.init(tx, shape)), jax.tree.leaves(made)):
            assert a.sharding.is_equivalent_to(b.sharding, b.ndim)


@each_kind
def test_a_rule_is_given_the_mean_loss(kind):
    replicas = KINDS[kind]()
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1, accumulation_size=1)
    tx = sync(optax.sgd(0.0), plateau)
    state, step = replicas.init(tx, jnp.ones(4)), replicas.train_step(loss, tx)
    for _ in range(3):
        state, losses = step(state, replicas.shard(DATA))
    found = state.opt_state[2]
    np.testing.assert_allclose(found.best_value, [np.mean(losses)] * 2, rtol=1e-6)
    assert np.all(found.scale == found.scale[0])
    assert found.scale[0] < 1


@each_kind
def test_local_rules_are_given_their_own_loss(kind):
    replicas = KINDS[kind]()

    def note(g: Any, state: Any, p: Any = None, *, value: Any, grad: Any, value_fn: Any, **_: Any):
        return g, jnp.stack([value, value_fn(p), grad[0]])

    seen = optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(3), cast(Any, note))
    tx = distributed.gossip(optax.chain(optax.sgd(0.0), seen), axis_name=AXIS)
    state, losses = replicas.train_step(loss, tx)(
        replicas.init(tx, jnp.ones(4)), replicas.shard(DATA)
    )
    found = state.opt_state.inner_state[1]
    np.testing.assert_allclose(found[:, 0], losses, rtol=1e-6)
    np.testing.assert_allclose(found[:, 1], losses, rtol=1e-6)
    own = jax.vmap(jax.grad(loss), (None, 0))(jnp.ones(4), DATA)
    np.testing.assert_allclose(found[:, 2], own[:, 0], rtol=1e-5)


def test_batch_statistics_of_an_nnx_module_are_handed_on():
    graph, params, rest = nnx.split(
        nnx.BatchNorm(4, momentum=0.5, rngs=nnx.Rngs(0)), nnx.Param, ...
    )

    def with_statistics(params, rest, batch):
        norm = nnx.merge(graph, params, rest)
        return jnp.mean(norm(batch) ** 3), nnx.split(norm, nnx.Param, ...)[2]

    replicas, tx = simulated_replicas(N), sync(optax.sgd(0.1))
    state, step = replicas.init(tx, params, rest), replicas.train_step(with_statistics, tx)
    for _ in range(2):
        state, _ = step(state, DATA)
    np.testing.assert_allclose(state.mutable["mean"][...], 0.75 * DATA.mean(axis=1), rtol=1e-5)


def test_means_that_nobody_asks_for_are_not_sent():
    replicas = device_replicas(devices=jax.devices()[:N])
    tx = sync(optax.sgd(0.1))
    state = jax.eval_shape(lambda: replicas.init(tx, jnp.ones(4)))
    found = distributed.wire_bytes(replicas.train_step(loss, tx), state, DATA)
    assert found.by_kind() == {"all-reduce": 2 * (N - 1) / N * 16}


@each_kind
@pytest.mark.parametrize("has_aux", [False, True])
def test_batch_statistics_are_handed_on(kind, has_aux):
    replicas = KINDS[kind]()

    def with_statistics(params, statistics, batch):
        mean = 0.5 * statistics["mean"] + 0.5 * jnp.mean(batch, axis=0)
        rest = {"mean": mean}
        return loss(params, batch - mean), (rest, batch[0, 0]) if has_aux else rest

    tx = sync(optax.sgd(0.1))
    state = replicas.init(tx, jnp.ones(4), {"mean": jnp.zeros(4)})
    step = replicas.train_step(with_statistics, tx, has_aux=has_aux)
    for _ in range(2):
        state, values = step(state, replicas.shard(DATA))
    own = 0.75 * DATA.mean(axis=1)
    np.testing.assert_allclose(state.mutable["mean"], own, rtol=1e-5)
    np.testing.assert_allclose(
        replicas.consensus(state.mutable)["mean"], own.mean(axis=0), rtol=1e-5
    )
    replicas.check_equal(state.params)
    if has_aux:
        np.testing.assert_array_equal(values[1], DATA[:, 0, 0])

    rounds = distributed.train_rounds(
        replicas,
        with_statistics,
        optax.sgd(0.1),
        distributed.diloco_exchange(axis_name=AXIS),
        2,
        has_aux=has_aux,
    )
    state, _ = rounds.step(
        rounds.init(jnp.ones(4), {"mean": jnp.zeros(4)}),
        replicas.shard(np.stack([DATA, DATA], axis=1)),
    )
    np.testing.assert_allclose(state.mutable["mean"], own, rtol=1e-5)


def test_statistics_that_change_their_shape_are_refused():
    replicas, tx = simulated_replicas(N), sync(optax.sgd(0.1))
    state = replicas.init(tx, jnp.ones(4), {"mean": jnp.zeros(4)})
    step = replicas.train_step(lambda p, s, b: (loss(p, b), {"mean": s["mean"][:2]}), tx)
    with pytest.raises(ValueError, match=r"'mean' has shape \(2,\).* mutable"):
        step(state, DATA)


# Token means over unequal numbers of tokens.
TOKENS = np.array([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]], np.float32)


def token_mean(params, batch):
    x, mask = batch
    return jnp.sum(mask * (x @ params - 1.0) ** 2) / jnp.sum(mask)


def gradient_over_all_tokens(params):
    return jax.grad(token_mean)(params, (DATA.reshape(-1, 4), TOKENS.reshape(-1)))


@each_kind
@pytest.mark.parametrize("method", ["sync", "int8", "powersgd"])
def test_weights_give_the_gradient_over_all_tokens(kind, method):
    exchange: Any = {
        "sync": sync_gradients(AXIS),
        "int8": distributed.error_feedback(distributed.identity(), AXIS),
        "powersgd": distributed.powersgd(1, AXIS),
    }[method]
    replicas, tx = KINDS[kind](), optax.chain(exchange, optax.sgd(1.0))
    step = replicas.train_step(token_mean, tx, weight=lambda batch: jnp.sum(batch[1]))
    state, _ = step(replicas.init(tx, jnp.ones(4)), replicas.shard((DATA, TOKENS)))
    expected = 1.0 - gradient_over_all_tokens(jnp.ones(4))
    # Two roundings of float32, of the shares and of the sum.
    np.testing.assert_allclose(state.params, [expected] * 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("checked", [True, False])
def test_a_weight_is_an_extra_argument_of_an_update(checked):
    mesh = jax.make_mesh((N,), (AXIS,), (jax.sharding.AxisType.Auto,))
    tx = sync(optax.scale(1.0))

    def mean(params, x, mask):
        gradient = jax.grad(token_mean)(distributed.vary(params, AXIS), (x[0], mask[0]))
        return tx.update(gradient, tx.init(params), params, weight=jnp.sum(mask, dtype=int))[0]

    found: Any = jax.shard_map(
        mean,
        mesh=mesh,
        in_specs=(jax.P(), jax.P(AXIS), jax.P(AXIS)),
        out_specs=jax.P(),
        check_vma=checked,
    )(jnp.ones(4), DATA, TOKENS)
    expected = gradient_over_all_tokens(jnp.ones(4))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        lambda: distributed.compressed_mean(distributed.stochastic_int8(), AXIS),
        lambda: distributed.error_feedback(distributed.top_k(0.5), AXIS),
        lambda: distributed.error_feedback(distributed.sign(), AXIS, two_phase=True),
        lambda: distributed.ef21(distributed.top_k(0.5), AXIS),
        lambda: distributed.econtrol(distributed.top_k(0.5), AXIS),
        lambda: distributed.powersgd(1, AXIS),
        lambda: distributed.scale_by_one_bit_adam(1, AXIS),
        lambda: sync_gradients(AXIS),
    ],
    ids=["mean", "feedback", "two_phase", "ef21", "econtrol", "powersgd", "one_bit", "sync"],
)
def test_every_exchange_takes_a_weight(method):
    gradients = jax.random.normal(jax.random.key(0), (N, 2, 4, 6))
    tokens = jnp.array([3.0, 1.0])

    def run(weighted):
        def steps(gs, own):
            state = method().init(gs[0])
            found = []
            for g in gs:
                if weighted:
                    updates, state = method().update(g, state, g, weight=own)
                else:
                    updates, state = method().update(N * own / 4.0 * g, state, g)
                found.append(updates)
            return jnp.stack(found)

        return jax.vmap(steps, axis_name=AXIS)(gradients, tokens)

    # Factors of 3/2 and 1/2: nothing is rounded in another place.
    np.testing.assert_array_equal(run(True), run(False))


def test_a_replica_without_tokens_takes_no_part():
    def mean(g, weight):
        tx = sync_gradients(AXIS)
        return tx.update(g, tx.init(g), weight=weight)[0]

    mapped: Any = jax.vmap(mean, axis_name=AXIS)
    gradients = jnp.array([2.0, jnp.nan])
    np.testing.assert_array_equal(mapped(gradients, jnp.array([3, 0])), [2.0, 2.0])
    np.testing.assert_array_equal(mapped(gradients, jnp.array([0, 0])), [0.0, 0.0])
    assert np.all(np.isnan(mapped(gradients, jnp.array([3, 1]))))


def test_a_weight_that_is_not_finite_is_not_swallowed():
    tx = sync_gradients(AXIS)

    def mean(g, weight):
        return tx.update(g, optax.EmptyState(), weight=weight)[0]

    for bad in (np.nan, np.inf):
        found: Any = jax.vmap(mean, axis_name=AXIS)(jnp.ones(2), jnp.array([bad, 1.0]))
        assert np.all(np.isnan(found))


def test_weights_that_cannot_be_used_are_refused():
    tx = sync_gradients(AXIS, "sum")
    with pytest.raises(ValueError, match='weight is that of a mean, but op is "sum"'):
        jax.vmap(lambda g: tx.update(g, optax.EmptyState(), weight=1.0)[0], axis_name=AXIS)(
            jnp.ones(2)
        )
    tx = sync_gradients(AXIS)
    with pytest.raises(ValueError, match=r"weight must have shape \(\)"):
        jax.vmap(lambda g: tx.update(g, optax.EmptyState(), weight=g)[0], axis_name=AXIS)(
            jnp.ones((2, 3))
        )
    mesh = jax.make_mesh((N,), (AXIS,), (jax.sharding.AxisType.Auto,))

    def summed(params, x):
        gradient = jax.grad(loss)(params, x)
        return tx.update(gradient, optax.EmptyState(), weight=1.0)[0]

    with pytest.raises(ValueError, match=r"sync_gradients with a weight: the gradient .* the same"):
        jax.shard_map(summed, mesh=mesh, in_specs=(jax.P(), jax.P(AXIS)), out_specs=jax.P())(
            jnp.ones(4), DATA
        )
    local = distributed.diloco(optax.sgd(0.1), sync_every=2, axis_name=AXIS)
    replicas = simulated_replicas(N)
    step = replicas.train_step(loss, local, weight=lambda batch: 1.0)
    with pytest.raises(ValueError, match="weight is that of a mean over replicas in each step"):
        step(replicas.init(local, jnp.ones(4)), DATA)


def test_bad_arguments():
    with pytest.raises(TypeError, match="axis_name must be text"):
        device_replicas(("a", "b"))  # pyright: ignore
    with pytest.raises(TypeError, match="axis_name must be text"):
        simulated_replicas(2, None)  # pyright: ignore
    for devices in ([], [jax.devices()[0]] * 2):
        with pytest.raises(ValueError, match="devices must be different devices, at least one"):
            device_replicas(devices=devices)
    replicas = simulated_replicas(2)
    with pytest.raises(TypeError, match="tx must be an optax"):
        replicas.init(optax.adam, jnp.ones(3))  # pyright: ignore
    with pytest.raises(TypeError, match="tx must be an optax"):
        replicas.train_step(loss, optax.adam)  # pyright: ignore
    with pytest.raises(TypeError, match="loss must be a function, got GradientTransformation"):
        replicas.train_step(optax.adam(0.1), loss)  # pyright: ignore
    with pytest.raises(TypeError, match="weight must be a function, got float"):
        replicas.train_step(loss, sync(optax.adam(0.1)), weight=0.5)  # pyright: ignore
