"""Bad arguments of `attention` raise while tracing; the message names them and what is right."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import attention

B, T, S, N, K, D = 2, 6, 8, 4, 2, 16


def call(**changes):
    arguments = {
        "query": jnp.zeros((B, T, N, D)),
        "key": jnp.zeros((B, S, K, D)),
        "value": jnp.zeros((B, S, K, D)),
    }
    arguments |= changes
    return jax.eval_shape(lambda a: attention(**(arguments | a)), {"query": arguments["query"]})


def zeros(shape, dtype=jnp.float32):
    """Without a program for each shape, which this file would compile when it is imported."""
    return jax.device_put(np.zeros(shape, dtype))


REFUSED = [
    ({"query": zeros((T, D))}, ValueError, r"query must be \[batch, length, heads, size\].*6, 16"),
    ({"query": zeros((3, T, N, D))}, ValueError, r"in their batch axes; got shapes \(3, 6, 4"),
    ({"value": zeros((B, S + 1, K, D))}, ValueError, r"length and heads \(8, 2\), value \(9"),
    ({"key": zeros((B, S, K, D + 1))}, ValueError, "query has head size 16, key 17"),
    ({"query": zeros((B, T, 3, D))}, ValueError, "query has 3 heads, key and value have 2"),
    (
        {"query": zeros((B, 4, 7, D)), "key": zeros((B, 2, 8, D)), "value": zeros((B, 2, 8, D))},
        ValueError,
        "query has 7 heads, key and value have 8.*looks like heads and length are swapped",
    ),
    (
        {"query": zeros((B, 8, 30, D)), "key": zeros((B, 30, 8, D)), "value": zeros((B, 30, 8, D))},
        ValueError,
        "(?m)query has 30 heads, key and value have 8.*heads and length are swapped in query$",
    ),
    (
        {"query": zeros((B, 30, 8, D)), "key": zeros((B, 4, 30, D)), "value": zeros((B, 4, 30, D))},
        ValueError,
        "(?m)query has 8 heads, key and value have 30.*are swapped in key and value$",
    ),
    (
        {"query": zeros((B, 16, 8, D)), "key": zeros((B, 16, 3, D)), "value": zeros((B, 16, 3, D))},
        ValueError,
        r"(?m)query has 8 heads, key and value have 3.*and \(2, 16, 3, 16\)$",
    ),
    (
        {"query": zeros((1, 4, 5, D)), "key": zeros((1, 4, 2, D)), "value": zeros((1, 4, 2, D))},
        ValueError,
        r"(?m)query has 5 heads, key and value have 2.*and \(1, 4, 2, 16\)$",
    ),
    ({"mask": zeros((B, N, T, S))}, TypeError, "mask has dtype float32; expected bool"),
    (
        {"mask": zeros((B, N, T, S + 1), bool)},
        ValueError,
        r"mask has shape \(2, 4, 6, 9\); expected one that broadcasts to .* = \(2, 4, 6, 8\)",
    ),
    (
        {"mask": zeros((B, T, N, S), bool)},
        ValueError,
        "looks like heads and length are swapped in query, key and value",
    ),
    ({"bias": zeros((N, T))}, ValueError, r"bias has shape \(4, 6\)"),
    ({"bias": zeros((1, 1, 1, S), int)}, TypeError, "bias has dtype int32; expected a floating"),
    (
        {"key": zeros((B, S, K, D), jnp.bfloat16)},
        TypeError,
        "one dtype; got float32, bfloat16 and float32",
    ),
    ({"local_window_size": -1}, ValueError, "local_window_size=-1; expected integers"),
    ({"local_window_size": (1, 2, 3)}, ValueError, r"a number or \(left, right\)"),
    ({"local_window_size": 1.5}, ValueError, "local_window_size=1.5"),
    ({"implementation": "flash"}, ValueError, "names no route; expected one of .* mosaic_gpu, "),
    ({"implementation": ()}, ValueError, "empty sequence"),
    ({"query_seq_lengths": [1, 2, 3]}, ValueError, r"query_seq_lengths has shape \(3,\); expected"),
    ({"key_value_seq_lengths": [1.0, 2.0]}, TypeError, "key_value_seq_lengths has dtype float32"),
    ({"query_offset": [1, 2, 3]}, ValueError, "query_offset has shape"),
    (
        {"query_segment_ids": zeros((B, T), int)},
        ValueError,
        "key_value_segment_ids is missing; with 6 queries and 8 keys",
    ),
    (
        {"query_segment_ids": zeros((B, N), int), "key_value_segment_ids": zeros((B, S), int)},
        ValueError,
        r"query_segment_ids has shape \(2, 4\); expected \(2, 6\); it looks like heads and length",
    ),
    (
        {"query_segment_ids": zeros((B, T)), "key_value_segment_ids": zeros((B, S), int)},
        TypeError,
        "query_segment_ids has dtype float32",
    ),
    ({"sinks": zeros(K)}, ValueError, r"sinks has shape \(2,\); expected \(4,\)"),
    ({"dropout_rate": 0.1}, ValueError, "dropout_rng is missing; expected a key"),
    ({"dropout_rate": 1.0}, ValueError, r"dropout_rate=1.0; expected a probability in \[0, 1\)"),
    ({"logits_soft_cap": 0.0}, ValueError, "logits_soft_cap=0.0; expected a positive number"),
    ({"scale": float("nan")}, ValueError, "scale is NaN"),
    ({"scale": "1"}, TypeError, "scale='1'; expected a number"),
    ({"config": [1]}, TypeError, r"config=\[1\] is not hashable"),
    (
        {"config": pallas_kernels.ChunkedConfig(), "implementation": "reference"},
        NotImplementedError,
        "expected no config",
    ),
    (
        {"config": 3, "implementation": "chunked"},
        NotImplementedError,
        "config=3; expected a ChunkedConfig",
    ),
    (
        {"query": zeros((B, T, N, D), int), "key": zeros((B, S, K, D), int),
         "value": zeros((B, S, K, D), int)},
        TypeError,
        "query has dtype int32; expected a floating dtype",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    REFUSED,
    ids=lambda x: ", ".join(x) if isinstance(x, dict) else str(x)[:50],
)
def test_refused(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)


@pytest.mark.parametrize("name", ["mosaic_gpu", "mosaic_tpu", "triton", "cudnn"])
def test_a_named_route_that_is_not_here_says_so(name):
    with pytest.raises(
        NotImplementedError, match=f"implementation='{name}' cannot serve .* on cpu"
    ):
        call(implementation=name)
    assert call(implementation=(name, "chunked")).shape == (B, T, N, D)


@pytest.mark.parametrize("argument", ["scale", "logits_soft_cap", "dropout_rate"])
def test_traced_numbers_are_refused(argument):
    x = jnp.zeros((B, T, N, D))
    with pytest.raises(TypeError, match=f"{argument}=.*known while tracing"):
        jax.eval_shape(lambda a: attention(x, x, x, **{argument: a}), jnp.float32(0.1))


def test_accepted_spellings():
    assert call(key_value_seq_lengths=[3, 8]).shape == (B, T, N, D)
    assert call(query_offset=np.array([0, 2])).shape == (B, T, N, D)
    assert call(local_window_size=(np.int64(3), None)).shape == (B, T, N, D)
    assert call(scale=np.float32(0.5)).shape == (B, T, N, D)
    assert call(mask=jnp.ones(S, bool)).shape == (B, T, N, D)
    assert call(bias=jnp.zeros((N, 1, S), jnp.bfloat16)).shape == (B, T, N, D)


def test_what_is_beyond_a_length_may_be_nan():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(B, n, N, D)), jnp.float32) for n in (T, S, S))
    lengths = {"query_seq_lengths": [T, 3], "key_value_seq_lengths": [5, S]}

    def loss(q, k, v):
        outputs = attention(q, k, v, return_residual=True, **lengths)
        return outputs[0].sum(), outputs

    outputs_and_gradients = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
    dirty = q.at[1, 3:].set(jnp.nan), k.at[0, 5:].set(jnp.nan), v.at[0, 5:].set(jnp.inf)
    jax.tree.map(
        np.testing.assert_array_equal, outputs_and_gradients(*dirty), outputs_and_gradients(q, k, v)
    )


def draw(*shape):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
def test_a_soft_cap_beyond_all_scores_is_none(implementation):
    q, kv = draw(B, T, N, D), draw(1, B, S, K, D)[0]
    for attend in (
        lambda cap: attention(q, kv, kv, implementation=implementation, logits_soft_cap=cap),
        lambda cap: pallas_kernels.decode_attention(
            q, kv, kv, [7, 8], implementation=implementation, logits_soft_cap=cap
        ),
    ):
        attend = jax.jit(attend, static_argnums=0)
        for cap in (float("inf"), 1e38, 1e30):
            np.testing.assert_array_equal(attend(cap), attend(None))


def test_decode_checks_its_arguments_as_attention_does():
    q, kv = draw(B, 1, N, D), draw(1, B, S, K, D)[0]
    usual = {"query": q, "key_cache": kv, "value_cache": kv, "lengths": [7, 8]}

    def decode(**options):
        return jax.jit(lambda: pallas_kernels.decode_attention(**(usual | options)))()

    with pytest.raises(ValueError, match="scale is NaN"):
        decode(scale=float("nan"))
    for name in ("scale", "logits_soft_cap"):
        with pytest.raises(TypeError, match=f"{name}=.*; expected a number that is known while"):
            jax.jit(lambda x, name=name: decode(**{name: x}))(0.5)
    np.testing.assert_array_equal(decode(sinks=[0.0] * N), decode(sinks=jnp.zeros(N)))
    np.testing.assert_array_equal(decode(num_splits=np.int64(2)), decode(num_splits=2))
    with pytest.raises(ValueError, match="num_splits=True; expected a positive int"):
        decode(num_splits=True)
    output, lse = decode(query=q[:, :0], return_residual=True)
    assert output.shape == (B, 0, N, D)
    assert lse.shape == (B, 0, N)


def test_blocks_must_be_positive():
    q = draw(B, T, N, D)
    for sizes in ({"block_q": -1}, {"block_kv": 0}, {"tile": -5}):
        with pytest.raises(ValueError, match=r"config=ChunkedConfig.*expected sizes that a kernel"):
            attention(q, q, q, config=pallas_kernels.ChunkedConfig(**sizes))


def test_xla_is_what_jax_calls_the_plain_form():
    q = draw(B, T, N, D)
    want = attention(q, q, q, implementation="chunked")
    np.testing.assert_array_equal(attention(q, q, q, implementation="xla"), want)
    np.testing.assert_array_equal(attention(q, q, q, implementation=["cudnn", "xla"]), want)


@pytest.mark.slow
def test_rows_without_keys_are_no_infinities_to_a_search_for_them():
    q = draw(B, T, N, D)
    mask = jnp.ones((T, T), bool).at[2].set(False)
    grad = jax.grad(lambda q: (attention(q, q, q, mask=mask) ** 2).sum())
    names = jax.checkpoint_policies.save_only_these_names("attention_output", "attention_lse")
    again = jax.checkpoint(lambda q: attention(q, q, q, mask=mask), policy=names)
    with jax.debug_infs(True):
        assert (attention(q, q, q, mask=mask)[:, 2] == 0).all()
        assert jnp.isfinite(grad(q)).all()
        assert jnp.isfinite(jax.grad(lambda q: again(q).sum())(q)).all()
        assert all(jnp.isfinite(x).all() for x in jax.jvp(grad, (q,), (q,)))


def test_a_constant_mask_is_not_folded_by_the_compiler():
    q = draw(1, 256, 2, 8)
    mask = np.tril(np.ones((256, 256), bool))
    program = jax.jit(lambda q: attention(q, q, q, mask=jnp.asarray(mask))).lower(q)
    (barrier,) = (x for x in program.as_text().splitlines() if "optimization_barrier" in x)
    assert "256x256xi1" in barrier


def test_a_finite_additive_mask_hides_nothing_under_a_soft_cap():
    q = draw(1, T, 1, D)
    causal = jnp.tril(jnp.ones((T, T), bool))
    want = attention(q, q, q, mask=causal, logits_soft_cap=2.0)
    cap = {"logits_soft_cap": 2.0}
    hidden = attention(q, q, q, jnp.where(causal, 0.0, -jnp.inf), **cap)
    np.testing.assert_allclose(hidden, want, rtol=1e-5, atol=1e-6)
    leaks = attention(q, q, q, jnp.where(causal, 0.0, -1e9), **cap)
    assert abs(leaks - want).max() > 0.1, "the documentation says so"
