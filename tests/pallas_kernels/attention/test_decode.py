from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import decode
from tests.pallas_kernels.attention import cases, decode_cases
from tests.pallas_kernels.attention.decode_cases import CASES, Case, build, check


def decode_attention(**arguments: Any) -> Any:
    arrays = {k: v for k, v in arguments.items() if isinstance(v, (jax.Array, np.ndarray))}
    static = {k: v for k, v in arguments.items() if k not in arrays}
    return jax.jit(lambda arrays: decode.decode_attention(**arrays, **static))(arrays)


@pytest.fixture
def small_blocks(monkeypatch):
    """Makes the loop of ``"chunked"`` take 16 keys at a time, or one page."""
    decode._compiled.clear_cache()
    monkeypatch.setattr(decode, "_config", lambda _: decode.ChunkedConfig(512, 1))
    yield
    decode._compiled.clear_cache()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_chunked(case, small_blocks):
    check(case, implementation="chunked")


@pytest.mark.parametrize("case", [*CASES[2::6], CASES[-1]], ids=str)
def test_reference(case):
    check(case, implementation="reference")


@pytest.mark.parametrize("case", CASES[::8], ids=str)
def test_chunked_in_one_block(case):
    check(case, implementation="chunked")


@pytest.mark.parametrize("capacity", [1, 15, 17, 90])
def test_last_block_of_a_cache_overlaps_the_one_before(capacity, small_blocks):
    check(Case("", capacity=capacity, lengths=(capacity, 0, 1)), implementation="chunked")


@pytest.mark.parametrize("num_splits", [2, 3, 20])
@pytest.mark.parametrize("case", [CASES[1], CASES[-1]], ids=str)
def test_number_of_splits_changes_rounding_only(case, num_splits, small_blocks):
    check(case, implementation="chunked", num_splits=num_splits)


def test_order_of_pages_changes_nothing():
    arguments, _ = build(Case("pages", page_size=8))
    want = decode_attention(**arguments, implementation="chunked")
    pages = arguments["key_cache"].shape[0]
    order = np.random.default_rng(3).permutation(pages)
    place = np.argsort(order)
    table = np.asarray(arguments["page_table"])
    moved = arguments | {
        "key_cache": arguments["key_cache"][order],
        "value_cache": arguments["value_cache"][order],
        "page_table": jnp.asarray(np.where(table < 0, -1, place[table])),
    }
    got = decode_attention(**moved, implementation="chunked")
    np.testing.assert_array_equal(got, want)


def test_table_past_the_length_is_no_data():
    arguments, _ = build(Case("pages", page_size=8))
    want = decode_attention(**arguments, implementation="chunked")
    table = np.asarray(arguments["page_table"])
    for other in (0, table.max(), 10**6):
        changed = jnp.asarray(np.where(table < 0, other, table))
        got = decode_attention(**arguments | {"page_table": changed}, implementation="chunked")
        np.testing.assert_array_equal(got, want)


def test_lengths_beyond_the_capacity_mean_all_of_it():
    arguments, _ = build(Case("", lengths=(96, 96, 96)))
    want = decode_attention(**arguments)
    np.testing.assert_array_equal(
        decode_attention(**arguments | {"lengths": [96, 97, 10**6]}), want
    )
    np.testing.assert_array_equal(
        decode_attention(**arguments | {"lengths": np.array([96, 100, 200], np.int64)}), want
    )


def test_float8_without_scales():
    case = Case("", cache_dtype="float8_e4m3fn")
    arguments, _ = build(case)
    ones = {name: jnp.ones_like(arguments[name]) for name in ("key_scale", "value_scale")}
    none = dict.fromkeys(ones)
    for implementation in ("chunked", "reference"):
        np.testing.assert_array_equal(
            decode_attention(**arguments | none, implementation=implementation),
            decode_attention(**arguments | ones, implementation=implementation),
        )


def test_is_what_attention_with_the_whole_sequence_gives():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 40, 3, 8)), jnp.float32) for _ in range(3))
    want = cases.at_once(jax.nn.dot_product_attention, q, k, v, is_causal=True)
    got = cases.at_once(decode.decode_attention, q[:, -4:], k, v, jnp.array([40, 40]))
    np.testing.assert_allclose(got, want[:, -4:], atol=2e-6)


