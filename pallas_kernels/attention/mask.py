"""Which keys each query sees: one description, read by every implementation.

A query row t of batch entry b stands at position p = t + offset[b]. It sees key s iff all hold:

    p - left <= s  and  (s <= p + right  or  s < prefix_lengths[b])
                                                    (window; causal is right = 0)
    t < query_lengths[b]  and  starts[b] <= s < key_value_lengths[b]
    query_segment_ids[b, t] == key_value_segment_ids[b, s]
    dense[b, n, t, s]

Window, prefix, lengths and offset leave every row one interval of keys, known from a few numbers of
a batch entry (`Limits`). `keys_of_rows` and `rows_of_keys` turn them into the blocks that must be
computed and, among those, the blocks in which every entry is visible, so that no mask need be
evaluated. All functions of positions also run inside kernels, on scalars and on tiles.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

SKIP, WHOLE, PARTIAL = 0, 1, 2
"""What `tile_kinds` says of a tile: nobody sees it, everybody sees it, or the mask decides."""


class Limits(NamedTuple):
    """What the interval of a row depends on beside its position, for one batch entry."""

    offset: Any  # int or int32 scalar: position of query row 0
    query_length: Any  # rows from here on see nothing
    key_value_length: Any  # keys from here on are seen by nobody
    start: Any = None  # keys before this one are seen by nobody; None where no entry has it
    prefix: Any = None  # keys before this one are not hidden on the right; None like `start`


class Span(NamedTuple):
    """Half-open ranges of positions: those that some entry needs, those that are wholly visible."""

    start: Any
    stop: Any
    whole_start: Any
    whole_stop: Any


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "offsets",
        "query_lengths",
        "key_value_lengths",
        "query_segment_ids",
        "key_value_segment_ids",
        "dense",
        "starts",
        "prefix_lengths",
    ],
    meta_fields=["left", "right", "offset", "start", "prefix"],
)
@dataclasses.dataclass(frozen=True)
class Mask:
    """The mask of one call, a pytree: numbers known at trace time are static, the rest arrays.

    Attributes:
      left: Keys that a row sees before its own position, None for all.
      right: Keys that a row sees after its own position, None for all; 0 is causal.
      offset: Position of query row 0, where it is the same number for the whole batch.
      offsets: int32 (B,), added to `offset`, or None.
      query_lengths: int32 (B,), or None for all rows.
      key_value_lengths: int32 (B,), or None for all keys.
      query_segment_ids: int32 (B, T), given with `key_value_segment_ids` (B, S), or None.
      key_value_segment_ids: int32 (B, S), or None.
      dense: bool (B or 1, N or 1, T or 1, S or 1), or None.
      start: The first key that anybody sees, where it is the same number for the whole batch.
      starts: int32 (B,) in its place, or None.
      prefix: How many keys `right` does not hide, where it is the same number for the whole batch.
      prefix_lengths: int32 (B,) in its place, or None.
    """

    left: int | None = None
    right: int | None = None
    offset: int = 0
    offsets: jax.Array | None = None
    query_lengths: jax.Array | None = None
    key_value_lengths: jax.Array | None = None
    query_segment_ids: jax.Array | None = None
    key_value_segment_ids: jax.Array | None = None
    dense: jax.Array | None = None
    start: int = 0
    starts: jax.Array | None = None
    prefix: int = 0
    prefix_lengths: jax.Array | None = None

    @property
    def has_segments(self) -> bool:
        """Whether queries and keys carry segment ids."""
        return self.query_segment_ids is not None

    @property
    def is_static(self) -> bool:
        """Whether the interval of each row is known at trace time."""
        arrays = (
            self.offsets, self.query_lengths, self.key_value_lengths, self.starts,
            self.prefix_lengths,
        )  # fmt: skip
        return all(x is None for x in arrays)

    @property
    def has_start(self) -> bool:
        """Whether the first keys of some batch entry are hidden."""
        return self.start != 0 or self.starts is not None

    @property
    def has_prefix(self) -> bool:
        """Whether keys of some batch entry are seen from before."""
        return self.prefix != 0 or self.prefix_lengths is not None

    @property
    def columns(self) -> int:
        """How many numbers `limits` has for a batch entry: 3, or 5 with a start or a prefix."""
        return 5 if self.has_start or self.has_prefix else 3

    def limits(self, batch: int, query_length: int, key_value_length: int) -> jax.Array:
        """Returns the `Limits` of every batch entry, int32 (B, `columns`), clipped to T and S.

        This is what kernels prefetch; `Limits(*row)` of its rows gives the scalars back.
        """
        full = functools.partial(jnp.full, (batch,), dtype=jnp.int32)
        offset = full(self.offset) if self.offsets is None else self.offset + self.offsets
        columns = [offset.astype(jnp.int32)]
        for lengths, size in (
            (self.query_lengths, query_length),
            (self.key_value_lengths, key_value_length),
        ):
            given = full(size) if lengths is None else jnp.clip(lengths, 0, size)
            columns.append(given.astype(jnp.int32))
        for number, numbers in ((self.start, self.starts), (self.prefix, self.prefix_lengths)):
            if self.columns == 5:
                given = full(number) if numbers is None else numbers
                columns.append(jnp.clip(given, 0, key_value_length).astype(jnp.int32))
        return jnp.stack(columns, axis=1)

    def static_limits(self, query_length: int, key_value_length: int) -> Limits:
        """Returns the `Limits` that all batch entries share; only where `is_static`."""
        assert self.is_static
        limits = Limits(self.offset, query_length, key_value_length)
        if self.columns == 3:
            return limits
        start, prefix = (min(max(x, 0), key_value_length) for x in (self.start, self.prefix))
        return limits._replace(start=start, prefix=prefix)


def keys_of_rows(mask: Mask, limits: Limits, first_row: Any, last_row: Any) -> Span:
    """Returns the keys that the rows `first_row` to `last_row` (inclusive) see.

    Every key outside of ``start:stop`` is hidden from all of these rows; every key inside of
    ``whole_start:whole_stop`` is visible to all of them, as far as the interval decides (segments
    and the dense mask come on top). Both ranges are empty, never reversed, where there is none.
    """
    offset, query_length, key_value_length, first_key, prefix = limits
    last_valid_row = _minimum(last_row, query_length - 1)
    start = whole_start = 0 if first_key is None else first_key
    stop = whole_stop = key_value_length
    if mask.left is not None:
        start = _maximum(start, first_row + offset - mask.left)
        whole_start = _maximum(whole_start, last_row + offset - mask.left)
    if mask.right is not None:
        ends = (last_valid_row + offset + mask.right + 1, first_row + offset + mask.right + 1)
        if prefix is not None:
            ends = tuple(_maximum(x, prefix) for x in ends)
        stop, whole_stop = _minimum(stop, ends[0]), _minimum(whole_stop, ends[1])
    stop = _where(first_row < query_length, _maximum(start, stop), start)
    whole_stop = _where(last_row < query_length, _maximum(whole_start, whole_stop), whole_start)
    return Span(start, stop, whole_start, whole_stop)


def rows_of_keys(mask: Mask, limits: Limits, first_key: Any, last_key: Any) -> Span:
    """Returns the rows that see the keys `first_key` to `last_key` (inclusive), as `keys_of_rows`.

    Row ranges start at 0; the rows of ``whole_start:whole_stop`` see every one of the keys.
    """
    offset, query_length, key_value_length, start_of_keys, prefix = limits
    last_valid_key = _minimum(last_key, key_value_length - 1)
    first_valid_key = first_key
    some, every = first_key < key_value_length, last_key < key_value_length
    if start_of_keys is not None:
        first_valid_key = _maximum(first_key, start_of_keys)
        some = some & (first_valid_key <= last_valid_key)
        every = every & (first_key >= start_of_keys)
    start = whole_start = 0
    stop = whole_stop = query_length
    if mask.right is not None:
        start = _maximum(0, first_valid_key - mask.right - offset)
        whole_start = _maximum(0, last_key - mask.right - offset)
        if prefix is not None:
            start = _where(first_valid_key < prefix, 0, start)
            whole_start = _where(last_key < prefix, 0, whole_start)
    if mask.left is not None:
        stop = _minimum(stop, last_valid_key + mask.left - offset + 1)
        whole_stop = _minimum(whole_stop, first_key + mask.left - offset + 1)
    stop = _where(some, _maximum(start, stop), start)
    whole_stop = _where(every, _maximum(whole_start, whole_stop), whole_start)
    return Span(start, stop, whole_start, whole_stop)


def in_interval(mask: Mask, limits: Limits, rows: Any, keys: Any) -> Any:
    """Returns whether each row sees each key, as far as window, prefix, start and lengths decide.

    `rows` and `keys` are int32 and broadcast against each other, as do the entries of `limits`.
    """
    offset, query_length, key_value_length, start, prefix = limits
    distance = keys - rows - offset
    seen = (rows < query_length) & (keys < key_value_length)
    if start is not None:
        seen &= keys >= start
    if mask.left is not None:
        seen &= distance >= -mask.left
    if mask.right is not None:
        near = distance <= mask.right
        seen &= near if prefix is None else near | (keys < prefix)
    return seen


def visible(mask: Mask, batch: int, query_length: int, key_value_length: int) -> jax.Array:
    """Returns the whole mask, bool (B or 1, N or 1, T, S): what the reference uses."""
    rows = jnp.arange(query_length, dtype=jnp.int32)[None, :, None]
    keys = jnp.arange(key_value_length, dtype=jnp.int32)[None, None, :]
    if mask.is_static:
        limits = mask.static_limits(query_length, key_value_length)
        seen = in_interval(mask, limits, rows, keys)[:, None]
    else:
        columns = mask.limits(batch, query_length, key_value_length).T[:, :, None, None]
        seen = in_interval(mask, Limits(*columns), rows, keys)[:, None]
    if mask.query_segment_ids is not None and mask.key_value_segment_ids is not None:
        same = mask.query_segment_ids[:, :, None] == mask.key_value_segment_ids[:, None, :]
        seen &= same[:, None]
    if mask.dense is not None:
        seen = seen & mask.dense
    return seen


def tile_kinds(
    mask: Mask,
    batch: int,
    query_length: int,
    key_value_length: int,
    block_q: int,
    block_kv: int,
) -> jax.Array:
    """Returns `SKIP`, `WHOLE` or `PARTIAL` for every tile, int32 (B or 1, N or 1, nq, nk).

    Exact for windows, lengths and dense masks. Tiles are compared by the smallest and largest
    segment id of their rows and of their keys: exact for sorted ids, and otherwise never `SKIP`
    where something is visible. Rows and keys past the end count as hidden.
    """
    nq, nk = -(-query_length // block_q), -(-key_value_length // block_kv)
    first_row = jnp.arange(nq, dtype=jnp.int32)[None, None, :, None] * block_q
    first_key = jnp.arange(nk, dtype=jnp.int32)[None, None, None, :] * block_kv
    if mask.is_static:
        limits = mask.static_limits(query_length, key_value_length)
    else:
        columns = mask.limits(batch, query_length, key_value_length).T[:, :, None, None, None]
        limits = Limits(*columns)
    span = keys_of_rows(mask, limits, first_row, first_row + block_q - 1)
    needed = (first_key < span.stop) & (first_key + block_kv > span.start)
    needed &= span.start < span.stop
    whole = (first_key >= span.whole_start) & (first_key + block_kv <= span.whole_stop)
    full = (1 if mask.is_static else batch, 1, nq, nk)
    needed, whole = (jnp.broadcast_to(x, full) for x in (needed, whole))
    if mask.query_segment_ids is not None and mask.key_value_segment_ids is not None:
        q_low, q_high = (x[:, None, :, None] for x in _id_ranges(mask.query_segment_ids, block_q))
        k_low, k_high = (
            x[:, None, None, :] for x in _id_ranges(mask.key_value_segment_ids, block_kv)
        )
        needed &= (q_low <= k_high) & (k_low <= q_high)
        whole &= (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
    if mask.dense is not None:
        some, every = _dense_tiles(mask.dense, block_q, block_kv, nq, nk)
        needed, whole = needed & some, whole & every
    return jnp.where(needed, jnp.where(whole, WHOLE, PARTIAL), SKIP).astype(jnp.int32)


def first_and_last(flags: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the range over the last axis that holds all set flags, (0, 0) if there are none."""
    indices = jnp.arange(flags.shape[-1], dtype=jnp.int32)
    stop = jnp.where(flags, indices + 1, 0).max(axis=-1)
    start = jnp.where(flags, indices, flags.shape[-1]).min(axis=-1)
    return jnp.minimum(start, stop), stop


