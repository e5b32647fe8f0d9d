"""Gossip: every graph against numpy, what averaging keeps, and the corrected variance."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab.distributed import pairing
from jaxopt_lab.distributed.gossip import gossip, gossip_average, gossip_exchange
from tests.distributed import local_runs, modes
from tests.oracles import gossip as oracle

AXIS = modes.AXIS
ROUNDS = 5
GRAPHS = ("pairs", "ring", "torus", "exponential")


def models(replicas, shape=(4, 6)):
    return np.random.default_rng(replicas).normal(size=(replicas, *shape)).astype(np.float32)


@functools.cache
def rounds(mode, replicas, graph, corrected=False):
    """Returns the models after each of a few rounds."""

    def run(w):
        def one(w, count):
            w = gossip_average(w, count, axis_name=AXIS, graph=graph, variance_corrected=corrected)
            return w, w

        return jax.lax.scan(one, w, jnp.arange(ROUNDS))[1]

    found = modes.mapped(mode, run, replicas)(models(replicas))
    return np.swapaxes(np.asarray(found), 0, 1)


def members(graph, replicas, count):
    if graph != "pairs":
        return oracle.groups(graph, replicas, count, pairing.most_square(replicas))
    table = pairing.matchings(replicas)
    key = jax.random.fold_in(jax.random.key(0), count)
    row = table[int(jax.random.randint(key, (), 0, len(table)))]
    return [sorted({i, int(j)}) for i, j in enumerate(row)]


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize(
    ("replicas", "corrected"), [(1, False), (2, False), (3, True), (4, False), (8, True)]
)
def test_follows_the_simulation(graph, replicas, corrected):
    found, w = rounds("vmap", replicas, graph, corrected), models(replicas).astype(np.float64)
    for count in range(ROUNDS):
        groups = members(graph, replicas, count)
        w = oracle.average(w, groups, corrected=corrected, max_scale=np.sqrt(max(map(len, groups))))
        # float32 against float64; the correction takes variances of 24 entries
        np.testing.assert_allclose(found[count], w, rtol=0, atol=2e-6 if not corrected else 1e-5)


@pytest.mark.parametrize("mode", modes.MODES[1:])
@pytest.mark.parametrize("replicas", modes.REPLICAS)
def test_modes_agree(mode, replicas):
    found, expected = rounds(mode, replicas, "pairs"), rounds("vmap", replicas, "pairs")
    np.testing.assert_array_equal(found, expected)  # halves of sums of two: nothing to reorder


@pytest.mark.parametrize("graph", GRAPHS[1:])
@pytest.mark.parametrize("mode", modes.MODES[1:3])
def test_modes_agree_on_other_graphs(graph, mode):
    found, expected = rounds(mode, 8, graph), rounds("vmap", 8, graph)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)  # fused differently


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("replicas", [4, 8])
def test_mean_is_kept_and_the_spread_shrinks(graph, replicas):
    found, before = rounds("vmap", replicas, graph), models(replicas)
    # Sums of 8 float32 of size 1
    np.testing.assert_allclose(found.mean(1), [before.mean(0)] * ROUNDS, rtol=0, atol=1e-6)
    assert found[-1].std(0).mean() < 0.5 * before.std(0).mean()


def test_exponential_graph_gives_the_mean_in_log2_rounds():
    found = rounds("vmap", 8, "exponential")[2]
    np.testing.assert_allclose(found, [models(8).mean(0)] * 8, rtol=0, atol=1e-6)


@functools.cache
def corrected_once(replicas, graph="ring", **options):
    run = functools.partial(
        gossip_average, axis_name=AXIS, graph=graph, variance_corrected=True, **options
    )
    return modes.mapped("vmap", lambda w: run(w, 0), replicas)


def test_correction_keeps_the_variance_and_the_mean_of_the_entries():
    w = models(5, (64, 64))
    found = np.asarray(corrected_once(5, max_scale=10.0)(w))
    plain = oracle.average(w.astype(np.float64), oracle.groups("ring", 5, 0))
    for i in range(5):
        before = np.mean([w[j].var() for j in (i - 1, i, (i + 1) % 5)])
        # float32 sums of 4096 entries
        np.testing.assert_allclose(found[i].var(), before, rtol=1e-5)
        np.testing.assert_allclose(found[i].mean(), plain[i].mean(), rtol=0, atol=1e-6)
        assert plain[i].var() < 0.4 * before  # what is lost without it: 2/3


def test_correction_leaves_equal_models_as_they_are():
    w = np.stack([models(1, (8, 8))[0]] * 4)
    run = corrected_once(4, "pairs")
    x = w
    for _ in range(3):
        x = run(x)
    np.testing.assert_allclose(x, w, rtol=0, atol=1e-6)
    assert abs(float(np.var(x)) / float(np.var(w)) - 1) < 1e-6


def test_scale_is_bounded_and_constant_layers_stay():
    w = np.stack([models(1, (8, 8))[0], -models(1, (8, 8))[0] + np.float32(1e-4)])
    w[1, 0, 0] += np.float32(0.5)
    plain = w.mean(0)
    found = np.asarray(corrected_once(2, "pairs")(w))
    deviation = (found[0] - found[0].mean()) / (plain - plain.mean())
    np.testing.assert_allclose(deviation[0, 0], np.sqrt(2), rtol=1e-4)  # opposite models: bounded
    constant = np.stack([np.full((2, 2), 1.0), np.full((2, 2), 3.0)]).astype(np.float32)
    np.testing.assert_array_equal(corrected_once(2, "pairs")(constant), np.full((2, 2, 2), 2.0))


def test_mask_says_what_is_corrected():
    tree = {"kernel": models(2), "bias": models(2, (6,))}
    plain = jax.tree.map(lambda w: w.mean(0), tree)

    def unchanged(**options):
        found = corrected_once(2, "pairs", **options)(tree)
        return {k: bool(np.allclose(found[k][0], plain[k], atol=1e-6)) for k in tree}

    assert unchanged() == {"kernel": False, "bias": True}

    def only_bias(params):
        return {"kernel": False, "bias": True}

    assert unchanged(mask=only_bias) == {"kernel": True, "bias": False}


def test_given_shape_of_the_torus():
    def run(w):
        return gossip_average(w, 0, axis_name=AXIS, graph="torus", shape=(2, 2, 2))

    found = modes.mapped("vmap", run, 8)(models(8))
    expected = oracle.average(models(8), oracle.groups("torus", 8, 0, (2, 2, 2)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_transformation_steps_and_averages():
    tx = gossip(optax.sgd(0.1), 2, axis_name=AXIS, graph="ring")
    params, state = local_runs.run(tx, 4, 4)
    w, curvatures, minima = local_runs.problem(4)
    for step in range(4):
        w = w - 0.1 * curvatures * (w - minima)
        if step % 2:
            w = oracle.average(w, oracle.groups("ring", 4, 0))
        np.testing.assert_allclose(params[:, step], w, rtol=0, atol=2e-6)  # float32
    assert state.exchange_state.round.tolist() == [2] * 4


def test_16_bit_parameters_keep_their_dtype():
    w = models(2).astype(jnp.bfloat16)
    found = modes.mapped("vmap", lambda x: gossip_average(x, 0, axis_name=AXIS), 2)(w)
    assert found.dtype == jnp.bfloat16
    expected = w.astype(np.float32).mean(0).astype(jnp.bfloat16)
    np.testing.assert_array_equal(found[0].astype(np.float32), expected.astype(np.float32))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"graph": "star"}, ValueError, r"graph must be one of \('pairs', .* got 'star'"),
        ({"shape": (2, 2)}, ValueError, "shape is that of a torus, but graph is 'pairs'"),
        ({"graph": "torus", "shape": (0, 2)}, ValueError, "shape must be a positive integer"),
        ({"max_scale": 2.0}, ValueError, "those of variance_corrected, which is False"),
        ({"variance_corrected": True, "max_scale": 0.5}, ValueError, "at least 1, got 0.5"),
        ({"seed": "a"}, TypeError, "seed must be an integer, got str"),
    ],
)
def test_refusals(options, error, match):
    with pytest.raises(error, match=match):
        gossip_exchange(axis_name=AXIS, **options)


def test_refusals_while_tracing():
    run = functools.partial(gossip_average, axis_name=AXIS, count=0)
    with pytest.raises(ValueError, match="axis 'replica' is not bound"):
        run(jnp.ones(2))
    with pytest.raises(ValueError, match=r"multiply to the 3 replicas .* got \(2, 2\)"):
        modes.mapped("vmap", lambda x: run(x, graph="torus", shape=(2, 2)), 3)(jnp.ones(3))
    with pytest.raises(TypeError, match="dtype int32"):
        modes.mapped("vmap", run, 2)(jnp.arange(2))
    exchange = gossip_exchange(axis_name=AXIS)
    with pytest.raises(TypeError, match="expected a state of type GossipState, got EmptyState"):
        exchange.finish(jnp.ones(2), optax.EmptyState(), ())
