"""Nothing mixes dtypes silently: all of it runs where jax refuses to promote them."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    Alibi,
    RelativePositionBias,
    attention,
    decode_attention,
    merge_attention,
    ring_attention,
)
from tests.pallas_kernels.attention.cases import quick_jit

HALF = [jnp.bfloat16, jnp.float16]


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"):
        yield


def draw(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def close(found, wanted):
    """Equal to four roundings of a number of order one."""
    tolerance = 4 * float(jnp.finfo(found.dtype).eps)
    found, wanted = found.astype(jnp.float32), wanted.astype(jnp.float32)
    np.testing.assert_allclose(found, wanted, 0, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", ["alibi", "buckets"])
def test_rules_in_sixteen_bits(dtype, kind):
    q, table = draw(0, 1, 6, 2, 8, dtype=dtype), draw(1, 8, 2, dtype=dtype)
    if kind == "alibi":
        rule = Alibi(jnp.abs(table[0]))
    else:
        rule = RelativePositionBias(table, bidirectional=True)

    def loss(q, rule):
        output = attention(q, q, q, rule, is_causal=True, prefix_lengths=jnp.array([2], jnp.uint8))
        return output.astype(jnp.float32).sum()

    primals = q, rule
    found = quick_jit(lambda p: jax.jvp(jax.grad(loss, (0, 1)), p, p))(primals)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(dtype)}
    for implementation in ("chunked", "reference"):
        output = decode_attention(q[:, 0], q, q, 4, bias=rule, implementation=implementation)
        assert isinstance(output, jax.Array)
        assert output.dtype == dtype


@pytest.mark.parametrize("dtype", HALF)
def test_parts_in_sixteen_bits(dtype):
    q = draw(0, 1, 6, 2, 8, dtype=dtype)
    first, second = (attention(q, x, x, return_residual=True) for x in (q[:, :2], q[:, 2:]))
    output, lse = merge_attention(*first, *second)
    whole, residual = attention(q, q, q, return_residual=True)
    np.testing.assert_allclose(lse, residual, rtol=1e-5)
    # Each part is rounded to 8 or 11 bits, and the sum of the two once more.
    close(output, whole)


@pytest.mark.parametrize("dtype", HALF)
def test_a_ring_in_sixteen_bits(dtype):
    x = draw(0, 2, 1, 4, 2, 8, dtype=dtype)

    def attend(x):
        return ring_attention(
            x, x, x, axis_name="x", layout="contiguous", implementation="chunked", is_causal=True
        )

    found = quick_jit(jax.vmap(attend, axis_name="x"))(x)
    whole = x.swapaxes(0, 1).reshape(1, 8, 2, 8)
    wanted = attention(whole, whole, whole, is_causal=True).reshape(2, 1, 4, 2, 8)
    close(found, wanted)


def test_segment_ids_of_two_integer_types():
    with jax.enable_x64(True):
        q, ids = draw(0, 1, 6, 2, 8), np.array([[0, 0, 1, 1, 2, 2]])

        def attend(ids, of_keys):
            return attention(q, q, q, query_segment_ids=ids, key_value_segment_ids=of_keys)

        same = jnp.asarray(ids, jnp.int32)
        found = jax.jit(attend)(jnp.asarray(ids, jnp.int64), same)
        np.testing.assert_allclose(found, attend(same, same), rtol=1e-5, atol=1e-6)
