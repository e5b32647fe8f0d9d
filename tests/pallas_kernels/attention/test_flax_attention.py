"""The adapter to Flax's layers, against the functions that Flax uses itself."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pallas_kernels
from pallas_kernels import flax_attention_fn, make_flax_attention_fn

B, T, E, HEADS = 2, 12, 32, 4
X = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, E)), jnp.float32)


def nnx_layer(**options):
    return nnx.MultiHeadAttention(
        HEADS, E, decode=False, rngs=nnx.Rngs(0), **({"deterministic": True} | options)
    )


def masks():
    causal = nn.make_causal_mask(jnp.ones((B, T)))
    assert causal.dtype == jnp.float32, "Flax makes its masks of floats"
    return [None, causal, causal.astype(bool), nn.make_attention_mask(X[..., 0] > 0, X[..., 0] > 0)]


@pytest.mark.parametrize("index", range(3))
def test_nnx_layer(index):
    mask = masks()[index]
    want = nnx_layer()(X, mask=mask)
    got = nnx_layer(attention_fn=flax_attention_fn)(X, mask=mask)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("index", range(3))
def test_linen_layer_gets_its_mask(index):
    mask = masks()[index]
    plain = nn.MultiHeadDotProductAttention(HEADS)
    params = plain.init(jax.random.key(0), X)
    ours = nn.MultiHeadDotProductAttention(HEADS, attention_fn=flax_attention_fn)
    want, got = (layer.apply(params, X, mask=mask) for layer in (plain, ours))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    if mask is not None:
        assert not np.allclose(got, ours.apply(params, X))


def test_rows_without_a_key_are_zero():
    mask = masks()[3]
    q = jnp.ones((B, T, HEADS, 8))
    output = flax_attention_fn(q, q, q, mask=mask)
    empty = ~np.asarray(mask[:, 0], bool).any(-1)
    assert empty.any()
    assert (np.asarray(output)[empty] == 0).all()


def test_decoding_layers():
    plain, ours = (
        nnx.MultiHeadAttention(HEADS, E, decode=True, rngs=nnx.Rngs(0), **options)
        for options in ({}, {"attention_fn": flax_attention_fn})
    )
    for layer in (plain, ours):
        layer.init_cache((B, T, E))
    for t in range(3):
        want, got = (layer(X[:, t : t + 1]) for layer in (plain, ours))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_fixed_arguments():
    banded = make_flax_attention_fn(local_window_size=3, is_causal=True, logits_soft_cap=5.0)
    q, k, v = (
        jnp.asarray(np.random.default_rng(i).normal(size=(B, T, HEADS, 8))) for i in range(3)
    )
    want = pallas_kernels.attention(
        q, k, v, local_window_size=3, is_causal=True, logits_soft_cap=5.0
    )
    np.testing.assert_array_equal(banded(q, k, v), want)
    named = make_flax_attention_fn(implementation="reference")
    np.testing.assert_allclose(named(q, k, v), flax_attention_fn(q, k, v), rtol=1e-5, atol=1e-6)
    with pytest.raises(TypeError, match="'window' cannot be fixed here; expected some of config"):
        make_flax_attention_fn(window=3)
    with pytest.raises(TypeError, match="'mask' cannot be fixed"):
        make_flax_attention_fn(mask=None)


def test_dtypes_are_promoted_or_as_told():
    q = jnp.ones((B, T, HEADS, 8))
    half = q.astype(jnp.bfloat16)
    assert flax_attention_fn(q, half, half).dtype == jnp.float32
    assert flax_attention_fn(q, q, q, dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_dropout_may_be_shared_by_batch_and_heads():
    q = jnp.zeros((B, T, HEADS, T))
    v = jnp.broadcast_to(jnp.eye(T)[:, None], (B, T, HEADS, T))  # the output is the weights
    key = jax.random.key(0)

    def weights(**options):
        return flax_attention_fn(q, q, v, dropout_rng=key, dropout_rate=0.5, **options)

    shared, own = weights(), weights(broadcast_dropout=False)
    assert (shared == shared[:1, :, :1]).all()
    assert not (own == own[:1, :, :1]).all()
    assert 0.3 < (own == 0).mean() < 0.7
    np.testing.assert_allclose(weights(deterministic=True), 1 / T, rtol=1e-6)


def test_weights_that_are_sown_come_from_flax():
    layer = nn.MultiHeadDotProductAttention(HEADS, attention_fn=flax_attention_fn)
    params = layer.init(jax.random.key(0), X)
    _, sown = layer.apply(params, X, sow_weights=True, mutable=["intermediates"])
    assert jax.tree.leaves(sown)[0].shape == (B, HEADS, T, T)
    forward = nnx.capture(nnx_layer(attention_fn=flax_attention_fn), nnx.Intermediate)
    _, sown = forward(X, sow_weights=True)
    assert jax.tree.leaves(sown)[0].shape == (B, HEADS, T, T)
    capped = nn.MultiHeadDotProductAttention(
        HEADS, attention_fn=make_flax_attention_fn(logits_soft_cap=5.0)
    )
    with pytest.raises(NotImplementedError, match=r"module asks for .* know logits_soft_cap"):
        capped.apply(params, X, sow_weights=True, mutable=["intermediates"])
