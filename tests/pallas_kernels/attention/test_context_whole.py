"""What is over the whole sequence in `ring_attention`: bias by rule, mask, lengths, dropout."""

# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import (
    Alibi,
    RelativePositionBias,
    attention,
    ring_attention,
    shard_sequence_order,
)
from pallas_kernels.attention import chunked, layouts
from pallas_kernels.attention.context import METHODS
from tests.pallas_kernels.attention.cases import at_once, quick_jit
from tests.pallas_kernels.attention.context_cases import PLAIN, SPREAD, N, mesh

B, T, S, HEADS, K, D = 2, 32, 48, 4, 2, 8
RNG = np.random.default_rng(0)
QUERY, KEY, VALUE, TARGET = (
    jnp.asarray(RNG.normal(size=(B, *shape, D)), jnp.float32)
    for shape in ((T, HEADS), (S, K), (S, K), (T, HEADS))
)
ALIBI = Alibi(jnp.asarray(RNG.uniform(0.05, 0.5, HEADS), jnp.float32))
BUCKETS = RelativePositionBias(
    jnp.asarray(RNG.normal(size=(10, HEADS)), jnp.float32), bidirectional=True, max_distance=20
)
MASK = jnp.asarray(RNG.random((B, 1, T, S)) < 0.6)
LENGTHS = jnp.array([19, 40])


def spread(x, mask, rule, layout, method, implementation=PLAIN, **options):
    """Returns output and lse of `ring_attention` over whole sequences, in their natural order."""
    (q_order, inverse), (k_order, _) = (shard_sequence_order(n, N, layout) for n in (T, S))

    def local(query, key, value, mask, rule):
        return ring_attention(
            query, key, value, axis_name="x", layout=layout, method=method, bias=rule, mask=mask,
            implementation=implementation, return_residual=True, **options,
        )  # fmt: skip

    if mask is not None and mask.shape[2] > 1:
        mask = mask[:, :, q_order]
    if mask is not None and mask.shape[3] > 1:
        mask = mask[..., k_order]
    of_rows = P(None, None, "x") if mask is not None and mask.shape[2] > 1 else P()
    query, key, value = x[0][:, q_order], x[1][:, k_order], x[2][:, k_order]
    specs = (SPREAD, SPREAD, SPREAD, of_rows, P())
    over = jax.shard_map(local, mesh=mesh(), in_specs=specs, out_specs=SPREAD)
    output, lse = over(query, key, value, mask, rule)
    return output[:, inverse], lse[:, inverse]


def gradients(attend, rule):
    def loss(x, rule):
        output, lse = attend(x, rule)
        return (output * TARGET).sum() + jnp.where(lse == -jnp.inf, 0, lse).sum()

    return quick_jit(jax.value_and_grad(loss, (0, 1)))((QUERY, KEY, VALUE), rule)


@functools.cache
def expected(causal, has_mask, has_lengths, which):
    rule = {"alibi": ALIBI, "buckets": BUCKETS, None: None}[which]

    def attend(x, rule):
        return attention(
            *x, rule, MASK if has_mask else None, is_causal=causal, return_residual=True,
            key_value_seq_lengths=LENGTHS if has_lengths else None, implementation="reference",
        )  # fmt: skip

    return gradients(attend, rule)


def check(layout, method, causal, has_mask, has_lengths, which, **options):
    rule = {"alibi": ALIBI, "buckets": BUCKETS, None: None}[which]
    mask = MASK if has_mask else None
    lengths = LENGTHS if has_lengths else None
    got = gradients(
        lambda x, rule: spread(
            x, mask, rule, layout, method, is_causal=causal, key_value_seq_lengths=lengths,
            **options,
        ),
        rule,
    )  # fmt: skip
    want = expected(causal, has_mask, has_lengths, which)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # Sums of a few hundred products of order one, in another order.
        np.testing.assert_allclose(g, w, rtol=2e-5, atol=3e-5)


QUICK = {
    ("ring", "zigzag"), ("ring", "striped"), ("gather", "contiguous"), ("gather", "striped"),
    ("all_to_all", "zigzag"),
}  # fmt: skip


def combinations(methods):
    return [
        pytest.param(*x, marks=() if x in QUICK else pytest.mark.slow)
        for x in itertools.product(methods, layouts.LAYOUTS)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "layout"), combinations(METHODS))
def test_rule_lengths_and_mask(method, layout):
    check(layout, method, False, method != "all_to_all", True, "buckets")


@pytest.mark.parametrize(("method", "layout"), combinations(["ring", "gather"]))
def test_rule_under_a_causal_mask(method, layout):
    check(layout, method, True, False, False, "alibi")


@pytest.mark.parametrize("method", ["ring", "gather"])
def test_mask_alone(method):
    check("zigzag", method, False, True, False, None)


