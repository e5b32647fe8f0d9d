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
from tests.pallas_kernels.attention.cases import at_once

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
    want = at_once(nnx_layer(), X, mask=mask)
    got = at_once(nnx_layer(attention_fn=flax_attention_fn), X, mask=mask)
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


STEPS = 5


def steps_of_nnx(attention_fn, **options):
    """Returns what a layer gives for a whole sequence, and token by token."""
    x = X[:, :STEPS]
    layers = [
        nnx.MultiHeadAttention(HEADS, E, decode=decode, rngs=nnx.Rngs(0), attention_fn=attention_fn)
        for decode in (False, True)
    ]
    layers[1].init_cache(x.shape)
    step = nnx.jit(lambda layer, token: layer(token, **options))
    steps = [step(layers[1], x[:, t : t + 1]) for t in range(STEPS)]
    return layers[0](x, **options), jnp.concatenate(steps, axis=1)


def steps_of_linen(attention_fn):
    whole = nn.MultiHeadDotProductAttention(HEADS, attention_fn=attention_fn)
    layer = nn.MultiHeadDotProductAttention(HEADS, attention_fn=attention_fn, decode=True)
    x = X[:, :STEPS]
    variables = layer.init(jax.random.key(0), x)
    params, cache = variables["params"], {"cache": variables["cache"]}
    apply = jax.jit(lambda cache, x: layer.apply({"params": params, **cache}, x, mutable=["cache"]))
    steps = []
    for t in range(STEPS):
        step, cache = apply(cache, x[:, t : t + 1])
        steps.append(step)
    return whole.apply({"params": params}, x), jnp.concatenate(steps, axis=1)


FIXED = (
    {"is_causal": True},
    {"is_causal": True, "local_window_size": 2},
    {"local_window_size": (1, 0), "implementation": "reference"},
)


@pytest.mark.parametrize("fixed", FIXED, ids=str)
@pytest.mark.parametrize("steps_of", [steps_of_nnx, steps_of_linen])
def test_a_fixed_causal_mask_or_window_is_the_same_by_steps_as_for_the_whole(steps_of, fixed):
    whole, steps = steps_of(make_flax_attention_fn(**fixed))
    np.testing.assert_allclose(steps, whole, rtol=1e-4, atol=1e-5)  # rounding of two orders of sums


def test_a_layer_that_is_causal_itself_decodes():
    whole, steps = steps_of_nnx(flax_attention_fn, is_causal=True)
    np.testing.assert_allclose(steps, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
@pytest.mark.parametrize("sown", [False, True])
@pytest.mark.parametrize("window", [None, 2])
def test_a_chunk_of_a_prompt_ends_where_the_cache_is_filled(window, sown):
    q, k, v = jax.random.normal(jax.random.key(0), (3, B, T, HEADS, 8))
    kinds = {"is_causal": True} if window is None else {"local_window_size": (window, 0)}
    whole = pallas_kernels.attention(q, k, v, **kinds)
    # The batch entries are at different lengths; what is not filled yet is arbitrary.
    filled = jnp.arange(T)[None] < jnp.array([[7], [10]])
    unfilled = jnp.where(filled[:, :, None, None], 0.0, 9.0)
    chunk = jnp.stack([q[0, 4:7], q[1, 7:10]])
    want = jnp.stack([whole[0, 4:7], whole[1, 7:10]])
    attend, options = make_flax_attention_fn(**kinds), {}
    if sown and window is None:
        attend, options = flax_attention_fn, {"is_causal": True, "module": nnx_layer()}
    got = attend(chunk, k + unfilled, v + unfilled, mask=filled[:, None, None], **options)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_fixed_position_comes_before_the_masks():
    q, k, v = jax.random.normal(jax.random.key(0), (3, B, T, HEADS, 8))
    mask = jnp.ones((T,), bool)
    attend = make_flax_attention_fn(is_causal=True, query_offset=0)
    want = pallas_kernels.attention(q[:, :3], k, v, is_causal=True)
    np.testing.assert_allclose(attend(q[:, :3], k, v, mask=mask), want, rtol=1e-5, atol=1e-6)


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


def test_recording_weights_changes_no_output():
    mask = masks()[3]
    forward = nnx.capture(nnx_layer(attention_fn=flax_attention_fn), nnx.Intermediate)
    got, _ = forward(X, mask=mask, sow_weights=True)
    want = nnx_layer(attention_fn=flax_attention_fn)(X, mask=mask)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


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
