"""In which order a kernel visits its tiles.

A kernel keeps one block of one side (its accumulators stay in VMEM) while it passes over the blocks
of the other side: "outer" and "inner" below. The tiles that somebody sees are listed row by row in
a table that the kernel reads ahead of its grid, so that a tile that nobody sees is never a step: it
costs neither time nor a copy. A row without any tile keeps one step, which writes its zeros.

The grid has as many steps as there may be, which is exact where the mask is known at trace time.
Those that are left over come last and name the last tile again, which moves nothing.

A step is one int32: kind (2 bits), first of its row, last of its row, inner block (14), outer (13).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.mask import PARTIAL, SKIP, WHOLE, Mask, keys_of_rows, tile_kinds
from pallas_kernels.attention.mosaic_tpu import tables
from pallas_kernels.attention.mosaic_tpu.tables import Blocks
from pallas_kernels.attention.problem import Operands, Settings

LARGEST_OUTER, LARGEST_INNER = 2**13, 2**14
LARGEST_TABLE = 200_000  # entries; scalar memory holds 2**18


class Step(NamedTuple):
    """One entry of the table."""

    kind: Any
    first: Any
    last: Any
    inner: Any
    outer: Any


class Steps(NamedTuple):
    """The table of a kernel, flat, and what is known of it at trace time."""

    table: Any  # int32 (leading axes times count,)
    count: int  # steps of one entry of the leading axes
    leading: tuple[int, ...]  # each 1 where all entries share their tiles
    kinds: frozenset[int]  # which of WHOLE and PARTIAL may occur

    def offset(self, *positions: Any) -> Any:
        """Returns where the steps of the entry at `positions` begin."""
        index = 0
        for size, position in zip(self.leading, positions, strict=True):
            index = index * size + (position if size > 1 else 0)
        return index * self.count


def decode(entry: Any) -> Step:
    """Returns the parts of one entry."""
    return Step(
        entry & 3, (entry >> 2) & 1 == 1, (entry >> 3) & 1 == 1, (entry >> 4) & 0x3FFF, entry >> 18
    )


def of_rows(
    mask: Mask, batch: int, query_length: int, key_value_length: int, blocks: Blocks
) -> Steps:
    """Lists the tiles with query blocks outer and key blocks inner; leading (B or 1, N or 1)."""
    lengths = query_length, key_value_length
    return _steps(mask, batch, *lengths, blocks, lambda kinds, _: kinds)


def of_keys(
    mask: Mask,
    batch: int,
    query_length: int,
    key_value_length: int,
    blocks: Blocks,
    group: int,
    chunk: int,
) -> Steps:
    """Lists the tiles with key blocks outer; the query blocks of all heads of a group are inner.

    The query blocks are cut into chunks of `chunk`, which are listed apart. The inner block counts
    through the chunk for the first head, then for the second. Leading (B or 1, K or 1, chunks).
    """

    def arrange(kinds: Any, xp: Any) -> Any:
        b, n, nq, nk = kinds.shape
        chunks = -(-nq // chunk)
        kinds = xp.pad(kinds, ((0, 0), (0, 0), (0, chunks * chunk - nq), (0, 0)))
        if n == 1:
            kinds = xp.broadcast_to(kinds, (b, group, *kinds.shape[2:]))
        kinds = kinds.reshape(b, -1, group, chunks, chunk, nk).transpose(0, 1, 3, 5, 2, 4)
        return kinds.reshape(*kinds.shape[:4], group * chunk)

    return _steps(mask, batch, query_length, key_value_length, blocks, arrange)


def _steps(
    mask: Mask,
    batch: int,
    query_length: int,
    key_value_length: int,
    blocks: Blocks,
    arrange: Callable[[Any, Any], Any],
) -> Steps:
    lengths = query_length, key_value_length
    kinds = arrange(tile_kinds(mask, batch, *lengths, blocks.q, blocks.kv), jnp)
    count = int(np.prod(kinds.shape[-2:]))
    occurring = frozenset({WHOLE, PARTIAL})
    if mask.is_static:
        # Segments and the dense mask come on top of the interval: they only take tiles away, or
        # turn whole ones into partial ones.
        interval = arrange(_interval_kinds(mask, *lengths, blocks), np)
        count = int(_needed(interval, np).sum(axis=(-2, -1)).max())
        occurring = frozenset(np.unique(interval).tolist()) - {SKIP}
        if occurring and (mask.has_segments or mask.dense is not None):
            occurring |= {PARTIAL}
    return Steps(_table(kinds, count), count, kinds.shape[:-2], occurring)


def _interval_kinds(
    mask: Mask, query_length: int, key_value_length: int, blocks: Blocks
) -> np.ndarray:
    """Returns `tile_kinds` of a static interval, (1, 1, nq, nk), without running anything."""
    limits = mask.static_limits(query_length, key_value_length)
    first_key = np.arange(0, key_value_length, blocks.kv)
    rows = []
    for first_row in range(0, query_length, blocks.q):
        span = keys_of_rows(mask, limits, first_row, first_row + blocks.q - 1)
        needed = (first_key < span.stop) & (first_key + blocks.kv > span.start)
        whole = (first_key >= span.whole_start) & (first_key + blocks.kv <= span.whole_stop)
        rows.append(np.where(needed, np.where(whole, WHOLE, PARTIAL), SKIP))
    return np.stack(rows)[None, None]


def _needed(kinds: Any, xp: Any) -> Any:
    """Returns which tiles are steps: those that are seen, and one for a row that sees nothing."""
    needed = kinds != SKIP
    first = xp.arange(kinds.shape[-1]).reshape((1,) * (kinds.ndim - 1) + (-1,)) == 0
    return needed | (first & ~needed.any(axis=-1, keepdims=True))


def _table(kinds: Any, count: int) -> Any:
    outer, inner = kinds.shape[-2:]
    needed = _needed(kinds, jnp)
    rank = jnp.cumsum(needed, axis=-1, dtype=jnp.int32)
    first = rank == 1
    last = rank == rank[..., -1:]
    ones = (1,) * (kinds.ndim - 2)
    entry = (
        jnp.asarray(kinds, jnp.int32)
        + 4 * first
        + 8 * last
        + 16 * jnp.arange(inner, dtype=jnp.int32).reshape(*ones, 1, -1)
        + 2**18 * jnp.arange(outer, dtype=jnp.int32).reshape(*ones, -1, 1)
    ).astype(jnp.int32)
    needed, entry = (x.reshape(-1, outer * inner) for x in (needed, entry))
    rank = jnp.cumsum(needed, axis=-1, dtype=jnp.int32)
    total = rank[:, -1:]
    wanted = jnp.arange(1, count + 1, dtype=jnp.int32)[None, :]
    position = jax.vmap(jnp.searchsorted)(rank, jnp.minimum(wanted, total))
    table = jnp.take_along_axis(entry, position, axis=-1)
    return jnp.where(wanted > total, table & ~15, table).reshape(-1)


def refusal(settings: Settings, operands: Operands) -> str | None:
    """Returns why the tables of a call do not fit, or None."""
    size, mask = operands.sizes, operands.mask
    batch = 1 if mask.is_static and not mask.has_segments else size.batch
    heads = 1
    if mask.dense is not None:
        batch, heads = max(batch, mask.dense.shape[0]), mask.dense.shape[1]
    forward = tables.forward_blocks(settings, operands)
    backward = tables.backward_blocks(settings, operands)
    for outer, inner, lists in (
        (-(-size.queries // forward.q), -(-size.keys // forward.kv), batch * heads),
        (
            -(-size.keys // backward.kv),
            -(-size.queries // backward.q) * size.group,
            batch * max(1, heads // size.group),
        ),
    ):
        entries = outer * inner * lists
        if outer > LARGEST_OUTER or inner > LARGEST_INNER or entries > LARGEST_TABLE:
            return (
                f"its table of tiles has {entries} entries of {outer} x {inner} tiles; at most "
                f"{LARGEST_TABLE} of {LARGEST_OUTER} x {LARGEST_INNER} fit"
            )
    return None