def test_no_operation_makes_nan_or_infinity_of_finite_input(small_blocks):
    """The search for them looks at each operation of a call outside of jit."""
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.normal(size=(2, 40, 2, 8)), jnp.float32) for _ in range(3))
    lengths = jnp.array([3, 40])
    with jax.debug_nans(True), jax.debug_infs(True):
        output: Any = decode.decode_attention(query[:, -1], key, value, lengths)
        unseen: Any = decode.decode_attention(query[:, -1], key, value, jnp.array([0, 40]))
    assert output.shape == (2, 2, 8)
    np.testing.assert_array_equal(unseen, jnp.stack([0 * output[0], output[1]]))


def test_an_empty_batch():
    query, cache = jnp.zeros((0, 2, 8)), jnp.zeros((0, 16, 2, 8))
    output: Any = decode.decode_attention(query, cache, cache, jnp.zeros(0, jnp.int32))
    assert output.shape == (0, 2, 8)


@pytest.mark.parametrize("name", ["one token", "int8 pages"])
def test_vmap(name, small_blocks):
    arguments, _ = build(next(case for case in CASES if case.name == name))
    arrays = {k: v for k, v in arguments.items() if isinstance(v, jax.Array)}
    static = {k: v for k, v in arguments.items() if k not in arrays} | {"implementation": "chunked"}
    stacked = {k: jnp.stack([v, v[::-1] if k == "query" else v]) for k, v in arrays.items()}

    def fn(arrays):
        return decode_attention(**arrays, **static)

    got = jax.vmap(fn)(stacked)
    for i in range(2):
        want = fn({k: v[i] for k, v in stacked.items()})
        np.testing.assert_allclose(
            got[i].astype(jnp.float32), want.astype(jnp.float32), atol=1e-2 * (i == 3) + 1e-6
        )


@pytest.mark.parametrize("name", ["window", "int8 pages"])
def test_shard_map(name, small_blocks):
    arguments, _ = build(next(case for case in CASES if case.name == name))
    arrays = {k: v for k, v in arguments.items() if isinstance(v, jax.Array)}
    static = {k: v for k, v in arguments.items() if k not in arrays} | {"implementation": "chunked"}

    def fn(arrays):
        return decode_attention(**arrays, **static)

    mesh = jax.make_mesh((1,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.P("batch")
    got = jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=(spec,), out_specs=spec))(arrays)
    np.testing.assert_array_equal(got, jax.jit(fn)(arrays))


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
@pytest.mark.parametrize("derivative", [jax.grad, jax.jacfwd])
def test_derivatives_are_refused(derivative, implementation):
    arguments, _ = build(CASES[0])
    rest = {k: v for k, v in arguments.items() if k != "query"}

    def loss(query):
        return decode_attention(query=query, **rest, implementation=implementation).sum()

    with pytest.raises(NotImplementedError, match="decode_attention has no derivative"):
        derivative(loss)(arguments["query"])


@pytest.mark.parametrize("program", ["chunked", "chunked_pages"])
def test_no_copy_of_the_cache(program):
    fn, (arrays,), _ = getattr(decode_cases, program)()
    memory: Any = jax.jit(fn).lower(arrays).compile().memory_analysis()
    # Two blocks of 64 tokens are 4 MB in float32.
    assert memory.temp_size_in_bytes < decode_cases.CACHE_BYTES / 25


