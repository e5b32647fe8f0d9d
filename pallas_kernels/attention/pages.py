"""Pages of a key/value cache: gathered for a sequence, and moved to the front when others end."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _options
from pallas_kernels.attention.integers import FAR, per_entry, to_int32
from pallas_kernels.attention.placement import Leading


class CompactedPages(NamedTuple):
    """What `compact_pages` returns.

    Attributes:
      cache: The arrays that were given, with the pages in use first.
      page_table: int32 (B, pages_per_sequence), where each page is; -1 where it is not in use.
      used: int32 (), how many pages are in use; those from there on are free.
    """

    cache: Any
    page_table: jax.Array
    used: jax.Array


def take_pages(cache: Any, page_table: jax.Array) -> Any:
    """Gathers the pages of sequences into a cache without pages.

    Token s of sequence b is row ``s % page_size`` of page ``page_table[b, s // page_size]`` before,
    and row s of entry b after: what `decode_attention` reads without a `page_table`, and what can
    be sent to other devices.

    Args:
      cache: A pytree of arrays (P, page_size, ...): keys, values, their scales.
      page_table: Integers (B, pages_per_sequence), such as some rows of that of all sequences.
        Numbers that no page has are clipped.

    Returns:
      The same pytree of arrays (B, pages_per_sequence * page_size, ...). Rows past the length of a
      sequence hold anything.

    Raises:
      ValueError: A shape does not fit; the message names the leaf.
      TypeError: `page_table` has no integers, or a leaf is no array.

    Example:
      >>> import jax.numpy as jnp, pallas_kernels
      >>> pages = jnp.arange(8).reshape(4, 2)
      >>> pallas_kernels.take_pages(pages, jnp.array([[3, 0]])).tolist()
      [[6, 7, 0, 1]]
    """
    pages, page_size = _checked_cache(cache)
    table = _checked_table(page_table, pages)
    rows = table.shape[1] * page_size

    def take(leaf: Any) -> jax.Array:
        leaf = jnp.asarray(leaf)
        return leaf[table].reshape(table.shape[0], rows, *leaf.shape[2:])

    return jax.tree.map(take, cache)


def compact_pages(cache: Any, page_table: jax.Array, lengths: Any) -> CompactedPages:
    """Moves the pages that sequences use to the front, in the order in which they are.

    A page is in use where a token before the length of some sequence is in it; sequences may share
    pages. Give a sequence that has ended the length 0. What `decode_attention` returns for the new
    cache and table is what it returned for the old ones.

    Args:
      cache: A pytree of arrays (P, page_size, ...): keys, values, their scales.
      page_table: Integers (B, pages_per_sequence), as for `decode_attention`.
      lengths: Integers (B,), or one for all: the number of tokens of each sequence. Numbers beyond
        the capacity mean all of it.

    Returns:
      `CompactedPages`, of the same shapes and dtypes.

    Raises:
      ValueError: A shape does not fit; the message names the leaf or argument.
      TypeError: `page_table` or `lengths` has no integers, or a leaf is no array.

    Example:
      >>> import jax.numpy as jnp, pallas_kernels
      >>> pages = jnp.arange(8).reshape(4, 2)
      >>> cache, table, used = pallas_kernels.compact_pages(
      ...     pages, jnp.array([[3, 1], [2, 0]]), jnp.array([3, 0]))
      >>> cache.tolist(), table.tolist(), int(used)
      ([[2, 3], [6, 7], [0, 1], [4, 5]], [[1, 0], [-1, -1]], 2)
    """
    pages, page_size = _checked_cache(cache)
    table = _checked_table(page_table, pages)
    lengths = per_entry("lengths", lengths, Leading(table.shape[:1]), 0)
    columns = jnp.arange(table.shape[1], dtype=jnp.int32)
    in_use = columns[None, :] * page_size < lengths[:, None]
    used = jnp.zeros(pages, bool).at[jnp.where(in_use, table, pages)].set(True, mode="drop")
    order = jnp.argsort(~used, stable=True)
    place = jnp.argsort(order).astype(jnp.int32)
    return CompactedPages(
        cache=jax.tree.map(lambda leaf: jnp.asarray(leaf)[order], cache),
        page_table=jnp.where(in_use, place[table], -1),
        used=used.sum(dtype=jnp.int32),
    )


def _checked_cache(cache: Any) -> tuple[int, int]:
    """Returns the number of pages and their size, the same for all leaves."""
    found: tuple[int, int] | None = None
    for path, leaf in jax.tree_util.tree_leaves_with_path(cache):
        name = f"cache{jax.tree_util.keystr(path)}"
        shape = _options.array(name, leaf).shape
        if len(shape) < 2 or shape[0] == 0:
            raise ValueError(f"{name} has shape {shape}; expected (pages, page_size, ...)")
        if found is not None and shape[:2] != found:
            raise ValueError(
                f"{name} has shape {shape}; expected {found[0]} pages of {found[1]} tokens, as the "
                "leaves before"
            )
        found = shape[:2]
    if found is None:
        raise ValueError("cache has no arrays; expected at least one (pages, page_size, ...)")
    return found


def _checked_table(page_table: Any, pages: int) -> jax.Array:
    page_table = _options.array("page_table", page_table)
    if page_table.ndim != 2:
        raise ValueError(
            f"page_table has shape {page_table.shape}; expected (sequences, pages of a sequence)"
        )
    return to_int32("page_table", page_table, 0, min(pages - 1, FAR))
