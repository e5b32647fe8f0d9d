"""Tables of partners: each row a permutation, each pair its turn, and the spread they leave."""

from __future__ import annotations

import collections
import functools
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab.distributed import pairing
from tests.distributed import modes

AXIS = modes.AXIS


def pairs(table):
    return collections.Counter(
        frozenset((i, int(j))) for row in table for i, j in enumerate(row) if i < j
    )


@pytest.mark.parametrize("replicas", range(1, 18))
def test_round_robin_lets_each_pair_meet_once(replicas):
    table = pairing.round_robin(replicas)
    rounds = replicas - 1 + replicas % 2
    assert table.shape == (rounds, replicas)
    everyone = np.arange(replicas)
    for row in table:
        np.testing.assert_array_equal(row[row], everyone)
        assert (row == everyone).sum() == replicas % 2
    assert sorted(pairs(table).values()) == [1] * math.comb(replicas, 2)
    if replicas % 2:  # each sits out once
        np.testing.assert_array_equal(np.sort(np.argwhere(table == everyone)[:, 1]), everyone)


@pytest.mark.parametrize("replicas", [33, 34, 3072])
def test_many_replicas_draw_from_random_matchings(replicas):
    table = pairing.matchings(replicas, seed=1)
    assert table.shape == (32, replicas)
    everyone = np.arange(replicas)
    for row in table:
        np.testing.assert_array_equal(row[row], everyone)
        assert (row == everyone).sum() == replicas % 2
    assert len({row.tobytes() for row in table}) == 32
    np.testing.assert_array_equal(table, pairing.matchings(replicas, seed=1))
    assert (table != pairing.matchings(replicas, seed=2)).any()


def test_few_replicas_draw_from_the_round_robin():
    for replicas in (8, 31, 32):
        np.testing.assert_array_equal(pairing.matchings(replicas), pairing.round_robin(replicas))
    assert len(pairing.matchings(8, limit=6)) == 6


@pytest.mark.parametrize("replicas", [1, 2, 4, 8, 16])
def test_hypercube_reaches_the_mean_in_log2_rounds(replicas):
    x = np.arange(replicas) ** 2 * 1.0
    table = pairing.hypercube(replicas)
    assert len(table) == max(int(np.log2(replicas)), 1)
    mean = x.mean()
    for row in table:
        np.testing.assert_array_equal(row[row], np.arange(replicas))
        x = (x + x[row]) / 2
    np.testing.assert_array_equal(x, mean)  # small integers and powers of two: all sums are exact


@pytest.mark.parametrize("replicas", [1, 2, 3, 5, 8])
def test_exponential_shifts(replicas):
    table = pairing.exponential(replicas)
    assert len(table) == max(math.ceil(math.log2(replicas)), 1)
    for k, row in enumerate(table):
        np.testing.assert_array_equal((row - np.arange(replicas)) % replicas, 2**k % replicas)


@pytest.mark.parametrize(
    ("shape", "neighbours"),
    [((1,), 0), ((2,), 1), ((5,), 2), ((2, 3), 3), ((3, 4), 4), ((1, 7), 2)],
)
def test_torus(shape, neighbours):
    table = pairing.torus(shape)
    size = math.prod(shape)
    assert table.shape == (neighbours, size)
    place = np.stack(np.unravel_index(np.arange(size), shape))
    for row in table:
        np.testing.assert_array_equal(np.sort(row), np.arange(size))
        step = np.abs(place[:, row] - place)
        distance = np.minimum(step, np.array(shape)[:, None] - step).sum(0)
        np.testing.assert_array_equal(distance, 1)
    assert len({row.tobytes() for row in table}) == neighbours


@pytest.mark.parametrize(
    ("replicas", "shape"), [(1, (1, 1)), (7, (1, 7)), (12, (3, 4)), (16, (4, 4)), (3072, (48, 64))]
)
def test_most_square(replicas, shape):
    assert pairing.most_square(replicas) == shape


def test_a_random_pair_contracts_the_spread_by_the_known_factor():
    replicas = 8
    table = pairing.round_robin(replicas)
    x = np.random.default_rng(0).normal(size=replicas)
    x -= x.mean()
    # The mean over all rows is the expectation over a uniform row: exact, no sampling.
    found = np.mean([np.sum(((x + x[row]) / 2) ** 2) for row in table]) / np.sum(x**2)
    np.testing.assert_allclose(found, (replicas - 2) / (2 * (replicas - 1)), rtol=1e-12)


@functools.cache
def received(mode, replicas):
    table = pairing.matchings(replicas)

    def every_row(x):
        return jnp.stack(
            [pairing.exchange_with(x, index, table, AXIS) for index in range(len(table))]
        )

    return np.asarray(modes.mapped(mode, every_row, replicas)(jnp.arange(replicas)))


@pytest.mark.parametrize("mode", modes.MODES)
@pytest.mark.parametrize("replicas", modes.REPLICAS)
def test_exchange_with_sends_what_the_table_says(mode, replicas):
    np.testing.assert_array_equal(received(mode, replicas), pairing.matchings(replicas).T)


def test_random_partners_come_equally_often_and_from_the_seed():
    replicas, draws = 4, 600

    def partners(x, seed):
        return jax.vmap(lambda n: pairing.receive_from_random(x, n, AXIS, seed))(jnp.arange(draws))

    run = functools.partial(modes.mapped, "vmap")
    first = np.asarray(run(lambda x: partners(x, 0), replicas)(jnp.arange(replicas)))
    counts = np.bincount(first[0], minlength=replicas)
    assert counts[0] == 0
    # Three outcomes of 200 draws each, standard deviation 11.5: five of them.
    assert np.abs(counts[1:] - draws / 3).max() < 58
    other = np.asarray(run(lambda x: partners(x, 1), replicas)(jnp.arange(replicas)))
    assert (first != other).mean() > 0.5


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: pairing.round_robin(0), ValueError, "replicas must be a positive integer, got 0"),
        (lambda: pairing.round_robin(cast(Any, 2.0)), TypeError, "replicas must be a positive"),
        (lambda: pairing.matchings(8, limit=0), ValueError, "limit must be a positive integer"),
        (lambda: pairing.hypercube(6), ValueError, "power of two for a hypercube, got 6"),
        (lambda: pairing.torus(()), ValueError, "shape must have at least one dimension"),
        (lambda: pairing.torus((2, 0)), ValueError, "shape must be a positive integer, got 0"),
        (lambda: pairing.receive(0, np.arange(2), AXIS), ValueError, "'replica' is not bound"),
        (lambda: jax.vmap(lambda x: pairing.receive(x, np.array([0, 0]), AXIS), axis_name=AXIS)(
            jnp.ones(2)), ValueError, r"permutation of the 2 replicas .* got \[0, 0\]"),
    ],
)  # fmt: skip
def test_refusals(make, error, match):
    with pytest.raises(error, match=match):
        make()
