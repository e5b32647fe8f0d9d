from __future__ import annotations

import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.attention import cost as costs
from pallas_kernels.attention.cost import PEAKS, Ceilings
from pallas_kernels.attention.mask import Mask
from pallas_kernels.targets import CHIPS
from pallas_kernels.targets.chips import Gpu
from tests.pallas_kernels.attention import oracle


def attention_cost(*args: Any, **kwargs: Any) -> Any:
    return costs.attention_cost(*args, **kwargs)


def dense_mask(t, s, left, right, offset, query_lengths, key_value_lengths, starts, prefixes):
    """The mask of every batch entry, bool (B, T, S), entry by entry."""
    mask = Mask(
        left=left,
        right=right,
        offset=offset,
        query_lengths=jnp.asarray(query_lengths, jnp.int32),
        key_value_lengths=jnp.asarray(key_value_lengths, jnp.int32),
        starts=jnp.asarray(starts, jnp.int32),
        prefix_lengths=jnp.asarray(prefixes, jnp.int32),
    )
    return oracle.visible(mask, len(query_lengths), t, s)[:, 0]


@st.composite
def problems(draw):
    t, s, batch = (draw(st.integers(1, x)) for x in (40, 40, 3))
    side = st.none() | st.integers(0, 45)
    return {
        "t": t,
        "s": s,
        "is_causal": draw(st.booleans()),
        "window": (draw(side), draw(side)),
        "offset": draw(st.integers(-45, 45)),
        "query_lengths": draw(st.lists(st.integers(0, t), min_size=batch, max_size=batch)),
        "key_value_lengths": draw(st.lists(st.integers(0, s), min_size=batch, max_size=batch)),
        "starts": draw(st.lists(st.integers(0, s), min_size=batch, max_size=batch)),
        "prefixes": draw(st.lists(st.integers(0, s), min_size=batch, max_size=batch)),
        "blocks": (draw(st.integers(1, 16)), draw(st.integers(1, 16))),
    }


@settings(max_examples=150, deadline=None)
@given(problems())
def test_counts_are_those_of_the_mask(problem):
    t, s, (left, right), (bq, bk) = (problem[x] for x in ("t", "s", "window", "blocks"))
    lengths = tuple(
        problem[x] for x in ("query_lengths", "key_value_lengths", "starts", "prefixes")
    )
    batch, n, k, d, dv = len(lengths[0]), 6, 2, 8, 5
    cost = attention_cost(
        (batch, t, n, d),
        (batch, s, k, d),
        dv,
        dtype=jnp.bfloat16,
        is_causal=problem["is_causal"],
        local_window_size=(left, right),
        query_offset=problem["offset"],
        query_seq_lengths=lengths[0],
        key_value_seq_lengths=lengths[1],
        key_value_start=lengths[2],
        prefix_lengths=lengths[3],
        block_q=bq,
        block_kv=bk,
    )
    right = 0 if problem["is_causal"] else right
    seen = dense_mask(t, s, left, right, problem["offset"], *lengths)
    pairs = n * int(seen.sum())
    assert cost.pairs == cost.exponentials == pairs
    assert cost.forward_flops == 2 * pairs * (d + dv)
    assert cost.backward_flops == 2 * pairs * (3 * d + 2 * dv)
    rows, touched = batch * t * n, int(seen.any(axis=1).sum())
    assert cost.minimum_bytes == 2 * (rows + touched * k) * (d + dv) + 4 * rows
    assert cost.backward_minimum_bytes == 2 * cost.minimum_bytes
    streamed = 0
    for b, i, j in itertools.product(range(batch), range(0, t, bq), range(0, s, bk)):
        if seen[b, i : i + bq, j : j + bk].any():
            streamed += min(bk, lengths[1][b] - j)
    assert cost.streamed_bytes == 2 * n * streamed * (d + dv)
    assert cost.blocked_bytes == 2 * (rows * (d + dv) + n * streamed * (d + dv)) + 4 * rows


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 64), st.integers(1, 500), st.sampled_from([2, 4]))
def test_halving_the_block_of_queries_doubles_what_is_streamed(blocks, s, size):
    dtype = {2: "bfloat16", 4: "float32"}[size]
    shapes = (2, 64 * blocks, 4, 32), (2, s, 4, 32)
    whole, half = (attention_cost(*shapes, dtype=dtype, block_q=x) for x in (64, 32))
    assert half.streamed_bytes == 2 * whole.streamed_bytes
    assert whole.streamed_bytes == blocks * 2 * s * 4 * 64 * size
    assert half.minimum_bytes == whole.minimum_bytes
    assert half.pairs == whole.pairs == 2 * 4 * 64 * blocks * s


def test_causal_square_is_half_and_the_diagonal():
    shape = (3, 1000, 2, 64)
    causal = attention_cost(shape, shape, dtype="float32", is_causal=True)
    assert causal.pairs == 3 * 2 * 1000 * 1001 // 2
    full = attention_cost(shape, shape, dtype="float32")
    assert full.forward_flops == 4 * 3 * 2 * 1000**2 * 64
    assert full.backward_flops == 2.5 * full.forward_flops


def test_bound_and_kernel_obey_the_same_law():
    shape = (1, 16384, 1, 128)
    several = [
        attention_cost(shape, shape, dtype="bfloat16", block_q=x, block_kv=x)
        for x in (64, 128, 256)
    ]
    for small, large in itertools.pairwise(several):
        assert small.bound_bytes == 2 * large.bound_bytes
        assert small.streamed_bytes == 2 * large.streamed_bytes
    # A block that fills the fast memory is a constant away from the bound.
    assert [x.streamed_bytes / x.bound_bytes for x in several] == [8, 8, 8]


