"""How blockwise attention in plain JAX cuts up its arrays: what `chunked` computes on."""

from __future__ import annotations

import itertools
import math
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _compat
from pallas_kernels._dtypes import wide
from pallas_kernels.attention import tuning
from pallas_kernels.attention.mask import missing, tile_kinds
from pallas_kernels.attention.problem import Operands, Settings, Sizes


class ChunkedConfig(NamedTuple):
    """How much is computed at once; what is None comes from the file of block sizes.

    Attributes:
      block_q: Rows of queries; None: `rows`, shared by the heads of a group.
      block_kv: Keys.
      tile: Entries of all scores alive at once; None: by the platform.
      rows: Rows of scores with one key/value head.
    """

    block_q: int | None = None
    block_kv: int | None = None
    tile: int | None = None
    rows: int | None = None

    @property
    def is_possible(self) -> bool:
        """Whether all sizes are positive."""
        return all(x is None or x > 0 for x in self)


class Blocks(NamedTuple):
    """How much one step computes."""

    batch: int  # batch entries a step
    heads: int  # key/value heads a step
    q: int
    kv: int


class Arranged(NamedTuple):
    """`Operands` but the query, with heads before the length, and padded to whole blocks."""

    key: jax.Array  # (B, K, S', d)
    value: jax.Array  # (B, K, S', dv)
    limits: jax.Array  # int32 (B, 3)
    bias: jax.Array | None  # (B or 1, K or 1, G or 1, T' or 1, S' or 1)
    dense: jax.Array | None  # likewise, bool
    q_ids: jax.Array | None  # (B, T')
    kv_ids: jax.Array | None  # (B, S')
    seeds: jax.Array | None  # (B, K, G)
    diagonals: jax.Array | None  # (B or 1, K, G, 1, T' + S')
    kinds: jax.Array | None  # (B or 1, K or 1, G or 1, nq, nk), where the interval does not decide


