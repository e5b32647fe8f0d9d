"""Pages that are gathered or moved hold what they held."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compact_pages, decode_attention, take_pages

# Sequence 1 shares its first page with sequence 0; sequence 2 has ended.
P, PAGE = 9, 4
TABLE = jnp.array([[7, 2, -5], [7, 5, 1], [4, 0, 8]], jnp.int32)
LENGTHS = jnp.array([6, 12, 0], jnp.int32)
USED = [1, 2, 5, 7]


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


CACHE = {"key": normal(P, PAGE, 2, 8, seed=1), "value": normal(P, PAGE, 2, 6, seed=2)}
SCALED = {"int8": jnp.arange(P * PAGE * 2, dtype=jnp.int8).reshape(P, PAGE, 2),
          "scale": normal(P, PAGE, seed=3)}  # fmt: skip


@jax.jit
def decoded(cache, table):
    query = normal(3, 4, 8, seed=4)
    return decode_attention(
        query, cache["key"], cache["value"], LENGTHS, page_table=table, implementation="reference"
    )


def test_decoding_over_a_compacted_cache_gives_the_same():
    found = jax.jit(compact_pages)(CACHE, TABLE, LENGTHS)
    free = jnp.arange(P)[:, None, None, None] >= found.used
    cache = jax.tree.map(lambda x: jnp.where(free, jnp.nan, x), found.cache)
    np.testing.assert_array_equal(decoded(cache, found.page_table), decoded(CACHE, TABLE))


def test_pages_in_use_are_first_and_in_order():
    found = compact_pages(SCALED, TABLE, LENGTHS)
    rest = [page for page in range(P) if page not in USED]
    jax.tree.map(
        lambda got, was: np.testing.assert_array_equal(got, np.asarray(was)[USED + rest]),
        found.cache,
        SCALED,
    )
    assert found.page_table.tolist() == [[3, 1, -1], [3, 2, 0], [-1, -1, -1]]
    assert found.used == len(USED)
    again = compact_pages(*found[:2], LENGTHS)
    jax.tree.map(np.testing.assert_array_equal, again, found)


@pytest.mark.parametrize(("length", "used"), [(0, 0), (1, 2), (4, 2), (5, 5), (100, 8)])
def test_pages_that_tokens_are_in_are_in_use(length, used):
    table = jnp.array([[7, 2, 3], [7, 5, 1], [4, 0, 8]])
    assert compact_pages(SCALED, table, length).used == used


def test_a_cache_that_was_gathered_decodes_as_its_pages():
    cache = jax.jit(take_pages)(CACHE, TABLE)
    assert cache["key"].shape == (3, 3 * PAGE, 2, 8)
    np.testing.assert_array_equal(decoded(cache, None), decoded(CACHE, TABLE))


def test_a_gathered_cache_has_the_tokens_in_order():
    got = take_pages(SCALED, TABLE[1:2])
    for name, leaf in SCALED.items():
        np.testing.assert_array_equal(got[name][0], np.concatenate(np.asarray(leaf)[[7, 5, 1]]))
        assert got[name].dtype == leaf.dtype


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache": {}}, "cache has no arrays"),
        ({"cache": {"key": "x"}}, r"cache\['key'\] is a str; expected an array"),
        ({"cache": {"key": jnp.ones(4)}}, r"cache\['key'\] has shape \(4,\); expected \(pages,"),
        ({"cache": [jnp.ones((0, 4))]}, r"cache\[0\] has shape \(0, 4\); expected \(pages,"),
        ({"cache": [jnp.ones((9, 4)), jnp.ones((9, 5))]}, r"cache\[1\] .* 9 pages of 4 tokens"),
        ({"page_table": TABLE[0]}, r"page_table has shape \(3,\); expected \(sequences,"),
        ({"page_table": TABLE * 1.0}, "page_table has dtype float32; expected integers"),
        ({"lengths": jnp.ones(3)}, "lengths has dtype float32; expected integers"),
        ({"lengths": jnp.ones(2, int)}, r"lengths has shape \(2,\); expected \(3,\)"),
    ],
)
def test_wrong_calls(changes, message):
    call = {"cache": CACHE, "page_table": TABLE, "lengths": LENGTHS} | changes
    with pytest.raises((TypeError, ValueError), match=message):
        compact_pages(**call)
    if "lengths" not in changes:
        del call["lengths"]
        with pytest.raises((TypeError, ValueError), match=message):
            take_pages(**call)
