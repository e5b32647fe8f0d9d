"""Windows, offsets, lengths, pages and ids of any size and integer type."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.attention.integers import FAR, as_array, narrowed, same_ids, to_int32
from tests.pallas_kernels.attention.cases import at_once, quick_jit

T, S = 6, 9
Q, K, V = (
    jnp.asarray(np.random.default_rng(i).normal(size=(2, (T, S, S)[i], 2, 8)), jnp.float32)
    for i in range(3)
)
HUGE = [2**31 - 8, 2**31 - 1, 2**31, 2**40]
ROUTES = [
    {"implementation": "reference"},
    {"implementation": "chunked"},
    {"implementation": "triton", "interpret": True},
    {"implementation": "mosaic_tpu", "interpret": True},
]


def seen(left, right, offset, queries=T, keys=S):
    """The window as it reads, in Python's own integers."""
    return np.array(
        [
            [
                (left is None or s >= t + offset - left)
                and (right is None or s <= t + offset + right)
                for s in range(keys)
            ]
            for t in range(queries)
        ]
    )


def by_mask(rows):
    return at_once(pallas_kernels.attention, Q, K, V, mask=rows[None, None])


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)  # float32 sums of nine terms


SIDES = [None, 0, 1, 5, 8, 9, *HUGE, 2**31 - 3]
OFFSETS = [0, 3, -4, -20, 20, *HUGE, *(-x for x in HUGE), 2**31 - 4]


@pytest.mark.parametrize("offset", OFFSETS)
def test_narrowed_windows_hide_the_same(offset):
    for left in SIDES:
        for right in SIDES:
            got = narrowed(left, right, offset, T, S)
            np.testing.assert_array_equal(seen(*got), seen(left, right, offset))
            assert all(x is None or abs(x) < 2 * FAR for x in got)
            assert got[1] is None or right == 0 or got[1] != 0 or not -FAR < offset < FAR


def test_a_window_as_long_as_the_sequence_is_none():
    assert narrowed(T - 1, S - 1, 0, T, S) == (None, None, 0)
    assert narrowed(T - 2, S - 2, 0, T, S) == (T - 2, S - 2, 0)
    assert narrowed(T - 1, 0, 0, T, S) == (None, 0, 0)


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route["implementation"])
def test_huge_windows_and_offsets_on_every_route(route):
    for window, offset in (((2**31 - 1, 2**31 - 1), 0), ((2**31 - 2, 2), 2**31 - 1)):
        got, lse = pallas_kernels.attention(
            Q, K, V, local_window_size=window, query_offset=offset, return_residual=True, **route
        )
        assert jnp.isfinite(lse).all()
        close(got, by_mask(seen(*window, offset)))


@pytest.mark.parametrize("window", [2**31 - 1, (2, 2**31 - 1), (2**31, 0)], ids=str)
def test_huge_windows_with_positions_that_are_arrays(window):
    left, right = window if isinstance(window, tuple) else (window, window)
    attend = jax.jit(
        lambda offset: pallas_kernels.attention(
            Q, K, V, local_window_size=window, query_offset=offset
        )
    )
    for offset in (2, -3):
        close(attend(jnp.array([offset, offset])), by_mask(seen(left, right, offset)))
    close(attend(jnp.array([2**31 - 1, 5], jnp.uint32))[1:], by_mask(seen(left, right, 5))[1:])


def test_windows_that_only_a_far_position_leaves():
    """Sides as long as the sequence, which hide nothing from where it is."""
    attend = jax.jit(
        lambda offset: pallas_kernels.attention(
            Q, K, V, local_window_size=S - 1, query_offset=offset
        )
    )
    for offset in (3, -3, 12, -12):
        close(attend(jnp.array([offset, offset])), by_mask(seen(S - 1, S - 1, offset)))


@pytest.mark.slow
def test_huge_windows_of_flax_decode_and_cost():
    plain = pallas_kernels.flax_attention_fn(Q, K, V)
    cost = {"query_shape": Q.shape, "key_shape": K.shape, "dtype": "float32"}
    for huge in (*HUGE, 2**70):
        fixed = pallas_kernels.make_flax_attention_fn(local_window_size=huge)
        close(fixed(Q, K, V), plain)
        close(
            pallas_kernels.decode_attention(Q[:, 0], K, V, [4, 9], local_window_size=huge),
            pallas_kernels.decode_attention(Q[:, 0], K, V, [4, 9]),
        )
        assert pallas_kernels.attention_cost(
            **cost, local_window_size=2 * huge, query_offset=huge
        ) == pallas_kernels.attention_cost(**cost)
    with pytest.raises(ValueError, match=r"local_window_size=\(1, 2, 3\); expected a number or"):
        pallas_kernels.attention_cost(**cost, local_window_size=(1, 2, 3))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ring", "gather", "all_to_all"])