@pytest.mark.slow
def test_ring_of_the_chunked_route():
    check("zigzag", "ring", True, True, True, "alibi", implementation=chunked.ROUTE)


def test_the_default_route_serves_a_rule():
    options = {"is_causal": True, "implementation": None}
    x = (QUERY, KEY, VALUE)
    got, _ = quick_jit(lambda x: spread(x, None, ALIBI, "contiguous", "ring", **options))(x)
    want = at_once(attention, QUERY, KEY, VALUE, ALIBI, is_causal=True, implementation="reference")
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 1, S), (B, HEADS, T, 1), (1, 1, T, S)])
def test_masks_that_broadcast(shape):
    mask = jnp.asarray(np.random.default_rng(1).random(shape) < 0.6)
    want = at_once(attention, QUERY, KEY, VALUE, mask=mask, implementation="reference")
    for method in ("ring", "gather"):
        x = (QUERY, KEY, VALUE)
        got, _ = quick_jit(lambda x, m=method: spread(x, mask, None, "zigzag", m))(x)
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_beyond_a_length_may_be_nan(method):
    beyond = (jnp.arange(S)[None] >= LENGTHS[:, None])[:, :, None, None]
    x = (QUERY, *(jnp.where(beyond, jnp.nan, x) for x in (KEY, VALUE)))
    options = {"key_value_seq_lengths": LENGTHS}
    got, _ = quick_jit(lambda x: spread(x, None, None, "zigzag", method, **options))(x)
    want = attention(QUERY, KEY, VALUE, key_value_seq_lengths=LENGTHS, implementation="reference")
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "layout"),
    [("ring", "zigzag"), ("gather", "zigzag"), ("gather", "striped"), ("all_to_all", "zigzag")],
)
def test_dropout(method, layout):
    """Values that are rows of the identity read out the weights."""
    rate, width = 0.25, S
    value = jnp.broadcast_to(jnp.eye(width)[:, None], (B, S, K, width))
    order, _ = shard_sequence_order(S, N, layout)

    def weights(query, value=value, rate=rate, key=3):
        return spread(
            (query, KEY, value), None, None, layout, method, dropout_rate=rate,
            dropout_rng=jax.random.key(key), is_causal=True,
        )[0]  # fmt: skip

    jitted = quick_jit(lambda key: weights(QUERY, key=key))
    got, other = jitted(3), jitted(4)
    plain = attention(QUERY, KEY, value, is_causal=True, implementation="reference")
    kept = np.asarray(got != 0)
    seen = np.broadcast_to(np.tri(T, S, dtype=bool)[:, None], kept.shape)
    np.testing.assert_allclose(got, np.where(kept, plain / (1 - rate), 0), rtol=1e-4, atol=1e-6)
    # About 1,000 bits for each of 8 heads: the standard deviation of the rate is 0.005.
    assert abs(1 - kept[seen].mean() - rate) < 0.025
    assert (kept != np.asarray(other != 0)).any()
    # Slices of no two devices, runs or heads share their bits.
    by_key = kept[..., order] if method == "ring" else kept
    blocks = by_key[:, 16:, :, :16].reshape(B, 2, 8, HEADS, 2, 8).transpose(0, 1, 3, 4, 2, 5)
    flat = blocks.reshape(-1, 64)
    for a, b in itertools.combinations(range(len(flat)), 2):
        assert (flat[a] != flat[b]).any()
    # The gradient has the forward pass's bits: the output is linear in the values.
    target = jnp.asarray(np.random.default_rng(5).normal(size=got.shape), jnp.float32)
    gradient = quick_jit(jax.grad(lambda v: (weights(QUERY, v) * target).sum()))(value)
    want = np.einsum("btns,btne->bsne", got, target).reshape(B, S, K, 2, width).sum(3)
    np.testing.assert_allclose(gradient, want, rtol=1e-4, atol=1e-5)


def test_refusals():
    x = (QUERY, KEY, VALUE)
    with pytest.raises(NotImplementedError, match="method='all_to_all' cannot take a mask"):
        spread(x, MASK, None, "zigzag", "all_to_all")
    with pytest.raises(TypeError, match="expected Alibi or RelativePositionBias, which know all"):
        spread(x, None, jnp.zeros((HEADS, T, S)), "zigzag", "ring")
    with pytest.raises(ValueError, match=r"mask has shape .* queries, keys\] = \(2, 4, 8, 48\)"):
        jax.eval_shape(
            jax.shard_map(
                lambda q, k, m: ring_attention(q, k, k, axis_name="x", mask=m),
                mesh=mesh(), in_specs=(SPREAD, SPREAD, P()), out_specs=SPREAD,
            ),
            QUERY, KEY, MASK[:, :, :8, :12],
        )  # fmt: skip
