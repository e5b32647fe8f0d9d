"""Prefixes and first keys as users give them: the mask that their docstring states, no blocks."""

# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention, explain
from pallas_kernels.attention import core, mosaic_tpu, triton
from pallas_kernels.attention.chunked import ROUTE as CHUNKED
from pallas_kernels.attention.chunks import ChunkedConfig
from tests.pallas_kernels.attention import cases

B, T, S, N, D = 2, 12, 20, 2, 8


def inputs():
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(B, n, N, D)), jnp.float32) for n in (T, S, S))


def stated_mask(*, left, right, start, prefix, offset):
    """The rule of the docstring of `attention`, entry by entry."""
    seen = np.zeros((B, 1, T, S), bool)
    for b, _, t, s in np.ndindex(*seen.shape):
        p = t + offset[b]
        seen[b, 0, t, s] = s >= start[b] and s >= p - left and (s <= p + right or s < prefix[b])
    return seen


@pytest.mark.parametrize("form", ["numbers", "arrays", "traced numbers", "sequences"])
def test_equals_the_stated_mask(form):
    start, prefix = {
        "arrays": (np.array([3, 0]), np.array([5, 17])),
        "sequences": ([3, 0], [5, 17]),
    }.get(form, (3, 11))
    offset = np.array([2, -4])
    both = np.broadcast_to(start, B), np.broadcast_to(prefix, B)
    mask = stated_mask(left=9, right=0, start=both[0], prefix=both[1], offset=offset)
    want, want_lse = cases.at_once(
        attention, *inputs(), mask=mask, implementation="reference", return_residual=True
    )

    def fn(start, prefix, implementation):
        return attention(
            *inputs(), is_causal=True, local_window_size=9, query_offset=offset,
            key_value_start=start, prefix_lengths=prefix, implementation=implementation,
            return_residual=True,
        )  # fmt: skip

    for implementation in ("chunked", "reference"):
        if form == "traced numbers":
            got, lse = jax.jit(fn, static_argnums=2)(start, prefix, implementation)
        else:
            got, lse = fn(start, prefix, implementation)
        np.testing.assert_allclose(got, want, atol=2e-6)
        np.testing.assert_allclose(lse, want_lse, atol=2e-6)


def test_what_is_before_the_first_key_may_be_nan():
    query, key, value = inputs()
    start = jnp.array([4, 0])
    before = (jnp.arange(S)[None] < start[:, None])[:, :, None, None]
    spoiled = [jnp.where(before, jnp.nan, x) for x in (key, value)]

    def loss(key, value):
        return attention(query, key, value, key_value_start=start).sum()

    got = jax.value_and_grad(loss, (0, 1))(*spoiled)
    want = jax.value_and_grad(loss, (0, 1))(key, value)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_array_equal(x, y)
    number = attention(query, *(x.at[:, :4].set(jnp.nan) for x in (key, value)), key_value_start=4)
    assert np.isfinite(number).all()


SMALL = {
    "chunked": (CHUNKED, ChunkedConfig(16, 16, 1), {}),
    "triton": (
        triton.ROUTE,
        triton.Config(*[triton.Blocks(16, 16, 4, 1)] * 4),
        {"interpret": True},
    ),
    "mosaic_tpu": (
        mosaic_tpu.ROUTE,
        mosaic_tpu.Config(*[mosaic_tpu.Blocks(128, 128, 128, 128)] * 2),
        {"interpret": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_blocks_that_are_hidden_whole_are_not_read(name):
    """Products with NaN keys show, also behind a mask, so these are never formed."""
    route, config, changes = SMALL[name]
    block = 128 if name == "mosaic_tpu" else 16
    case = cases.Case("start", queries=4 * block, keys=4 * block, heads=1, kv_heads=1, head_dim=8,
                      start=block, prefix=2 * block, right=0)  # fmt: skip
    settings, operands, _ = cases.build(case)
    settings = settings._replace(config=config, **changes)
    # Nobody sees the first block, and only the last block of rows sees the last one.
    key = operands.key.at[:, :block].set(jnp.nan).at[:, 3 * block :].set(jnp.nan)

    def attend(query, key):
        return core.attend(route, settings, operands._replace(query=query, key=key))[0]

    def all_of_it(query, key):
        output, vjp = jax.vjp(attend, query, key)
        return output, *vjp(jnp.ones_like(output))

    output, d_query, _ = cases.quick_jit(all_of_it)(operands.query, key)
    for x in (output, d_query):
        assert np.isfinite(x[:, : 3 * block]).all()
        assert np.isnan(x[:, 3 * block :]).all()


def test_a_prefix_needs_something_that_it_lifts():
    with pytest.raises(ValueError, match="prefix_lengths was given where nothing is hidden"):
        attention(*inputs(), prefix_lengths=3)
    with pytest.raises(ValueError, match="prefix_lengths was given where nothing is hidden"):
        attention(*inputs(), local_window_size=(3, None), prefix_lengths=[3, 4])
    for name in ("prefix_lengths", "key_value_start"):
        with pytest.raises(ValueError, match=rf"{name} has shape \(3,\); expected \(2,\)"):
            attention(*inputs(), is_causal=True, **{name: [1, 2, 3]})
        with pytest.raises(TypeError, match=f"{name} has dtype float32; expected integers"):
            attention(*inputs(), is_causal=True, **{name: jnp.ones(2)})


def test_explain_takes_them():
    x = jax.ShapeDtypeStruct((2, 64, 2, 32), jnp.bfloat16)
    ints = jax.ShapeDtypeStruct((2,), jnp.int32)
    found = explain(x, x, x, is_causal=True, prefix_lengths=ints, key_value_start=3)
    assert found.chosen == "chunked"