def test_huge_windows_over_several_devices(method):
    x = jax.random.normal(jax.random.key(0), (3, 2, 1, 4, 2, 8))  # two slices

    def attend(window):
        return jax.vmap(
            lambda q, k, v: pallas_kernels.ring_attention(
                q, k, v, axis_name="d", method=method, local_window_size=window, layout="contiguous"
            ),
            axis_name="d",
        )(*x)

    whole = [y.transpose(1, 0, 2, 3, 4).reshape(1, 8, 2, 8) for y in x]
    for window, same in ((2**31, None), ((2**70, 2), (7, 2))):
        want = pallas_kernels.attention(*whole, local_window_size=same)
        got = quick_jit(functools.partial(attend, window))()
        close(got.transpose(1, 0, 2, 3, 4).reshape(want.shape), want)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint16", "uint32"])
def test_decode_takes_lengths_and_pages_of_any_integer_type(dtype, traced):
    size = 300 if "8" in dtype else 70_000
    length = 100 if "8" in dtype else 30_000
    values = (jnp.arange(float(size)) < length / 2)[None, :, None, None] * jnp.ones((1, 1, 1, 1))
    keys = jnp.zeros((1, size, 1, 1))
    query = jnp.ones((1, 1, 1))
    page = size // 100
    pages = [x.reshape(100, page, 1, 1) for x in (keys, values)]
    table = np.arange(100)[None]

    def both(lengths, table):
        return (
            pallas_kernels.decode_attention(query, keys, values, lengths),
            pallas_kernels.decode_attention(query, *pages, lengths, page_table=table),
        )

    both = jax.jit(both) if traced else both
    for got in both(np.array([length], dtype), table.astype(dtype)):
        np.testing.assert_allclose(got, 0.5, rtol=1e-5)


def test_integers_keep_their_value_up_to_the_bounds():
    for dtype in ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"):
        info = np.iinfo(dtype)
        given = np.array([info.min, 0, 7, info.max], dtype)
        want = np.clip([int(x) for x in given], -5, 300)
        np.testing.assert_array_equal(to_int32("x", given, -5, 300), want)
        with jax.enable_x64(True):
            traced = jax.jit(lambda x: to_int32("x", x, -5, 300))(jnp.asarray(given))
        assert traced.dtype == jnp.int32
        np.testing.assert_array_equal(traced, want)
    np.testing.assert_array_equal(to_int32("x", [3, 400], 0, 300), [3, 300])
    with pytest.raises(TypeError, match="x has dtype float32; expected integers"):
        to_int32("x", [0.5], 0, 300)


def test_one_number_for_all_batch_entries():
    lengths = jnp.full(2, 5)
    options = {"is_causal": True, "query_seq_lengths": lengths, "key_value_seq_lengths": lengths}
    want = at_once(pallas_kernels.attention, Q, K, V, query_offset=2, **options)

    @jax.jit
    def attend(offset, length):
        return pallas_kernels.attention(
            Q, K, V, is_causal=True, query_offset=offset, query_seq_lengths=length,
            key_value_seq_lengths=length,
        )  # fmt: skip

    close(attend(2, 5), want)
    close(attend(jnp.uint8(2), np.int64(5)), want)
    decode = pallas_kernels.decode_attention
    close(jax.jit(lambda n: decode(Q[:, 0], K, V, n))(5), at_once(decode, Q[:, 0], K, V, [5, 5]))
    with pytest.raises(ValueError, match=r"query_offset has shape \(3,\).*or one number for all"):
        pallas_kernels.attention(Q, K, V, query_offset=jnp.zeros(3, int))


