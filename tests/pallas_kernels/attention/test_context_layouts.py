"""Who holds and computes what in `ring_attention`: its layouts and plans, without any device."""

from __future__ import annotations

import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.attention import layouts
from pallas_kernels.attention.context import shard_sequence_order
from pallas_kernels.attention.mask import SKIP, Mask, tile_kinds


def seen_by(layout, n, rows, keys, left, right):
    """The mask of all devices' slices, bool (n, n, rows, keys), from their positions."""
    p = layouts.positions(layout, n, rows)[:, None, :, None]
    s = layouts.positions(layout, n, keys)[None, :, None, :]
    seen = np.ones((n, n, rows, keys), bool)
    if left is not None:
        seen &= p - left <= s
    if right is not None:
        seen &= s <= p + right
    return seen


def entries(call, offset):
    """The entries that a call computes, from the rule of `Mask`."""
    r = np.arange(call.rows.stop - call.rows.start)[:, None] + offset
    c = np.arange(call.keys.stop - call.keys.start)[None, :]
    seen = np.ones((r.shape[0], c.shape[1]), bool)
    if call.left is not None:
        assert call.left >= 0
        seen &= r - call.left <= c
    if call.right is not None:
        assert call.right >= 0
        seen &= c <= r + call.right
    return seen


bounds = st.one_of(st.none(), st.integers(0, 40))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.sampled_from(layouts.LAYOUTS),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 4),
    bounds,
    bounds,
)
def test_plans_compute_what_is_seen_and_nothing_twice(layout, n, rows, keys, left, right):
    rows, keys = 2 * rows, 2 * keys
    want = seen_by(layout, n, rows, keys, left, right)
    work = layouts.schedule(layout, n, rows, keys, left, right)
    for i, j in itertools.product(range(n), range(n)):
        step = (i - j) % n
        got = np.zeros((rows, keys), int)
        if step <= work.last:
            plan = work.remote if step else work.local
            for call in plan.branches[plan.choice[i, j]]:
                offset = call.offset if call.is_static else plan.offsets[i, j, call.pair]
                found = entries(call, offset)
                assert found.any(), "a call in which nothing is seen"
                if call.left is call.right is None:
                    assert call.offset == 0
                got[call.rows, call.keys] += found
        np.testing.assert_array_equal(got, want[i, j])


TILE = 32


@functools.cache
def needed(left, right, offset, rows, keys):
    """The tiles of a call that somebody sees."""
    mask = Mask(left=left, right=right, offset=offset)
    return int((np.asarray(tile_kinds(mask, 1, rows, keys, TILE, TILE)) != SKIP).sum())


def tiles(layout, n, length):
    """Tiles that each device computes in each step of a causal ring, (steps, n)."""
    work = layouts.schedule(layout, n, length, length, None, 0)
    found = np.zeros((n, n), int)
    for step, i in itertools.product(range(n), range(n)):
        plan = work.remote if step else work.local
        j = (i - step) % n
        for call in plan.branches[plan.choice[i, j]] if step <= work.last else ():
            offset = call.offset if call.is_static else plan.offsets[i, j, call.pair]
            rows, keys = (side.stop - side.start for side in (call.rows, call.keys))
            found[step, i] += needed(call.left, call.right, int(offset), rows, keys)
    return found


def efficiency(layout, n, length):
    """Entries that must be computed, over those that the slowest device computes in each step."""
    whole = n * length
    return whole * (whole + 1) / 2 / n / (tiles(layout, n, length).max(axis=1).sum() * TILE**2)


@pytest.mark.parametrize(("n", "chunk"), [(2, 16), (4, 8), (8, 4), (8, 16), (16, 2)])
def test_zigzag_is_balanced(n, chunk):
    length = 2 * chunk * TILE
    assert efficiency("zigzag", n, length) >= 0.98
    assert (np.ptp(tiles("zigzag", n, length), axis=1) == 0).all()


def test_contiguous_is_not_balanced():
    assert efficiency("contiguous", 8, 256) < 0.6


def test_zigzag_steps_are_one_call_without_a_mask():
    work = layouts.schedule("zigzag", 8, 64, 64, None, 0)
    assert [len(calls) for calls in work.local.branches] == [1]
    assert work.local.branches[0][0].offset == 0
    assert len(work.remote.branches) == 2
    for (call,) in work.remote.branches:
        assert call.left is call.right is None


def test_a_window_ends_the_journey():
    assert layouts.schedule("contiguous", 8, 64, 64, 63, 0).last == 1
    assert layouts.schedule("contiguous", 8, 64, 64, 65, 0).last == 2
    assert layouts.schedule("striped", 8, 64, 64, 3, 0).last == 3


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_order_is_what_devices_hold(layout):
    order, inverse = shard_sequence_order(24, 3, layout)
    assert order.dtype == inverse.dtype == np.int32
    np.testing.assert_array_equal(order.reshape(3, 8), layouts.positions(layout, 3, 8))
    np.testing.assert_array_equal(order[inverse], np.arange(24))
    x = jnp.arange(48).reshape(2, 24, 1)
    np.testing.assert_array_equal(layouts.to_positions(x[:, order], 3, layout), x)
    np.testing.assert_array_equal(layouts.from_positions(x, 3, layout), x[:, order])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((10, 4), "length=10 does not divide into 8 equal parts; expected a multiple of 8"),
        ((10, 4, "striped"), "length=10 does not divide into 4 equal parts"),
        ((8, 0), "axis_size=0; expected at least 1"),
        ((8, 2, "spiral"), "layout='spiral' is not known; expected one of zigzag, contiguous"),
    ],
)
def test_order_refuses(args, message):
    with pytest.raises(ValueError, match=message):
        shard_sequence_order(*args)