def unbroken(flags: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the range over the last axis of all set flags, (0, 0) if others are between them."""
    start, stop = first_and_last(flags)
    together = flags.sum(axis=-1, dtype=jnp.int32) == stop - start
    return jnp.where(together, start, 0), jnp.where(together, stop, 0)


def missing(length: Any, block: int) -> Any:
    """Returns what a length lacks to whole blocks, so that symbolic lengths are seen to divide."""
    return -(-length // block) * block - length


def _id_ranges(ids: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Returns the smallest and the largest id of each block of `ids` (B, L), both (B, blocks)."""
    padded = jnp.pad(ids, ((0, 0), (0, missing(ids.shape[1], block))), mode="edge")
    blocks = padded.reshape(ids.shape[0], -1, block)
    return blocks.min(axis=2), blocks.max(axis=2)


def _dense_tiles(
    dense: jax.Array, block_q: int, block_kv: int, nq: int, nk: int
) -> tuple[jax.Array, jax.Array]:
    """Returns whether some and whether every entry of each tile is True."""
    # The compiler takes minutes to fold these reductions of a mask that is a constant.
    dense = lax.optimization_barrier(dense)

    def tiles(fill: bool) -> jax.Array:
        x = dense
        for axis, block in ((2, block_q), (3, block_kv)):
            if x.shape[axis] != 1:
                padding = [(0, 0)] * 4
                padding[axis] = (0, missing(x.shape[axis], block))
                x = jnp.pad(x, padding, constant_values=fill)
        split = (
            *x.shape[:2],
            *((nq, block_q) if x.shape[2] != 1 else (1, 1)),
            *((nk, block_kv) if x.shape[3] != 1 else (1, 1)),
        )
        return x.reshape(split)

    return tiles(False).any(axis=(3, 5)), tiles(True).all(axis=(3, 5))


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, bool, np.integer, np.bool_))


def _minimum(a: Any, b: Any) -> Any:
    return min(a, b) if _is_number(a) and _is_number(b) else jnp.minimum(a, b)


def _maximum(a: Any, b: Any) -> Any:
    return max(a, b) if _is_number(a) and _is_number(b) else jnp.maximum(a, b)


def _where(condition: Any, a: Any, b: Any) -> Any:
    if _is_number(condition):
        return a if condition else b
    if _is_number(a) and _is_number(b):
        # Pallas' Triton lowering gives constants of a weak type the type of the condition.
        a, b = np.int32(a), np.int32(b)
    return jnp.where(condition, a, b)
