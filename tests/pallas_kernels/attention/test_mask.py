"""The one description of the mask, against its rule evaluated entry by entry."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false

from __future__ import annotations

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from pallas_kernels.attention import mask as masks
from pallas_kernels.attention.mask import Limits, Mask
from tests.pallas_kernels.attention import oracle
from tests.pallas_kernels.attention.cases import quick_jit

T, S = 13, 17

limits_of_a_row = st.none() | st.integers(0, 20)
windows = st.builds(
    Mask,
    left=limits_of_a_row,
    right=limits_of_a_row,
    offset=st.integers(-20, 20),
    start=st.integers(0, S + 3) | st.just(0),
    prefix=st.integers(0, S + 3) | st.just(0),
)


@hypothesis.given(windows, st.integers(0, T), st.integers(0, S))
@hypothesis.settings(deadline=None, max_examples=300)
def test_spans_hold_what_some_and_what_all_see(mask, query_length, key_value_length):
    limits = mask.static_limits(query_length, key_value_length)
    rows, keys = np.arange(T)[:, None], np.arange(S)
    seen = np.asarray(masks.in_interval(mask, limits, rows, keys))
    for first, last in ((0, 3), (4, 4), (5, 11), (0, T - 1), (12, T + 2)):
        block = seen[first : last + 1]
        span = masks.keys_of_rows(mask, limits, first, last)
        assert all(isinstance(x, int) for x in span), "known numbers stay Python numbers"
        _check(span, block.any(0), block.all(0), last < T, S)
    for first, last in ((0, 3), (4, 4), (5, 11), (0, S - 1), (15, S + 2)):
        block = seen[:, first : last + 1]
        span = masks.rows_of_keys(mask, limits, first, last)
        _check(span, block.any(1), block.all(1), last < S, T)


def _check(span, some, every, complete, size):
    assert 0 <= span.start <= span.stop
    assert span.whole_start <= span.whole_stop
    (needed,) = np.nonzero(some)
    if needed.size:  # exactly what is needed, from the first to the last
        assert (span.start, span.stop) == (needed[0], needed[-1] + 1)
    else:
        assert span.start == span.stop
    whole = np.arange(span.whole_start, min(span.whole_stop, size))
    assert every[whole].all()
    if complete and every.any():
        (all_of_it,) = np.nonzero(every)
        assert (span.whole_start, span.whole_stop) == (all_of_it[0], all_of_it[-1] + 1)


def test_a_block_that_sees_nothing_has_an_empty_span():
    causal = Mask(right=0, offset=-50)
    assert masks.keys_of_rows(causal, Limits(-50, T, S), 0, 7)[:2] == (0, 0)
    beyond = masks.keys_of_rows(Mask(), Limits(0, 4, S), 8, 11)
    assert beyond.start == beyond.stop
    unseen = masks.rows_of_keys(Mask(), Limits(0, T, 4), 8, 11)
    assert unseen.start == unseen.stop


def random_mask(rng, batch):
    def maybe(value):
        return value if rng.random() < 0.5 else None

    segments = rng.random() < 0.5
    return Mask(
        left=maybe(int(rng.integers(0, 20))),
        right=maybe(int(rng.integers(0, 20))),
        offset=int(rng.integers(-10, 10)),
        offsets=maybe(jnp.asarray(rng.integers(-5, 5, batch), jnp.int32)),
        query_lengths=maybe(jnp.asarray(rng.integers(0, T + 3, batch), jnp.int32)),
        start=int(rng.integers(0, 6)),
        prefix_lengths=maybe(jnp.asarray(rng.integers(0, S + 3, batch), jnp.int32)),
        key_value_lengths=maybe(jnp.asarray(rng.integers(0, S + 3, batch), jnp.int32)),
        query_segment_ids=jnp.sort(jnp.asarray(rng.integers(0, 3, (batch, T))))
        if segments
        else None,
        key_value_segment_ids=jnp.sort(jnp.asarray(rng.integers(0, 3, (batch, S))))
        if segments
        else None,
        dense=maybe(jnp.asarray(rng.random((batch, 1, T, 1 if rng.random() < 0.3 else S)) < 0.6)),
    )


@pytest.mark.parametrize("seed", range(12))
def test_visible_and_tile_kinds(seed):
    rng = np.random.default_rng(seed)
    batch, block_q, block_kv = 2, int(rng.integers(1, 6)), int(rng.integers(1, 6))
    mask = random_mask(rng, batch)
    want = np.broadcast_to(oracle.visible(mask, batch, T, S), (batch, 1, T, S))

    @quick_jit
    def both(mask):
        kinds = masks.tile_kinds(mask, batch, T, S, block_q, block_kv)
        return masks.visible(mask, batch, T, S), kinds

    seen, kinds = map(np.asarray, both(mask))
    np.testing.assert_array_equal(np.broadcast_to(seen, want.shape), want)
    nq, nk = -(-T // block_q), -(-S // block_kv)
    kinds = np.broadcast_to(kinds, (batch, 1, nq, nk))
    padded = np.zeros((batch, 1, nq * block_q, nk * block_kv), bool)
    padded[:, :, :T, :S] = want
    tiles = padded.reshape(batch, nq, block_q, nk, block_kv)
    some, every = tiles.any((2, 4)), tiles.all((2, 4))
    kinds = kinds[:, 0]
    assert not some[kinds == masks.SKIP].any(), "something visible is skipped"
    assert every[kinds == masks.WHOLE].all(), "something hidden counts as whole"
    if mask.query_segment_ids is None and mask.dense is None:
        assert (some == (kinds != masks.SKIP)).all(), "exact for windows and lengths"
        assert (every == (kinds == masks.WHOLE)).all()
    if mask.dense is None and mask.left is None and mask.right is None:
        # Sorted ids: at least every tile in which no segment meets is skipped.
        assert (kinds[~some] != masks.WHOLE).all()


def test_limits_are_clipped_to_the_arrays():
    mask = Mask(
        offset=2,
        offsets=jnp.asarray([1, -1], jnp.int32),
        query_lengths=jnp.asarray([-3, 99], jnp.int32),
    )
    np.testing.assert_array_equal(mask.limits(2, T, S), [[3, 0, S], [1, T, S]])
    assert not mask.is_static
    assert Mask(offset=4).static_limits(T, S) == (4, T, S, None, None)
    assert Mask(start=-1, prefix=99).static_limits(T, S) == (0, T, S, 0, S)
    starts = Mask(starts=jnp.asarray([-3, 99], jnp.int32))
    np.testing.assert_array_equal(starts.limits(2, T, S), [[0, T, S, 0, 0], [0, T, S, S, 0]])
