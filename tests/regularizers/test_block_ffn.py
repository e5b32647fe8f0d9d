"""BlockFFN's objectives: the numbers of the specification, and definitions in numpy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab import regularizers

SCORES = np.array(
    [[1, -1, 0.5, -2], [0.5, 0.2, -1, -1], [2, -0.1, -0.2, -0.3], [0, 1, 1, -1]], np.float64
)
ACTIVE = np.maximum(SCORES, 0)


def test_numbers_of_the_specification():
    with jax.enable_x64(True):
        found = regularizers.chunk_sparsity_loss(jnp.asarray(ACTIVE), 4, eps=0.0)
        np.testing.assert_allclose(found, 0.5773809524, atol=1e-10)
        assert float(regularizers.token_sparsity(jnp.asarray(ACTIVE))) == 0.5625
        for chunk in (2, 4):
            assert float(regularizers.chunk_sparsity(jnp.asarray(ACTIVE), chunk)) == 0.25
        locality = functools.partial(regularizers.activation_locality_loss, steep=1.0)
        np.testing.assert_allclose(locality(jnp.asarray(SCORES)), 0.7517661639, atol=1e-10)
        equal = jnp.asarray(SCORES[:1].repeat(4, 0))
        np.testing.assert_allclose(locality(equal), 0.5481468479, atol=1e-10)


def test_steeper_is_as_larger_scores():
    with jax.enable_x64(True):
        scores = jnp.asarray(SCORES)
        found = regularizers.activation_locality_loss(scores, steep=3.0)
        want = regularizers.activation_locality_loss(3 * scores, steep=1.0)
        np.testing.assert_allclose(found, want, rtol=1e-12)


def definition(active: np.ndarray, chunk: int, mask: np.ndarray, eps: float) -> float:
    p = active / (active.sum(-1, keepdims=True) + eps)
    chunks = [p[i : i + chunk][mask[i : i + chunk]] for i in range(0, len(p), chunk)]
    return float(np.mean([1 - np.exp(np.log(1 - q + eps).sum(0)) for q in chunks if len(q)]))


@pytest.mark.parametrize("chunk", [1, 3, 4, 8, 20])
def test_chunk_sparsity_loss_is_its_definition(chunk):
    rng = np.random.default_rng(0)
    active = np.maximum(rng.normal(size=(11, 6)), 0)
    mask = rng.random(11) < 0.7
    with jax.enable_x64(True):
        for some in (np.ones(11, bool), mask):
            found = regularizers.chunk_sparsity_loss(jnp.asarray(active), chunk, jnp.asarray(some))
            np.testing.assert_allclose(found, definition(active, chunk, some, 1e-5), rtol=1e-12)
        padded = np.concatenate([active, np.ones((2 * chunk, 6))])
        longer = np.concatenate([mask, np.zeros(2 * chunk, bool)])
        found = regularizers.chunk_sparsity_loss(jnp.asarray(padded), chunk, jnp.asarray(longer))
        np.testing.assert_allclose(found, definition(padded, chunk, longer, 1e-5), rtol=1e-12)
        assert not regularizers.chunk_sparsity_loss(jnp.asarray(active), chunk, jnp.zeros(11, bool))
        whole = regularizers.chunk_sparsity_loss(jnp.asarray(active), chunk)
        stacked = regularizers.chunk_sparsity_loss(jnp.asarray(active)[None].repeat(2, 0), chunk)
        np.testing.assert_allclose(stacked, whole, rtol=1e-12)


def test_neighbours_are_of_one_segment_and_both_have_gradients():
    segments = jnp.array([0, 0, 1, 1])
    with jax.enable_x64(True):
        locality = functools.partial(regularizers.activation_locality_loss, steep=2.0)
        scores = jnp.asarray(SCORES)
        halves = [locality(scores[:2]), locality(scores[2:])]
        np.testing.assert_allclose(locality(scores, segments), np.mean(halves), rtol=1e-12)
        slope = jax.grad(locality)(scores, segments)
        assert (np.asarray(slope) != 0).all()
        assert float(locality(scores, jnp.arange(4))) == 0


def test_gradients_are_finite_with_steep_scores_and_no_active_expert():
    scores = jnp.asarray(100 * SCORES, jnp.float32)
    assert np.isfinite(jax.grad(regularizers.activation_locality_loss)(scores)).all()
    active = jnp.asarray(ACTIVE, jnp.bfloat16).at[1].set(0)
    slope = jax.grad(lambda x: regularizers.chunk_sparsity_loss(x, 2))(active)
    assert slope.dtype == jnp.bfloat16
    assert np.isfinite(slope.astype(jnp.float32)).all()


def test_what_is_not_finite_is_not_lost():
    bad = jnp.asarray(ACTIVE, jnp.float32).at[1, 1].set(jnp.nan)
    assert np.isnan(regularizers.chunk_sparsity_loss(bad, 2))
    assert np.isnan(regularizers.activation_locality_loss(bad))


def test_sparsity_falls_with_the_length_of_chunks():
    rng = np.random.default_rng(1)
    active = jnp.asarray(np.maximum(rng.normal(size=(32, 16)) - 1, 0), jnp.float32)
    shares = [float(regularizers.chunk_sparsity(active, n)) for n in (1, 2, 4, 8, 32)]
    assert shares[0] == pytest.approx(float(regularizers.token_sparsity(active)))
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[-1]


@pytest.mark.parametrize(
    ("latest", "factor"), [(0.1, 0.25), (0.2, 0.5), (0.202, 0.5125), (0.4, 1.0)]
)
def test_factor_follows_the_loss_and_rises_by_a_fortieth_at_least(latest, factor):
    assert regularizers.adaptive_factor(0.5, latest, 0.2) == pytest.approx(factor)
