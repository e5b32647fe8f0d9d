"""The dropout mask: its rate, its independence, and that it depends on positions alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import dropout
from tests.pallas_kernels.attention import oracle

SIZE = 512


def draw(rate, seed=0, batch=2, heads=2):
    seeds = dropout.seeds(jax.random.key(seed), batch, heads)
    positions = jnp.arange(SIZE, dtype=jnp.int32)
    rows, keys = positions[None, None, :, None], positions[None, None, None, :]
    kept = dropout.keep(seeds[..., None, None], rows, keys, rate)
    return seeds, np.asarray(kept)


@pytest.mark.parametrize("rate", [1e-3, 0.1, 0.5, 0.99])
def test_rate(rate):
    _, kept = draw(rate)
    # Five standard deviations of a mean over a million independent draws.
    deviation = np.sqrt(rate * (1 - rate) / kept.size)
    assert abs((1 - kept.mean()) - rate) < 5 * deviation


def test_rows_columns_heads_and_seeds_are_independent():
    _, kept = draw(0.5)
    signs = 2.0 * kept - 1
    limit = 5 / np.sqrt(SIZE)  # of the correlation of two independent rows of signs
    for axes in ((2, 3), (3, 2)):
        x = np.moveaxis(signs, axes, (0, 1)).reshape(SIZE, -1)[:, :SIZE]
        correlation = x @ x.T / x.shape[1]
        np.fill_diagonal(correlation, 0)
        # The largest of 130,000 such correlations is at about 4.7 deviations.
        assert np.abs(correlation).max() < 1.3 * limit
        for shift in (1, 2, 4, 16, 64):
            assert abs((x[:, shift:] * x[:, :-shift]).mean()) < limit / np.sqrt(SIZE)
    flat = signs.reshape(4, -1)
    between = flat @ flat.T / flat.shape[1]
    np.fill_diagonal(between, 0)
    assert np.abs(between).max() < 5 / np.sqrt(flat.shape[1])
    _, other = draw(0.5, seed=1)
    assert abs(np.mean(signs * (2.0 * other - 1))) < 5 / np.sqrt(signs.size)


def test_tiles_are_parts_of_the_whole_and_equal_the_formula():
    seeds, kept = draw(0.3)
    rows = jnp.arange(100, 120, dtype=jnp.int32)[:, None]
    keys = jnp.arange(300, 340, dtype=jnp.int32)[None, :]
    tile = dropout.keep(seeds[1, 0], rows, keys, 0.3)
    np.testing.assert_array_equal(tile, kept[1, 0, 100:120, 300:340])
    np.testing.assert_array_equal(kept, oracle.kept(seeds, SIZE, SIZE, 0.3))
