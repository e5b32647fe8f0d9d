"""`vmap` over some of the arguments copies nothing that is shared."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.attention import heads
from tests.pallas_kernels.attention.cases import quick_jit

A, B, T, S, N, KV, D = 3, 2, 4, 5, 4, 2, 8


def normal(i, *shape):
    return jnp.asarray(np.random.default_rng(i).normal(size=shape), jnp.float32)


QUERIES, KEY, VALUE = normal(0, A, B, T, N, D), normal(1, B, S, KV, D), normal(2, B, S, KV, D)
RULE = pallas_kernels.Alibi(pallas_kernels.alibi_slopes(N))
SHARED = {
    "positions": {"is_causal": True, "query_offset": 1, "local_window_size": 3},
    "lengths": {"key_value_seq_lengths": jnp.array([3, 5]), "query_seq_lengths": [4, 2]},
    "ids": {
        "query_segment_ids": jnp.array([[0, 0, 1, 1], [1, 1, 2, 2]]),
        "key_value_segment_ids": jnp.array([[0, 0, 1, 1, 1], [1, 2, 2, 2, 3]]),
    },
    "planes": {"bias": normal(3, N, T, S), "mask": normal(4, B, 1, T, S) > -0.5},
    "sinks and dropout": {
        "sinks": normal(5, N), "dropout_rate": 0.3, "dropout_rng": jax.random.key(0),
    },
    "prefix and first keys": {
        "is_causal": True, "prefix_lengths": jnp.array([2, 3]), "key_value_start": [1, 0],
    },
    "a rule": {"bias": RULE, "is_causal": True, "query_offset": jnp.array([1, 0])},
}  # fmt: skip


def loss(q, k, v, **options):
    output, lse = pallas_kernels.attention(q, k, v, return_residual=True, **options)
    return (output**2).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum()


@pytest.mark.parametrize("name", SHARED)
def test_queries_alone(name):
    options = SHARED[name]
    attend = lambda q: pallas_kernels.attention(q, KEY, VALUE, **options)  # noqa: E731
    got = quick_jit(jax.vmap(attend))(QUERIES)
    want = jnp.stack([attend(q) for q in QUERIES])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)


def test_gradients_of_queries_alone():
    grad = jax.grad(loss, (0, 1, 2))
    each = [grad(q, KEY, VALUE, **SHARED["positions"]) for q in QUERIES]
    mapped = jax.vmap(lambda q: grad(q, KEY, VALUE, **SHARED["positions"]))

    def total(q, k, v):
        return jax.vmap(lambda q: loss(q, k, v, **SHARED["positions"]))(q).sum()

    whole = jax.grad(total, (0, 1, 2))
    got, summed = quick_jit(lambda q: (mapped(q), whole(q, KEY, VALUE)))(QUERIES)
    for i in range(3):
        stacked = jnp.stack([x[i] for x in each])
        np.testing.assert_allclose(got[i], stacked, rtol=1e-4, atol=1e-5)
        want = stacked if i == 0 else stacked.sum(axis=0)
        np.testing.assert_allclose(summed[i], want, rtol=1e-4, atol=3e-5)


LEARNED = {
    "planes": ({}, lambda x: {"bias": x}, normal(3, N, T, S)),
    "one plane": ({"is_causal": True}, lambda x: {"bias": x}, normal(4, B, 1, T, S)),
    "sinks": ({"dropout_rate": 0.3, "dropout_rng": jax.random.key(0)}, lambda x: {"sinks": x},
              normal(5, N)),
    "slopes": ({"is_causal": True}, lambda x: {"bias": pallas_kernels.Alibi(x)}, RULE.slopes),
}  # fmt: skip


@pytest.mark.parametrize("name", LEARNED)
def test_gradients_of_what_is_shared(name):
    """Of each entry, and of the sum over them, which is one call."""
    options, given, x = LEARNED[name]

    def of(q, k, v, x):
        return loss(q, k, v, **options, **given(x))

    def both(q, *rest):
        axes = (0, *[None] * len(rest))
        total = jax.grad(lambda *a: jax.vmap(of, axes)(*a).sum(), (0, 1, 2, 3))
        return jax.vmap(jax.grad(of, (0, 3)), axes)(q, *rest), total(q, *rest)

    each = quick_jit(jax.grad(of, (0, 1, 2, 3)))
    want = jax.tree.map(lambda *g: jnp.stack(g), *(each(q, KEY, VALUE, x) for q in QUERIES))
    mapped, total = quick_jit(both)(QUERIES, KEY, VALUE, x)
    # Float32; sums of squares over all rows.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=3e-5)
    jax.tree.map(close, mapped, (want[0], want[3]))
    jax.tree.map(close, total, (want[0], *(g.sum(axis=0) for g in want[1:])))


def test_one_plane_that_moves_in_each_entry():
    """Its gradient with a single head, and its moves with several: not those of all entries."""
    bias, moves = normal(4, B, 1, T, S), normal(5, A, B, 1, T, S)

    def one_head(q, bias):
        return (pallas_kernels.attention(q, KEY[:, :, :1], VALUE[:, :, :1], bias) ** 2).sum()

    def moved(q, move):
        attend = lambda bias: pallas_kernels.attention(q, KEY, VALUE, bias)  # noqa: E731
        return jax.jvp(attend, (bias,), (move,))[1]

    def both(q, move):
        return jax.grad(one_head, 1)(q[:, :, :1], bias), moved(q, move)

    got = quick_jit(jax.vmap(both))(QUERIES, moves)
    want = jax.tree.map(lambda *x: jnp.stack(x), *map(quick_jit(both), QUERIES, moves))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, want)


def test_gradients_of_queries_around_entries_with_keys_of_their_own():
    keys, values = (jnp.stack([x, x[::-1], x + 1]) for x in (KEY, VALUE))
    queries = jnp.stack([QUERIES, 2 * QUERIES])

    def total(*x):
        return jax.vmap(jax.vmap(loss), (0, None, None))(*x).sum()

    got = quick_jit(jax.grad(total, (0, 1, 2)))(queries, keys, values)
    each = quick_jit(jax.grad(lambda *x: sum(map(loss, *x)), (0, 1, 2)))
    one, two = (each(list(q), list(keys), list(values)) for q in queries)
    np.testing.assert_allclose(got[0], jnp.stack([jnp.stack(one[0]), jnp.stack(two[0])]), 1e-4)
    for i in (1, 2):
        want = jnp.stack(one[i]) + jnp.stack(two[i])
        np.testing.assert_allclose(got[i], want, rtol=1e-4, atol=3e-5)


def test_masks_and_biases_that_are_mapped_with_the_queries():
    bias, mask = normal(3, A, N, T, S), normal(4, A, B, N, T, S) > 0
    attend = lambda q, b, m: pallas_kernels.attention(q, KEY, VALUE, b, m)  # noqa: E731
    got = quick_jit(jax.vmap(attend))(QUERIES, bias, mask)
    want = jnp.stack([attend(*x) for x in zip(QUERIES, bias, mask)])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("count", [1, N])
def test_a_bias_or_a_rule_that_is_mapped_alone(count):
    q, k = QUERIES[0, :, :, :count], KEY[:, :, : max(1, count // 2)]
    bias, slopes, sinks = normal(3, A, 1, T, S), normal(4, A, count), normal(5, count)

    def attend(bias, slopes):
        return (
            pallas_kernels.attention(q, k, k, bias, sinks=sinks),
            pallas_kernels.attention(q, k, k, pallas_kernels.Alibi(slopes), is_causal=True),
        )

    got = quick_jit(jax.vmap(attend))(bias, slopes)
    each = [attend(*x) for x in zip(bias, slopes)]
    for mapped, want in zip(got, zip(*each)):
        np.testing.assert_allclose(mapped, jnp.stack(want), rtol=1e-5, atol=2e-6)


@pytest.mark.slow
def test_derivatives_of_queries_alone():
    """Forward mode, and forward over reverse, of queries and slopes under one `vmap`."""
    masks = SHARED["prefix and first keys"]

    def attend(q, slopes):
        return pallas_kernels.attention(q, KEY, VALUE, pallas_kernels.Alibi(slopes), **masks)

    def gradient(q, slopes):
        return jax.grad(lambda *x: (attend(*x) ** 2).sum(), (0, 1))(q, slopes)

    def both(q, dq):
        here, there = (q, RULE.slopes), (dq, 0.1 + RULE.slopes)
        return jax.jvp(attend, here, there)[1], jax.jvp(gradient, here, there)[1]

    got = quick_jit(jax.vmap(both))(QUERIES, QUERIES[::-1])
    one = quick_jit(both)
    each = [one(*x) for x in zip(QUERIES, QUERIES[::-1])]
    want = jax.tree.map(lambda *x: jnp.stack(x), *each)
    # Float32; second derivatives of sums of squares over all rows.
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=3e-5), got, want)


@pytest.mark.slow
@pytest.mark.parametrize("route", ["triton", "mosaic_tpu"])
def test_kernels_with_more_heads(route):
    attend = lambda q: pallas_kernels.attention(  # noqa: E731
        q, KEY, VALUE, is_causal=True, implementation=route, interpret=True
    )
    want = jax.vmap(lambda q: pallas_kernels.attention(q, KEY, VALUE, is_causal=True))(QUERIES)
    # mosaic_tpu multiplies float32 in passes of bfloat16 unless asked for more.
    np.testing.assert_allclose(jax.vmap(attend)(QUERIES), want, rtol=2e-2, atol=2e-2)


def temporaries(fn, *shapes):
    structs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return quick_jit(fn).lower(*structs).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_shared_keys_are_not_copied():
    shapes = (32, 1, 16, 4, 64), (1, 2048, 4, 64), (1, 2048, 4, 64)
    mapped = jax.vmap(pallas_kernels.attention, (0, None, None))

    def by_hand(q, k, v):
        return pallas_kernels.attention(q.reshape(1, 512, 4, 64), k, v)

    def gradient(fn):
        return jax.grad(lambda q, k, v: (fn(q, k, v) ** 2).sum(), (0, 1, 2))

    assert temporaries(mapped, *shapes) <= 1.2 * temporaries(by_hand, *shapes)
    assert temporaries(gradient(mapped), *shapes) <= 1.2 * temporaries(gradient(by_hand), *shapes)
    each = jax.vmap(jax.grad(lambda q, k, v: (pallas_kernels.attention(q, k, v) ** 2).sum()),
                    (0, None, None))  # fmt: skip
    assert temporaries(each, *shapes) <= 1.2 * temporaries(gradient(by_hand), *shapes)


def test_planes_of_heads_that_are_larger_than_the_keys_are_not_copied_in_their_place():
    axes, mapped = ("btnd", "bskd", "bske", "bnts"), (True, False, False, False)
    for plane, shares in (
        ((B, N, T, S), True),
        ((B, N, 9 * T, S), False),
        ((B, 1, 9 * T, S), True),
    ):
        args = (QUERIES, KEY, VALUE, jnp.zeros(plane))
        assert heads.share_keys(axes, mapped, args) == shares


def test_no_entries():
    nothing = QUERIES[:0]
    got = jax.vmap(lambda q: pallas_kernels.attention(q, KEY, VALUE))(nothing)
    assert got.shape == nothing.shape
    both = jax.vmap(jax.grad(loss, (0, 1, 2)))(nothing, *[jnp.zeros((0, *KEY.shape))] * 2)
    assert [x.shape[0] for x in both] == [0, 0, 0]