def test_time_goes_with_the_longest_length_and_the_window():
    """The loop runs over no block that nobody needs: NaN queries would show in any that it did."""
    trips = []

    def count(settings, operands, lower, upper, block):
        trips.append((int(lower), int(upper), block))
        return original(settings, operands, lower, upper, block)

    original = decode._loop_over_blocks
    arguments, _ = build(Case("", lengths=(37, 20, 1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "_config", lambda _: decode.ChunkedConfig(512, 1))
        patch.setattr(decode, "_loop_over_blocks", count)
        patch.setattr(decode, "_compiled", decode._decode)
        decode.decode_attention(**arguments, implementation="chunked")
        lengths = jnp.array([90, 85, 96])
        decode.decode_attention(
            **arguments | {"lengths": lengths, "local_window_size": 10}, implementation="chunked"
        )
    assert trips == [(0, 3, 16), (4, 6, 16)]


good = {"query": (2, 4, 8), "key_cache": (2, 16, 2, 8), "value_cache": (2, 16, 2, 6)}
paged = {"key_cache": (5, 4, 2, 8), "value_cache": (5, 4, 2, 6)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": (4, 8)}, "query has shape (4, 8); expected (B, N, d) or (B, T, N, d)"),
        (
            {"query": (2, 3, 8)},
            "K=2 heads; expected (B, S, K, d) with K a divisor of the qu",
        ),
        ({"query": (2, 4, 4)}, "key_cache has shape (2, 16, 2, 8); expected the last axis"),
        ({"query": jnp.zeros((2, 4, 8), jnp.int32)}, "key_cache has dtype float32; expected the"),
        ({"key_cache": (2, 16, 8)}, "key_cache has shape (2, 16, 8); expected (B, S, K, d)"),
        ({"value_cache": (2, 16, 1, 6)}, "value_cache has shape (2, 16, 1, 6); expected (2, 16, 2"),
        ({"key_cache": (3, 16, 2, 8), "value_cache": (3, 16, 2, 8)}, "batch size, B=2, first"),
        ({"key_cache": (2, 2, 16, 8), "value_cache": (2, 2, 16, 8)}, "length and heads, swapped?"),
        ({"key_cache": jnp.zeros((2, 16, 2, 8), jnp.bfloat16)}, "key_cache has dtype bfloat16"),
        ({"lengths": (3,)}, "lengths has shape (3,) and dtype int32; expected an integer for each"),
        ({"lengths": jnp.zeros(2)}, "lengths has shape (2,) and dtype float32"),
        (paged | {"page_table": (3, 4)}, "page_table has shape (3, 4) and dtype int32; expected"),
        (paged | {"page_table": jnp.zeros((2, 4))}, "page_table has shape (2, 4) and dtype float"),
        ({"key_scale": (2, 16, 2)}, "key_scale was given for a cache of float32"),
        (
            {"value_cache": jnp.zeros((2, 16, 2, 6), jnp.int8)},
            "value_scale=None for a cache of",
        ),
        (
            {"value_cache": jnp.zeros((2, 16, 2, 6), jnp.int8), "value_scale": (2, 2, 16)},
            "value_scale has shape (2, 2, 16)",
        ),
        (
            {"sinks": (2,)},
            "sinks has shape (2,) and dtype float32; expected a float for each",
        ),
        (
            {"local_window_size": -1},
            "local_window_size=-1; expected integers of at least 0",
        ),
        ({"local_window_size": (1, 2, 3)}, "local_window_size=(1, 2, 3)"),
        ({"logits_soft_cap": 0.0}, "logits_soft_cap=0.0; expected a positive number"),
        ({"num_splits": 0}, "num_splits=0; expected a positive int or None"),
        ({"implementation": "cudnn"}, "implementation='cudnn'; expected None or one of 'triton'"),
    ],
)
def test_bad_arguments(changes, message):
    shapes = good | {"lengths": (2,)} | changes
    integers = ("lengths", "page_table")
    arguments: dict[str, Any] = {
        name: jnp.zeros(x, jnp.int32 if name in integers else jnp.float32)
        if isinstance(x, tuple) and name != "local_window_size"
        else x
        for name, x in shapes.items()
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        decode_attention(**arguments)
    static = {k: v for k, v in arguments.items() if not isinstance(v, jax.Array)}
    arrays = {k: v for k, v in arguments.items() if k not in static}
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(lambda arrays: decode_attention(**arrays, **static), arrays)


@pytest.mark.parametrize(
    ("implementation", "message"),
    [
        ("triton", "it needs an NVIDIA GPU, and this is 'cpu'"),
        ("mosaic_tpu", "d=8; expected a"),
    ],
)
def test_routes_that_cannot_serve_say_why(implementation, message):
    arguments: dict[str, Any] = {name: jnp.zeros(shape) for name, shape in good.items()}
    with pytest.raises(NotImplementedError, match=message):
        decode_attention(**arguments, lengths=jnp.array([1, 2]), implementation=implementation)
