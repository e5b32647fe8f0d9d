"""What each method sends, counted from its program, is what its description says."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxopt_lab import distributed
from tests.distributed.modes import AXIS

N = 8
TREE = {
    "a": jax.ShapeDtypeStruct((1000, 25), jnp.float32),
    "b": jax.ShapeDtypeStruct((3,), jnp.float32),
}
SIZE = 25_003
MEAN = 2 * (N - 1) / N * 4 * SIZE  # of all entries in float32
LARGE = {"a": jax.ShapeDtypeStruct((25_000, 1000), jnp.float32)}


def sent(tx, tree=None, axis_sizes=None):
    def step(grads):
        return tx.update(grads, tx.init(grads), grads)

    tree = TREE if tree is None else tree
    return distributed.wire_bytes(step, tree, axis_sizes=axis_sizes or {AXIS: N})


def test_the_mean():
    found = sent(distributed.sync_gradients(AXIS))
    assert (found.least, found.peak) == (MEAN, MEAN)


def test_one_bit_adam():
    found = sent(distributed.one_bit_adam(1e-3, 10, AXIS))
    # Signs, padded to a multiple of 8 N, to those who average and back; and two scales.
    length = -(-SIZE // (8 * N)) * 8 * N
    assert found.least == 2 * (N - 1) / N * length / 8 + 2 * (N - 1) * 4
    assert found.peak == MEAN


def test_one_bit_adam_sends_a_twenty_fifth_for_25_million_parameters():
    found = sent(distributed.one_bit_adam(1e-3, 10, AXIS), LARGE)
    assert found.least <= found.peak / 25


@pytest.mark.parametrize("rounds", [1, 20])
def test_diloco_and_co2_send_one_mean_a_round(rounds):
    for method in (distributed.diloco, distributed.co2):
        found = sent(method(optax.adam(1e-3), sync_every=rounds, axis_name=AXIS))
        assert found.peak == MEAN
        assert found.average(rounds) == pytest.approx(MEAN / rounds)


@pytest.mark.parametrize(("coupling", "arrays"), [(1.0, 1), (0.5, 2)])
def test_noloco_sends_permutes_alone(coupling, arrays):
    tx = distributed.noloco(optax.adam(1e-3), sync_every=20, axis_name=AXIS, coupling=coupling)
    found = sent(tx)
    assert {c.kind for c in found.all_collectives()} == {"permute"}
    assert (found.least, found.peak) == (0, arrays * 4 * SIZE)


@pytest.mark.parametrize(("graph", "neighbours"), [("pairs", 1), ("ring", 2), ("torus", 4)])
def test_gossip_sends_its_weights_to_each_neighbour(graph, neighbours):
    # The most square torus of 9 has four neighbours each.
    tx = distributed.gossip(optax.sgd(1.0), axis_name=AXIS, graph=graph)
    assert sent(tx, axis_sizes={AXIS: 9}).peak == neighbours * 4 * SIZE


COMPRESSORS = {
    "top_k": (distributed.top_k(0.01), N - 1),
    "random_k": (distributed.random_k(0.01), 2 * (N - 1) / N),  # an all-reduce, without indices
    "sign": (distributed.sign(), N - 1),
    "int8": (distributed.stochastic_int8(), N - 1),
    "int4": (distributed.stochastic_int4(), N - 1),
}


@pytest.mark.parametrize("name", COMPRESSORS)
def test_feedback_sends_what_the_compressor_says(name):
    compressor, factor = COMPRESSORS[name]
    found = sent(distributed.ef21(compressor, AXIS))
    assert found.least == found.peak == pytest.approx(factor * compressor.payload_bytes(SIZE))


def test_powersgd_sends_two_factors_and_what_is_no_matrix():
    tx = distributed.powersgd(4, AXIS)
    assert sent(tx).peak == 2 * (N - 1) / N * 4 * (4 * (1000 + 25) + 3)


def test_two_phases_send_each_entry_twice():
    found = sent(distributed.error_feedback(distributed.sign(), AXIS, two_phase=True))
    # A sign an entry there and back, in parts of whole bytes with a scale each.
    part = math.ceil(math.ceil(SIZE / N) / 8) + 4
    assert found.peak == 2 * (N - 1) * part