def test_numbers_of_several_batch_axes():
    q, k, v = (jnp.stack([x, 2 * x, -x]) for x in (Q, K, V))
    lengths = np.array([[1, 9], [4, 2], [7, 0]])
    want = [
        pallas_kernels.attention(*x, key_value_seq_lengths=own) for *x, own in zip(q, k, v, lengths)
    ]
    for given in (lengths, lengths.ravel(), jnp.asarray(lengths)):
        close(pallas_kernels.attention(q, k, v, key_value_seq_lengths=given), jnp.stack(want))


def test_integers_that_are_no_array_yet_are_not_cut_off():
    np.testing.assert_array_equal(as_array([2**40, -(2**40), 3]), [FAR, -FAR, 3])
    assert as_array(np.uint64(2**63)) == FAR
    assert as_array([0.5]).dtype == jnp.float32


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32", "int64"])
def test_prefixes_and_first_keys_of_any_integer_type(dtype):
    """In `attention` and `decode_attention`: an array for each entry, one for all, a number."""
    decode = functools.partial(pallas_kernels.decode_attention, Q, K, V, 9)

    def both(prefix, start):
        masks = {"prefix_lengths": prefix, "key_value_start": start}
        return pallas_kernels.attention(Q, K, V, is_causal=True, **masks), decode(**masks)

    want = both(4, 1)
    for given in (np.array([4, 4], dtype), np.array(4, dtype), np.dtype(dtype).type(4)):
        for got in (both(given, 1 + 0 * given), quick_jit(both)(given, 1 + 0 * given)):
            jax.tree.map(close, got, want)


@pytest.mark.parametrize("huge", HUGE)
def test_prefixes_and_offsets_beyond_the_sequence_are_all_of_it(huge):
    rule = pallas_kernels.Alibi(jnp.array([0.5, 0.0]))
    whole = pallas_kernels.attention(Q, K, V)
    close(pallas_kernels.attention(Q, K, V, is_causal=True, prefix_lengths=huge), whole)
    nothing = pallas_kernels.attention(Q, K, V, key_value_start=huge)
    np.testing.assert_array_equal(nothing, 0)
    close(pallas_kernels.attention(Q, K, V, key_value_start=-huge), whole)
    far = pallas_kernels.attention(Q, K, V, rule, query_offset=huge, is_causal=True)
    # A head with slope 0 sees all keys alike; that of the other is rounded away.
    close(far[:, :, 1], whole[:, :, 1])
    assert jnp.isfinite(far).all()


IDS = np.array([[5, 5, 5 + 2**32, -1, 7, 2**32 - 1], [3, 3, 3, 2**40, 2**40, 3 + 2**33]])


@pytest.mark.parametrize("kind", ["numpy", "jax"])
@pytest.mark.parametrize("route", ROUTES[:2], ids=lambda route: route["implementation"])
def test_segment_ids_that_differ_in_their_upper_bits_differ(kind, route):
    same = IDS[:, :, None] == IDS[:, None, :]
    want = at_once(pallas_kernels.attention, Q, K[:, :T], V[:, :T], mask=same[:, None])
    with jax.enable_x64(kind == "jax"):
        ids = IDS if kind == "numpy" else jnp.asarray(IDS)
        close(pallas_kernels.attention(Q, K[:, :T], V[:, :T], query_segment_ids=ids, **route), want)


@pytest.mark.slow
def test_ids_over_several_devices_have_one_meaning():
    x = Q[:1]
    with jax.enable_x64(True):
        ids = jnp.asarray(IDS[0])
        spread = jax.vmap(
            lambda x, ids: pallas_kernels.ring_attention(
                x, x, x, axis_name="d", layout="contiguous", query_segment_ids=ids
            ),
            axis_name="d",
        )
        got = quick_jit(spread)(x[0].reshape(3, 1, 2, 2, 8), ids.reshape(3, 1, 2))
    same = IDS[0][:, None] == IDS[0][None, :]
    want = pallas_kernels.attention(x, x, x, mask=jnp.asarray(same)[None, None])
    close(got.reshape(want.shape), want)


def test_ids_become_numbers_in_their_order():
    q, k = same_ids(IDS, IDS[:, ::-1])
    assert q.dtype == k.dtype == jnp.int32
    np.testing.assert_array_equal(q, np.asarray(k)[:, ::-1])
    assert (np.argsort(q[0], stable=True) == np.argsort(IDS[0], stable=True)).all()
    with pytest.raises(TypeError, match=r"int64 and int32; expected one integer dtype"):
        same_ids(IDS, jnp.zeros((2, 3), jnp.int32))