def test_bound_of_a_small_fast_memory_is_that_of_a_matrix_product():
    shape = (1, 64, 1, 128)
    cost = attention_cost(shape, shape, dtype="float32", block_q=1, block_kv=1)
    assert cost.bound_bytes == pytest.approx(4 * 64 * 64 * 128 / np.sqrt(2 * 256))


def test_figures_of_the_specification():
    shape = (1, 16384, 16, 128)
    cost = attention_cost(shape, shape, dtype="bfloat16", chip="h200", block_q=128)
    assert cost.forward_flops == 4 * 16 * 16384**2 * 128
    # 5.4e8 elements of keys and values past the blocks of one head.
    assert cost.streamed_bytes / 2 / 16 == pytest.approx(5.4e8, rel=0.01)
    assert cost.bound_bytes / 2 / 16 == pytest.approx(3.8e7, rel=0.01)
    assert cost.forward.matrix == pytest.approx(cost.forward_flops / 989.4e12)
    assert cost.forward.binding == "matrix"


@pytest.mark.parametrize(
    ("query", "key", "chip", "binding"),
    [
        ((1, 8192, 16, 128), (1, 8192, 16, 128), "h100", "matrix"),
        ((1, 8192, 16, 32), (1, 8192, 16, 32), "h100", "exponential"),
        ((64, 1, 16, 128), (64, 8192, 16, 128), "h100", "memory"),
        ((1, 8192, 16, 32), (1, 8192, 16, 32), "v5e", "matrix"),
        ((64, 1, 16, 128), (64, 8192, 16, 128), "v6e", "memory"),
    ],
)
def test_what_binds(query, key, chip, binding):
    cost = attention_cost(query, key, dtype="bfloat16", chip=chip)
    assert cost.forward.binding == binding
    assert cost.forward.seconds == getattr(cost.forward, binding)
    times = [x for x in cost.forward if x is not None]
    assert cost.forward.seconds == max(times)
    assert (cost.forward.exponential is None) == (chip in ("v5e", "v6e"))


def test_narrow_types_take_the_rate_that_the_chip_has():
    shape = (1, 4096, 8, 128)
    times = {
        (chip, dtype): attention_cost(shape, shape, dtype=dtype, chip=chip).forward.matrix
        for chip in ("a100", "h200")
        for dtype in ("float32", "bfloat16", "float8_e4m3fn")
    }
    assert times["h200", "bfloat16"] / times["h200", "float8_e4m3fn"] == pytest.approx(2, rel=1e-3)
    assert times["a100", "bfloat16"] == times["a100", "float8_e4m3fn"]
    assert times["a100", "float32"] == 2 * times["a100", "bfloat16"]
    with pytest.raises(ValueError, match="dtype has 64 bits; expected at most 32"):
        attention_cost(shape, shape, dtype="float64", chip="a100")


def test_peaks_cover_the_chips_that_can_be_compiled_for():
    assert set(PEAKS) == set(CHIPS)
    for name, peak in PEAKS.items():
        if isinstance(chip := CHIPS[name], Gpu):
            assert peak.bandwidth == pytest.approx(chip.memory_bandwidth, rel=0.05)
            assert peak.fast_memory == chip.shared_memory_per_block


def test_ceilings_without_a_rate():
    assert Ceilings(1.0, None, 2.0).binding == "memory"
    assert Ceilings(1.0, 3.0, 2.0).seconds == 3.0
    assert attention_cost((1, 2, 1, 4), (1, 2, 1, 4), dtype="float32").forward is None


def test_nothing_to_do():
    for query, key in (((0, 4, 1, 8), (0, 4, 1, 8)), ((1, 0, 1, 8), (1, 4, 1, 8))):
        cost = attention_cost(query, key, dtype="float32", chip="v4")
        assert cost.pairs == cost.minimum_bytes == cost.streamed_bytes == 0
    assert attention_cost((1, 4, 1, 8), (1, 0, 1, 8), dtype="float32").pairs == 0


def test_no_device_is_asked():
    with jax.transfer_guard("disallow"):
        attention_cost((1, 1024, 1, 8), (1, 1024, 1, 8), dtype="float32", is_causal=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_shape": (4, 2, 8)}, "query_shape=(4, 2, 8); expected (B, T, N, d)"),
        ({"key_shape": (2, 4, 2, 8)}, "key_shape=(2, 4, 2, 8); expected (B, S, K, d) with the q"),
        ({"key_shape": (1, 4, 3, 8)}, "has K=3 heads; expected a divisor of the query's N=2"),
        (
            {"key_value_seq_lengths": [5]},
            "key_value_seq_lengths=[5]; expected 1 numbers from 0 to 4",
        ),
        ({"query_seq_lengths": [1, 1]}, "query_seq_lengths=[1, 1]; expected 1 numbers"),
        (
            {"local_window_size": (-1, 2)},
            "local_window_size=(-1, 2); expected integers of at least",
        ),
        ({"block_q": 0}, "block_q=0; expected a positive number"),
        ({"chip": "h300"}, "chip='h300' is not known; expected one of a100, l4, h100"),
    ],
)
def test_bad_arguments(changes, message):
    good = {"query_shape": (1, 4, 2, 8), "key_shape": (1, 4, 2, 8), "dtype": "float32"}
    with pytest.raises(ValueError, match=re.escape(message)):
        attention_cost(**good | changes)
