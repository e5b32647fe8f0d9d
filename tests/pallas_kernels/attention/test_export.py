"""Programs for free sizes: `jax.export` with symbolic dimensions, on the default route."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import pallas_kernels

B, T, S = 3, 70, 50
RNG = np.random.default_rng(0)
Q, K = (jax.device_put(RNG.normal(size=s).astype(np.float32)) for s in ((B, T, 4, 8), (B, S, 2, 8)))
IDS = jax.device_put((np.arange(T)[None] // np.array([[20], [30], [70]])).astype(np.int32))


def windowed(q, k, v):
    return pallas_kernels.attention(q, k, v, is_causal=True, local_window_size=11)


def masked(q, k, v, lengths, q_ids, kv_ids, mask):
    return pallas_kernels.attention(
        q, k, v, mask=mask, key_value_seq_lengths=lengths, query_segment_ids=q_ids,
        key_value_segment_ids=kv_ids, sinks=jnp.ones(4), dropout_rate=0.2,
        dropout_rng=jax.random.key(0),
    )  # fmt: skip


def gradient(q, k, v):
    return jax.grad(lambda *x: (windowed(*x) ** 2).sum(), (0, 1, 2))(q, k, v)


def decode(q, k, v, lengths):
    return pallas_kernels.decode_attention(q, k, v, lengths, local_window_size=30)


def decode_pages(q, k, v, lengths, table):
    return pallas_kernels.decode_attention(q, k, v, lengths, page_table=table)


def ruled(q, k, v, start, prefix, slopes):
    return pallas_kernels.attention(
        q, k, v, pallas_kernels.Alibi(slopes), is_causal=True, key_value_start=start,
        prefix_lengths=prefix,
    )  # fmt: skip


def derivatives(q, k, v, start, prefix, slopes):
    def gradient(q, slopes):
        loss = lambda q, slopes: (ruled(q, k, v, start, prefix, slopes) ** 2).mean()  # noqa: E731
        return jax.grad(loss, (0, 1))(q, slopes)

    return jax.jvp(gradient, (q, slopes), (q, slopes))


def decode_ruled(q, k, v, lengths, start, prefix, slopes):
    return pallas_kernels.decode_attention(
        q, k, v, lengths, key_value_start=start, prefix_lengths=prefix,
        bias=pallas_kernels.Alibi(slopes),
    )  # fmt: skip


LENGTHS = jnp.array([3, 50, 20])
STARTS, PREFIXES, SLOPES = jnp.array([0, 2, 30]), jnp.array([5, 0, 40]), jnp.arange(4.0) / 9
PAGES = jax.device_put(RNG.permutation(30).reshape(3, 10).astype(np.int32))
CASES = {
    "batch": (windowed, (Q, K, K), ("b, 70, 4, 8", *["b, 50, 2, 8"] * 2)),
    "all": (windowed, (Q, K, K), ("b, t, 4, 8", *["b, s, 2, 8"] * 2)),
    "gradient": (gradient, (Q, K, K), ("b, t, 4, 8", *["b, s, 2, 8"] * 2)),
    "masks": (
        masked,
        (Q, K, K, LENGTHS, IDS, IDS[:, :S], jax.random.bernoulli(jax.random.key(2), 0.7, (T, S))),
        ("b, t, 4, 8", *["b, s, 2, 8"] * 2, "b,", "b, t", "b, s", "t, s"),
    ),
    "rule": (
        ruled,
        (Q, K, K, STARTS, PREFIXES, SLOPES),
        ("b, t, 4, 8", *["b, s, 2, 8"] * 2, "b,", "b,", "4,"),
    ),
    "derivatives": (
        derivatives,
        (Q, K, K, STARTS, PREFIXES, SLOPES),
        ("b, t, 4, 8", *["b, s, 2, 8"] * 2, "b,", "b,", "4,"),
    ),
    "decode with a rule": (
        decode_ruled,
        (Q[:, 0], K, K, LENGTHS, STARTS, PREFIXES, SLOPES),
        ("b, 4, 8", *["b, s, 2, 8"] * 2, "b,", "b,", "b,", "4,"),
    ),
    "decode": (decode, (Q[:, 0], K, K, LENGTHS), ("b, 4, 8", *["b, s, 2, 8"] * 2, "b,")),
    "pages": (
        decode_pages,
        (Q[:, 0], *[K.reshape(30, 5, 2, 8)] * 2, LENGTHS, PAGES),
        ("b, 4, 8", *["p, 5, 2, 8"] * 2, "b,", "b, n"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_symbolic_sizes(name):
    fn, args, shapes = CASES[name]
    scope = export.SymbolicScope()
    structs = [
        jax.ShapeDtypeStruct(export.symbolic_shape(shape, scope=scope), x.dtype)
        for shape, x in zip(shapes, args)
    ]
    program = export.export(jax.jit(fn))(*structs)
    # Blocks of other sizes, so sums in another order.
    for got, want in zip(jax.tree.leaves(program.call(*args)), jax.tree.leaves(fn(*args))):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_kernels_say_that_they_need_sizes():
    x = jax.ShapeDtypeStruct(export.symbolic_shape("b, 8, 2, 16"), jnp.bfloat16)
    found = pallas_kernels.explain(x, x, x, chip="v5e")
    assert found.chosen == "chunked"
    assert "these are symbolic" in found.refusals["mosaic_tpu"]