def choose_blocks(settings: Settings, operands: Operands) -> Blocks:
    """Returns blocks of about equal sizes: a tile of scores fits a cache, or fills an accelerator.

    Accelerators take as many heads at once as 64 MiB of scores allow.
    """
    size = operands.sizes
    given, listed = settings.config, _listed(operands)
    given = ChunkedConfig() if given is None else given
    assert isinstance(given, ChunkedConfig)
    config = ChunkedConfig(*(y if x is None else x for x, y in zip(given, listed)))
    assert config.rows is not None
    assert config.block_kv is not None
    cpu = _compat.device().platform == "cpu"
    block_q = _even(size.queries, config.block_q or max(64, config.rows // size.group))
    block_kv = _even(size.keys, config.block_kv)
    # Where a head is one tile, a step costs more than scores that leave the cache.
    known = isinstance(size.queries, int) and isinstance(size.keys, int)
    one_tile = known and block_q >= size.queries and block_kv >= size.keys
    of_cpu = 2 ** (19 if one_tile else 18) * max(2, os.cpu_count() or 1)
    tile = config.tile or (of_cpu if cpu else 2**24)
    at_once = max(1, tile // max(1, size.group * block_q * block_kv))
    heads = _divisor(size.kv_heads, at_once)
    batch = _divisor(size.batch, at_once // heads) if heads == size.kv_heads else 1
    return Blocks(batch, heads, block_q, block_kv)


def choices(operands: Operands) -> tuple[tuning.Choice, ...]:
    """Returns the blocks to try, which serve the forward and the backward pass alike."""
    size = operands.sizes
    rows = tuning.largest((128, 256, 512, 1024, 2048), size.queries * size.group)
    keys = tuning.largest((128, 256, 512, 1024), size.keys)
    tried = (ChunkedConfig(block_kv=kv, rows=r) for r, kv in itertools.product(rows, keys))
    return (tuning.Choice(tuning.ALL, "gradient", _listed(operands), tuple(tried)),)


def _listed(operands: Operands) -> ChunkedConfig:
    device = _compat.device()
    lookup = tuning.lookup_of(operands, device, device.platform)
    return tuning.find("chunked", ChunkedConfig, tuning.ALL, lookup)


def _even(length: int, block: int) -> int:
    """Returns the size of the fewest blocks of at most `block`, evened out: little is padding."""
    if not isinstance(length, int):  # symbolic, in a program to be exported
        return block
    if length <= block:
        return max(length, 1)
    return min(block, -(-math.ceil(length / math.ceil(length / block)) // 8) * 8)


def _divisor(number: int, most: int) -> int:
    if not isinstance(number, int):
        return 1
    return next((d for d in range(min(number, most), 0, -1) if number % d == 0), 1)


def pad(x: jax.Array, axis: int, block: int) -> jax.Array:
    """Pads an axis with zeros to a multiple of `block`."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing(x.shape[axis], block))
    return jnp.pad(x, widths)


def heads_first(x: jax.Array, kv_heads: int, block: int) -> jax.Array:
    """Turns (B, T, N, d) into (B, K, G, T', d)."""
    b, t, n, d = x.shape
    split = x.reshape(b, t, kv_heads, n // kv_heads, d).transpose(0, 2, 3, 1, 4)
    return pad(split, 3, block)


def from_steps(x: jax.Array, size: Sizes, blocks: Blocks, parts: int) -> jax.Array:
    """Turns (steps, b, k, G, block, d), steps of batch, heads and parts, into (B, T', N, d)."""
    x = x.reshape(size.batch // blocks.batch, size.kv_heads // blocks.heads, parts, *x.shape[1:])
    x = x.transpose(0, 3, 2, 6, 1, 4, 5, 7)  # batch, b, part, row, heads, k, G, d
    b, b_, part, row, heads, k, g, d = x.shape
    return x.reshape(b * b_, part * row, heads * k * g, d)


def arrange(operands: Operands, blocks: Blocks) -> Arranged:
    """Returns `operands` in the form that blocks are cut from."""
    size = operands.sizes
    mask = operands.mask

    def five(a: jax.Array | None) -> jax.Array | None:
        if a is None:
            return None
        b, n, t, s = a.shape
        heads = (1, 1) if n == 1 else (size.kv_heads, size.group)
        a = a.reshape(b, *heads, t, s)
        a = pad(a, 3, blocks.q) if t != 1 else a
        return pad(a, 4, blocks.kv) if s != 1 else a

    kinds = None
    if mask.has_segments or mask.dense is not None:
        kinds = tile_kinds(mask, size.batch, size.queries, size.keys, blocks.q, blocks.kv)
        heads = (1, 1) if kinds.shape[1] == 1 else (size.kv_heads, size.group)
        kinds = kinds.reshape(kinds.shape[0], *heads, *kinds.shape[2:])
    ids = (mask.query_segment_ids, mask.key_value_segment_ids)
    q_ids, kv_ids = (
        None if a is None else pad(a, 1, block) for a, block in zip(ids, (blocks.q, blocks.kv))
    )
    seeds = operands.seeds
    if seeds is not None:
        seeds = seeds.reshape(size.batch, size.kv_heads, size.group)
    diagonals = operands.diagonals
    if diagonals is not None:
        split = (diagonals.shape[0], size.kv_heads, size.group, 1, diagonals.shape[2])
        widths = (missing(size.queries, blocks.q), missing(size.keys, blocks.kv) + 1)
        diagonals = jnp.pad(diagonals.reshape(split), [(0, 0)] * 4 + [widths])
    return Arranged(
        key=heads_first(operands.key, size.kv_heads, blocks.kv)[:, :, 0],
        value=heads_first(operands.value, size.kv_heads, blocks.kv)[:, :, 0],
        limits=mask.limits(size.batch, size.queries, size.keys),
        bias=five(operands.bias),
        dense=five(mask.dense),
        q_ids=q_ids,
        kv_ids=kv_ids,
        seeds=seeds,
        diagonals=diagonals,
        kinds=kinds,
    )


def band(
    x: jax.Array, blocks: Blocks, position: tuple[Any, Any, Any, Any], query_length: int
) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """Returns corner and size of the part of `Arranged.diagonals` that tile (b, k, i, j) reads."""
    b, k, i, j = position
    rows = query_length + missing(query_length, blocks.q)
    start = j * blocks.kv - i * blocks.q + rows - blocks.q
    return (b, k, 0, 0, start), (blocks.batch, blocks.heads, *x.shape[2:4], blocks.q + blocks.kv)


def bias_gradient_of(total: jax.Array, operands: Operands, blocks: Blocks) -> dict[str, jax.Array]:
    """Returns the gradient of the bias or of the diagonals, by its name in `Gradients`."""
    if operands.bias is not None:
        shape = operands.bias.shape
        total = total[..., : shape[2], : shape[3]].reshape(shape)
        return {"bias": total.astype(operands.bias.dtype)}
    assert operands.diagonals is not None
    first, shape = missing(operands.sizes.queries, blocks.q), operands.diagonals.shape
    return {"diagonals": total[..., first : first + shape[2]].reshape(shape)}


def position(group: jax.Array, kv_heads: int, blocks: Blocks) -> tuple[jax.Array, jax.Array]:
    """Returns the first batch entry and the first key/value head of a step."""
    steps = kv_heads // blocks.heads
    return (group // steps) * blocks.batch, (group % steps) * blocks.heads


def part(x: jax.Array, start: tuple[Any, ...], size: tuple[int, ...]) -> jax.Array:
    """Slices the leading axes of `x`; an axis of length 1 broadcasts and stays."""
    size = tuple(1 if n == 1 else s for s, n in zip(size, x.shape)) + x.shape[len(size) :]
    return lax.dynamic_slice(x, _corner(x, start), size)


def add_summed(total: jax.Array, tile: jax.Array, start: tuple[Any, ...]) -> jax.Array:
    """Adds `tile` to a part of `total`, summed over the axes that have length 1 there."""
    axes = tuple(a for a, n in enumerate(total.shape) if n == 1 and tile.shape[a] != 1)
    tile = tile.sum(axis=axes, keepdims=True)
    corner = _corner(total, start)
    return lax.dynamic_update_slice(
        total, lax.dynamic_slice(total, corner, tile.shape) + tile, corner
    )


def _corner(x: jax.Array, start: tuple[Any, ...]) -> tuple[jax.Array, ...]:
    """Returns where a part of `x` begins, in one dtype also where Python numbers are 64 bits."""
    given = (*start, *(0,) * (x.ndim - len(start)))
    return tuple(jnp.asarray(0 if n == 1 else s, jnp.int32) for s, n in zip(given, x.shape))


def keys_and_values(
    x: Arranged, b: Any, k: Any, j: jax.Array, blocks: Blocks
) -> tuple[jax.Array, jax.Array]:
    """Returns a block of keys and of values, in float32 on a CPU, which multiplies nothing less."""
    start, size = (b, k, j * blocks.kv), (blocks.batch, blocks.heads, blocks.kv)
    keys, values = part(x.key, start, size), part(x.value, start, size)
    if _compat.device().platform == "cpu":
        dtype = wide(keys.dtype)
        return keys.astype(dtype), values.astype(dtype)
    return keys, values


def einsum(settings: Settings, subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiplies as the settings ask, into float32 or wider."""
    dtype = wide(a.dtype)
    return jnp.einsum(subscripts, a, b, precision=settings.precision, preferred_element_type=dtype)
