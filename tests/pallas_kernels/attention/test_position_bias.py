"""Biases by rule: ALiBi and T5's buckets, beside the dense bias that they stand for."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import Alibi, RelativePositionBias, alibi_slopes, attention, explain
from pallas_kernels.attention import toeplitz
from pallas_kernels.attention.chunks import ChunkedConfig
from tests.pallas_kernels.attention.cases import quick_jit

B, T, S, N, K, D = 2, 21, 34, 4, 2, 8
SMALL = ChunkedConfig(8, 16, 1)


def inputs():
    rng = np.random.default_rng(0)
    shapes = (B, T, N, D), (B, S, K, D), (B, S, K, D), (B, T, N, D)
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def t5_buckets(distances, buckets, bidirectional, max_distance):
    """The formula as it is written, in float64; what is added keeps whole numbers from falling."""
    side = buckets // 2 if bidirectional else buckets
    exact = side // 2
    size = np.abs(distances) if bidirectional else np.maximum(-distances, 0)
    ratio = np.log(np.maximum(size, 1) / exact) / np.log(max_distance / exact)
    large = np.minimum(exact + np.floor(ratio * (side - exact) + 1e-9), side - 1)
    found = np.where(size < exact, size, large).astype(int)
    return found + side * (distances > 0) * bidirectional


def dense(rule, offset):
    """Returns the bias (B, N, T, S) as the formulas read, differentiable in the rule."""
    position = np.arange(T) + np.broadcast_to(offset, (B,))[:, None]
    distances = np.arange(S) - position[:, :, None]
    if isinstance(rule, Alibi):
        return -rule.slopes[None, :, None, None] * np.abs(distances)[:, None]
    found = t5_buckets(distances, rule.table.shape[0], rule.bidirectional, rule.max_distance)
    return jnp.moveaxis(rule.table[found], -1, 1)


RNG = np.random.default_rng(1)
RULES = {
    "alibi": Alibi(jnp.asarray(RNG.uniform(0.05, 0.5, N), jnp.float32)),
    "encoder": RelativePositionBias(
        jnp.asarray(RNG.normal(size=(12, N)), jnp.float32), bidirectional=True, max_distance=20
    ),
    "decoder": RelativePositionBias(
        jnp.asarray(RNG.normal(size=(9, N)), jnp.float32), bidirectional=False, max_distance=30
    ),
}


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
@pytest.mark.parametrize(
    ("rule", "arguments"),
    [
        ("alibi", {"is_causal": True, "query_offset": 13}),
        ("alibi", {"local_window_size": (9, 4), "query_offset": np.array([3, -5])}),
        ("encoder", {"logits_soft_cap": 3.0, "query_offset": np.array([0, 13])}),
        ("decoder", {"is_causal": True, "prefix_lengths": 10, "sinks": np.ones(N, np.float32)}),
    ],
)
def test_equals_the_dense_bias_and_its_gradient(rule, arguments, implementation):
    *x, cotangent = inputs()
    rule = RULES[rule]

    def gradients(attend):
        def fn(query, key, value, rule):
            output, lse = attend(query, key, value, rule)
            return (output * cotangent).sum() + lse.sum()

        return quick_jit(jax.value_and_grad(fn, (0, 1, 2, 3)))(*x, rule)

    config = SMALL if implementation == "chunked" else None
    got = gradients(
        lambda *x: attention(
            *x, **arguments, implementation=implementation, config=config, return_residual=True
        )
    )
    offset = arguments.get("query_offset", 0)
    want = gradients(
        lambda *x: attention(
            *x[:3], dense(x[3], offset), **arguments, implementation="reference",
            return_residual=True,
        )
    )  # fmt: skip
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # Sums of about a thousand products of order one.
        np.testing.assert_allclose(g, w, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("buckets", "bidirectional", "max_distance"),
    [(32, True, 128), (32, False, 128), (64, True, 256), (8, True, 20), (5, False, 7),
     (320, True, 800)],
)  # fmt: skip
def test_buckets_are_those_of_the_formula(buckets, bidirectional, max_distance):
    rule = RelativePositionBias(
        jnp.zeros((buckets, 1)), bidirectional=bidirectional, max_distance=max_distance
    )
    distances = np.arange(-2000, 2000)
    want = t5_buckets(distances, buckets, bidirectional, max_distance)
    np.testing.assert_array_equal(rule.buckets(jnp.asarray(distances)), want)


def test_standard_slopes():
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-i for i in range(1, 9)])
    # Of the models with 12 heads: those of 8, then every second of those of 16.
    tail = [2 ** -(0.5 * i) for i in (1, 3, 5, 7)]
    np.testing.assert_allclose(alibi_slopes(12), [*alibi_slopes(8), *tail], rtol=1e-6)
    assert alibi_slopes(1).tolist() == [2.0**-8]
    with pytest.raises(ValueError, match="heads=0; expected at least 1"):
        alibi_slopes(0)


@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (3, 5), (5, 3), (1, 4), (4, 1)])
def test_tiles_and_sums_along_diagonals(rows, keys):
    band = np.random.default_rng(2).normal(size=(2, rows + keys))
    tile = toeplitz.tile(jnp.asarray(band), rows, keys)
    want = np.zeros((2, rows + keys))
    for r, c in np.ndindex(rows, keys):
        np.testing.assert_allclose(tile[:, r, c], band[:, c - r + rows - 1], rtol=1e-6)
        want[:, c - r + rows - 1] += r + 10 * c
    x = jnp.broadcast_to(jnp.arange(rows)[:, None] + 10.0 * jnp.arange(keys)[None], (2, rows, keys))
    np.testing.assert_allclose(toeplitz.sums(x), want)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["alibi", "encoder"])
def test_memory_is_linear_in_the_length(rule):
    def temporaries(length):
        x = jax.ShapeDtypeStruct((1, length, N, 64), jnp.float32)

        def loss(q, k, v, rule):
            return attention(q, k, v, rule, is_causal=True, config=ChunkedConfig(256, 256, 1)).sum()

        compiled = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(x, x, x, RULES[rule]).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = map(temporaries, (2048, 4096))
    assert large < 2.2 * small
    # Of one head's scores at this length there is no room for a half.
    assert large - small < 4096 * 4096 * 4 / 2


@pytest.mark.slow
def test_under_vmap_with_a_rule_for_each():
    query, key, value, _ = inputs()
    slopes = jnp.stack([alibi_slopes(N), 3 * alibi_slopes(N)])

    def loss(slopes, query):
        return (attention(query, key, value, Alibi(slopes), is_causal=True) ** 2).sum()

    together = jax.vmap(jax.grad(loss), (0, None))
    got = quick_jit(together)(slopes, query)
    want = jnp.stack([quick_jit(jax.grad(loss))(s, query) for s in slopes])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    shared = quick_jit(jax.grad(lambda s, q: jax.vmap(loss, (None, 0))(s, q).sum()))
    two = jnp.stack([query, -query])
    want = sum(jax.grad(loss)(slopes[0], q) for q in two)
    np.testing.assert_allclose(shared(slopes[0], two), want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_batch_and_heads_on_several_devices(kind):
    query, key, value, _ = inputs()
    mesh = jax.make_mesh((2, 2), ("b", "h"), axis_types=(kind,) * 2)
    placed = [
        jax.device_put(x, NamedSharding(mesh, P("b", None, "h"))) for x in (query, key, value)
    ]

    def gradient(slopes, *x):
        return jax.grad(lambda s: (attention(*x, Alibi(s), is_causal=True) ** 2).sum())(slopes)

    want = jax.jit(gradient)(alibi_slopes(N), query, key, value)
    with jax.set_mesh(mesh):
        got = jax.jit(gradient)(alibi_slopes(N), *placed)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_parameters_of_16_bits_lose_neither_distances_nor_sums(dtype):
    distances = jnp.arange(-70_000, 1, 7, dtype=jnp.int32)
    slopes = jnp.array([0.25, 0.0], dtype)
    np.testing.assert_array_equal(
        Alibi(slopes).at(distances), Alibi(slopes.astype(jnp.float32)).at(distances)
    )

    def total(table):
        rule = RelativePositionBias(table, bidirectional=False, max_distance=16)
        return (rule.at(jnp.arange(-4096, 0, dtype=jnp.int32))).sum()

    found = jax.grad(total)(jnp.ones((8, 1), dtype))[:, 0]
    # A count of 4085 is rounded once, to eight bits or more.
    np.testing.assert_allclose(found, jax.grad(total)(jnp.ones((8, 1)))[:, 0], rtol=2**-8)


def test_a_distance_beyond_all_others():
    rules = [
        RelativePositionBias(jnp.arange(8.0)[:, None], bidirectional=False, max_distance=m)
        for m in (2**50, 2**31 - 1)
    ]
    near, far = jnp.arange(-5, 1), jnp.array([-(2**29)])
    np.testing.assert_array_equal(*(rule.at(near) for rule in rules))
    assert [float(rule.at(far)[0, 0]) for rule in rules] == [6.0, 7.0]


def test_explain_says_which_routes_have_no_rule():
    x = jax.ShapeDtypeStruct((1, 64, 2, 32), jnp.bfloat16)
    slopes = jax.ShapeDtypeStruct((2,), jnp.float32)
    found = explain(x, x, x, Alibi(slopes), is_causal=True, interpret=True)
    assert found.chosen == "chunked"
    assert found.refusals["mosaic_tpu"] == "has no bias by rule"
    for chip, refusing, chosen in (
        ("v6e", "mosaic_tpu", "chunked"),
        ("h200", "mosaic_gpu", "triton"),
    ):
        found = explain(x, x, x, Alibi(slopes), is_causal=True, chip=chip)
        assert (found.refusals[refusing], found.chosen) == ("has no bias by rule", chosen)


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        (Alibi(jnp.ones(3)), ValueError, r"bias has slopes \(3,\); expected \(4,\), one for each"),
        (Alibi(jnp.ones(4, int)), TypeError, "bias has slopes of dtype int32; expected a floating"),
        (RelativePositionBias(jnp.ones((8, 3)), bidirectional=True), ValueError,
         r"bias has table \(8, 3\); expected \(8, 4\), a row for each bucket"),
        (RelativePositionBias(jnp.ones((7, 4)), bidirectional=True), ValueError,
         "table has 7 buckets; expected an even number"),
        (RelativePositionBias(jnp.ones((2, 4)), bidirectional=True), ValueError,
         "table has 1 buckets for a direction; expected at least 2"),
        (RelativePositionBias(jnp.ones((32, 4)), bidirectional=False, max_distance=16), ValueError,
         "max_distance=16; expected an integer above 16"),
        (RelativePositionBias(jnp.ones((8, 4)), bidirectional="no"), TypeError,
         "bidirectional='no'; expected True or False"),
    ],
)  # fmt: skip
def test_bad_rules(rule, error, message):
    *x, _ = inputs()
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda rule: attention(*x, rule), rule)


def test_what_is_no_rule():
    *x, _ = inputs()
    for bias, message in [
        (Alibi([0.5] * N), "bias has slopes of type list; expected an array"),
        (RelativePositionBias([[0.5] * N] * 8, bidirectional=True), "table of type list"),
        (Alibi, "bias is <class .*; expected an array, or one of Alibi, RelativePositionBias"),
        ("alibi", "bias is 'alibi'; expected an array, or one of"),
    ]:
        with pytest.raises(TypeError, match=message):
            attention(*x, bias)
    for heads in (2.5, "a", True):
        with pytest.raises(TypeError, match=r"heads=.*; expected an integer"):
            alibi_slopes(heads)
    with pytest.raises(TypeError, match="dropout_rng is of type int; expected a PRNG key"):
        attention(*x, dropout_rate=0.5, dropout_rng=3)
    for name in ("prefix_lengths", "key_value_start"):
        for wrong in ("3", True):
            with pytest.raises(TypeError, match=f"{name} has value {wrong}; expected integers"):
                attention(*x, is_causal=True, **{name: wrong})
    with pytest.raises(ValueError, match="local_window_size=True; expected integers"):
        attention(*x, local_window_size=True)
