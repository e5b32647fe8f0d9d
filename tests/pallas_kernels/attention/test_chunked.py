"""Blockwise attention in plain JAX: every feature, every gradient, and linear memory."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false

from __future__ import annotations

import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import pallas_kernels
from pallas_kernels.attention import chunked, core
from pallas_kernels.attention.chunks import ChunkedConfig, choose_blocks
from tests.pallas_kernels.attention import cases, mutants

# Blocks that divide no length, and a step for every head: tiles of all kinds, padding at both ends.
SMALL = ChunkedConfig(block_q=48, block_kv=40, tile=1)

OTHER_BLOCKS = [
    (cases.CASES[i], config)
    for i, config in (
        (5, None),
        (34, ChunkedConfig(16, 128)),
        (34, ChunkedConfig(64, 32, 2 * 64 * 32)),
    )
]
# What wrong variants are caught by (`mutants.py`) is always run, and what has every feature.
QUICK = cases.QUICK | {mutant.case for mutant in mutants.CASES}
HALF = [
    cases.CASES[i].replace(dtype=dtype, name=f"{cases.CASES[i]}, {dtype}")
    for dtype, i in (("bfloat16", 1), ("bfloat16", 34), ("float16", 34))
]


@pytest.mark.parametrize(
    "case", [*cases.some_slow(cases.CASES, QUICK), *cases.BY_DISTANCE, *HALF], ids=str
)
def test_values_and_gradients(case):
    cases.check_route(chunked.ROUTE, case, config=SMALL)


@pytest.mark.parametrize(("case", "config"), OTHER_BLOCKS, ids=str)
def test_any_blocks(case, config):
    cases.check_route(chunked.ROUTE, case, config=config)


@pytest.mark.slow
@hypothesis.given(
    st.builds(
        cases.Case,
        name=st.just("drawn"),
        batch=st.integers(1, 2),
        queries=st.integers(1, 40),
        keys=st.integers(1, 40),
        heads=st.sampled_from([2, 4]),
        kv_heads=st.sampled_from([1, 2]),
        head_dim=st.sampled_from([8, 24]),
        left=st.none() | st.integers(0, 45),
        right=st.none() | st.integers(0, 45),
        offset=st.integers(-45, 45),
        segments=st.none() | st.sampled_from(["sorted", "shuffled", "disjoint"]),
        dense=st.none() | st.sampled_from(["s", "bt", "nts"]),
        seed=st.integers(0, 3),
    )
)
@hypothesis.settings(deadline=None, max_examples=6, derandomize=True)
def test_any_shape_and_mask(case):
    cases.check_route(chunked.ROUTE, case, config=ChunkedConfig(16, 8, 1))


def test_blocks_are_even_and_follow_the_group():
    def blocks(t, s, heads=8, kv_heads=8, batch=1, config=None):
        case = cases.Case("x", batch, t, s, heads, kv_heads)
        settings, operands, _ = cases.build(case)
        return choose_blocks(settings._replace(config=config), operands)

    assert blocks(512, 512)[2:] == (512, 512)
    assert blocks(600, 600)[2:] == (304, 304), "two even blocks and not one and a rest"
    assert blocks(3, 5)[2:] == (3, 5)
    assert blocks(512, 512, kv_heads=1).q == 64, "the rows of a group are in one tile"
    assert blocks(64, 64, batch=3, config=ChunkedConfig(tile=2**30))[:2] == (3, 8)
    assert blocks(64, 64, config=ChunkedConfig(tile=1))[:2] == (1, 1)


def test_memory_is_linear_in_the_length():
    def temporaries(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.float32)

        def loss(q, k, v):
            return pallas_kernels.attention(q, k, v, is_causal=True).sum()

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, middle, large = map(temporaries, (1024, 2048, 4096))
    assert middle < 2.2 * small
    assert large < 2.2 * middle
    # Beside the tiles of 512 x 512: q, k, v, do, lse and delta with heads first, and dq in float32.
    assert large < 10 * 4096 * 2 * 64 * 4 + 8 * 512 * 512 * 4


@pytest.mark.parametrize(
    "change",
    [
        {"queries": 1, "keys": 1},
        {"queries": 7, "keys": 3},
        {"queries": 63, "keys": 65},
        {"queries": 129, "keys": 127, "left": 200, "right": 200},
        {"left": 10, "right": None},
        {"left": None, "right": 10},
        {"right": 0, "offset": -1000},
        {"key_value_lengths": (0,), "bias": "ts", "soft_cap": 1.0},
        {"query_lengths": (0,), "sinks": True},
        {"soft_cap": 0.1},
        {"soft_cap": 1e4},
        {"dropout_rate": 0.999},
        {"head_dim": 111, "value_dim": 8},
    ],
    ids=str,
)
def test_nasty(change):
    case = dataclasses.replace(cases.Case("nasty", queries=70, keys=70), **change)
    case = case.replace(name=str(change))
    cases.check_route(chunked.ROUTE, case, config=SMALL)


def _attend(problem, **changes):
    settings = problem.settings._replace(config=SMALL)
    return core.attend(chunked.ROUTE, settings, problem.operands._replace(**changes))


def test_extreme_scores():
    problem = cases.build(cases.Case("extreme", queries=70, keys=70, right=0))
    operands = problem.operands
    # Scores of +-1e5 make the softmax a maximum: the value of the best key, and finite gradients.
    query, key = 1e4 * operands.query, operands.key
    output, lse = cases.quick_jit(lambda query: _attend(problem, query=query))(query)
    scores = np.einsum("btnd,bsnd->bnts", query, key).astype(np.float64) / 8
    scores[:, :, ~np.tril(np.ones((70, 70), bool))] = -np.inf
    best = scores.argmax(3)
    want = np.take_along_axis(np.asarray(operands.value), best.transpose(0, 2, 1)[..., None], 1)
    np.testing.assert_allclose(output, want, rtol=1e-5)
    np.testing.assert_allclose(lse, scores.max(3), rtol=1e-5)
    gradient = cases.quick_jit(jax.grad(lambda q: _attend(problem, query=q)[0].sum()))(query)
    assert np.isfinite(gradient).all()

    # All scores equal, in float16 with entries near its largest number: a mean.
    huge = jnp.full((1, 70, 2, 64), 60_000, jnp.float16)
    value = operands.value.astype(jnp.float16)
    output, _ = _attend(problem, query=huge, key=jnp.zeros_like(huge), value=value)
    want = np.cumsum(np.asarray(value, np.float32), 1) / np.arange(1, 71)[:, None, None]
    np.testing.assert_allclose(output, want, atol=2e-3)


def test_lse_far_below_zero_overflows_nothing():
    case = cases.Case("low", queries=64, keys=64 + 128, key_value_lengths=(64 + 64,))
    problem = cases.build(case)
    bias = jnp.full((1, 1, 1, 1), -200.0)

    def loss(query):
        output, lse = _attend(problem, query=query, bias=bias)
        return output.sum() + lse.sum()

    value, gradient = cases.quick_jit(jax.value_and_grad(loss))(problem.operands.query)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0


@pytest.mark.parametrize("fill", [-np.inf, np.finfo(np.float32).min, np.nan])
def test_bias_behind_the_mask_is_not_seen(fill):
    problem = cases.build(cases.Case("bias", queries=70, keys=70, right=0, bias="ts", soft_cap=3.0))
    hidden = ~np.tril(np.ones((70, 70), bool))
    bias = jnp.where(hidden, fill, problem.operands.bias)

    def outputs(bias):
        return cases.quick_jit(lambda bias: _attend(problem, bias=bias))(bias)

    for got, want in zip(outputs(bias), outputs(problem.operands.bias)):
        np.testing.assert_array_equal(got, want)
    gradient = cases.quick_jit(jax.grad(lambda b: _attend(problem, bias=b)[0].sum()))(bias)
    assert np.isfinite(gradient).all()
    assert (gradient[0, 0][hidden] == 0).all()


def test_keys_with_a_bias_of_minus_infinity_are_as_hidden():
    problem = cases.build(cases.Case("inf", queries=70, keys=70, bias="s"))
    bias = problem.operands.bias.at[..., 10:].set(-jnp.inf)
    mask = dataclasses.replace(problem.operands.mask, key_value_lengths=jnp.array([10], jnp.int32))
    got, _ = _attend(problem, bias=bias)
    want, _ = _attend(problem, mask=mask)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_repeats_are_bit_equal():
    problem = cases.build(cases.CASES[34])
    step = jax.jit(lambda q: jax.value_and_grad(lambda q: _attend(problem, query=q)[0].sum())(q))
    first = step(problem.operands.query)
    for _ in range(20):
        for got, want in zip(step(problem.operands.query), first):
            np.testing.assert_array_equal(got, want)
