"""What the TPU kernels share: operands in blocks, and the scores of a piece of a tile.

Kernels read head-major arrays (B, heads, length, width) whose lengths are padded to whole blocks
and whose widths to whole vectors of 128 lanes. The padding is zeros, so it adds nothing to a
product, and the copy that moves the heads writes it on the way.

A kernel works on pieces of scores either with queries along sublanes and keys along lanes, or
transposed; `Scores` is the one place that knows which. Where neither bias nor soft cap stands
between, the factor log2(e) of a base-2 exponential is folded into the scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.attention import dropout
from pallas_kernels.attention.mask import Limits, keys_of_rows
from pallas_kernels.attention.mosaic_tpu.steps import Steps
from pallas_kernels.attention.mosaic_tpu.tables import LANES, Blocks, round_up
from pallas_kernels.attention.problem import Operands, Settings

LOG2E = math.log2(math.e)


class Input(NamedTuple):
    """An array with the block of it that a step sees; `index` maps a step's positions."""

    name: str
    array: jax.Array
    block: tuple[int | None, ...]
    index: Callable[..., tuple[Any, ...]]  # of (b, n, i, j): head n, query block i, key block j


class Piece(NamedTuple):
    """A part of a tile, as static offsets, and the tile's place among the positions."""

    row: int  # first query of the piece within the tile
    key: int  # first key of the piece within the tile
    rows: int
    keys: int
    first_row: Any  # position of the tile's first query
    first_key: Any


def head_major(x: jax.Array, length: int) -> jax.Array:
    """Returns (B, T, N, d) as (B, N, length, d rounded up to lanes), padded with zeros."""
    padding = [(0, 0), (0, length - x.shape[1]), (0, 0), (0, -x.shape[3] % LANES)]
    return jnp.pad(x, padding).transpose(0, 2, 1, 3)


def padded_lengths(operands: Operands, blocks: Blocks) -> tuple[int, int]:
    """Returns T and S in whole blocks."""
    size = operands.sizes
    return round_up(size.queries, blocks.q), round_up(size.keys, blocks.kv)


def pad_rows(x: jax.Array, length: int) -> jax.Array:
    """Returns (..., T) as (..., 1, length): a row vector for each head."""
    padding = [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])]
    return jnp.pad(x, padding)[..., None, :]


def scalars(operands: Operands, steps: Steps) -> dict[str, Any]:
    """Returns what a kernel reads ahead of its grid, by name; the table is the first."""
    size = operands.sizes
    limits = operands.mask.limits(size.batch, size.queries, size.keys)
    values = {"table": jnp.asarray(steps.table), "limits": limits.reshape(-1)}
    if operands.seeds is not None:
        values["seeds"] = operands.seeds.reshape(-1)
    if operands.sinks is not None:
        values["sinks"] = operands.sinks.astype(jnp.float32)
    return values


def planes(operands: Operands, blocks: Blocks, rows: int | None = None) -> list[Input]:
    """Returns what is added to or masks the scores: bias, dense mask, segment ids.

    Queries are padded to `rows`, or to whole blocks.
    """
    t, s = padded_lengths(operands, blocks)
    t = t if rows is None else rows
    inputs = []
    if operands.bias is not None:
        inputs.append(plane("bias", operands.bias, t, s, blocks))
    mask = operands.mask
    if mask.dense is not None:
        inputs.append(plane("dense", mask.dense.astype(jnp.int8), t, s, blocks))
    if mask.query_segment_ids is not None and mask.key_value_segment_ids is not None:
        for name, ids, length, block, side in (
            ("query_ids", mask.query_segment_ids, t, blocks.q, 0),
            ("key_ids", mask.key_value_segment_ids, s, blocks.kv, 1),
        ):
            inputs.append(
                Input(name, pad_rows(ids, length), (None, 1, block), _along(side, batched=True))
            )
    return inputs


def _along(side: int, *, batched: bool) -> Callable[..., tuple[Any, ...]]:
    """Maps to the block of a row vector (B, 1, length) along queries (0) or keys (1)."""
    return lambda b, n, i, j: (b if batched else 0, 0, (i, j)[side])


def plane(name: str, x: jax.Array, t: int, s: int, blocks: Blocks) -> Input:
    """Blocks an array that broadcasts to (B, N, T, S); an axis of size 1 stays one.

    A column (T, 1) becomes a row: a vector belongs along the lanes.
    """
    dtype = jnp.int32 if x.dtype == jnp.int8 and 1 in x.shape[2:] else x.dtype
    x = x.astype(dtype)
    b_size, n_size, rows, keys = x.shape
    if keys == 1 and rows != 1:
        x = x.swapaxes(2, 3)
    full = [(0, 0), (0, 0), (0, 0), (0, 0)]
    block: list[int | None] = [None, None, 1, 1]
    for axis, length, size in ((2, t, blocks.q), (3, s, blocks.kv)):
        if keys == 1 and axis == 3 and rows != 1:
            length, size = t, blocks.q
        if x.shape[axis] != 1:
            full[axis] = (0, length - x.shape[axis])
            block[axis] = size
    x = jnp.pad(x, full)

    def index(b: Any, n: Any, i: Any, j: Any) -> tuple[Any, ...]:
        along_rows = i if rows != 1 and keys != 1 else 0
        along_keys = j if keys != 1 else i if rows != 1 else 0
        return (b if b_size > 1 else 0, n if n_size > 1 else 0, along_rows, along_keys)

    return Input(name, x, tuple(block), index)


class Scores(NamedTuple):
    """How a kernel turns products of queries and keys into base-2 scores; static."""

    settings: Settings
    operands_mask: Any  # the `Mask`, for its static fields
    bias_shape: tuple[int, ...] | None
    dense_shape: tuple[int, ...] | None
    segments: bool
    limit_columns: int  # of a batch entry
    transposed: bool  # keys along sublanes and queries along lanes

    @property
    def unit(self) -> float:
        """What scores are multiplied by: log2(e) where that folds into the scale, else 1.

        A bias of -3e38, the usual stand-in for -inf, would overflow in base 2.
        """
        folds = self.bias_shape is None and self.settings.soft_cap is None
        return LOG2E if folds else 1.0

    @property
    def may_be_empty(self) -> bool:
        """Whether a row may be -inf throughout in a tile that the mask calls whole."""
        return self.bias_shape is not None

    @property
    def has_window(self) -> bool:
        """Whether a tile may have parts that its positions alone hide."""
        mask = self.operands_mask
        return mask.left is not None or mask.right is not None or self.limit_columns == 5

    @property
    def may_hide_within(self) -> bool:
        """Whether a tile may be partial where its positions hide nothing."""
        return self.segments or self.dense_shape is not None

    def needed(self, piece: Piece, limits: Limits) -> Any:
        """Returns whether the window leaves anything of a piece visible."""
        first_row, first_key = piece.first_row + piece.row, piece.first_key + piece.key
        span = keys_of_rows(self.operands_mask, limits, first_row, first_row + piece.rows - 1)
        return (first_key < span.stop) & (first_key + piece.keys > span.start)

    def exp(self, x: jax.Array) -> jax.Array:
        """Returns the exponential of differences of scores."""
        return jnp.exp(x) if self.unit == 1 else jnp.exp2(x)

    def product(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """Returns queries times keys, in this orientation."""
        a, b = (keys, queries) if self.transposed else (queries, keys)
        return dot(a, b, (1, 1), self.settings)

    def finish(
        self, refs: dict[str, Any], product: jax.Array, piece: Piece, limits: Limits | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Returns the scores times `unit`, and d score / d (score before the cap) where capped.

        Hidden entries are -inf if `limits` is given; None means that everything is visible.
        """
        z = product * (self.settings.scale * self.unit)
        if self.bias_shape is not None:
            z += self.plane(refs["bias"], self.bias_shape, piece).astype(jnp.float32)
        slope, cap = None, self.settings.soft_cap
        if cap is not None:
            capped = jnp.tanh(z * (1 / cap))
            slope = 1 - capped * capped
            hides = self.bias_shape is not None
            z = jnp.where(z == -jnp.inf, -jnp.inf, capped * cap) if hides else capped * cap
        if limits is not None:
            z = jnp.where(self.visible(refs, piece, limits), z, -jnp.inf)
        return z, slope

    def visible(self, refs: dict[str, Any], piece: Piece, limits: Limits) -> jax.Array:
        """Returns which entries of a piece are visible."""
        rows, keys = self.positions(piece)
        # The interval of each row first: one comparison or two for an entry are left.
        span = keys_of_rows(self.operands_mask, limits, rows, rows)
        seen = keys < span.stop
        if self.operands_mask.left is not None or limits.start is not None:
            seen &= keys >= span.start
        if self.segments:
            row_ids = refs["query_ids"][:, pl.ds(piece.row, piece.rows)]
            key_ids = refs["key_ids"][:, pl.ds(piece.key, piece.keys)]
            if self.transposed:
                seen &= column(key_ids) == row_ids
            else:
                seen &= column(row_ids) == key_ids
        if self.dense_shape is not None:
            dense = self.plane(refs["dense"], self.dense_shape, piece)
            seen &= dense.astype(jnp.int32) != 0
        return seen

    def positions(self, piece: Piece) -> tuple[jax.Array, jax.Array]:
        """Returns the positions of a piece's queries and keys, broadcastable."""
        shapes = ((1, piece.rows), (piece.keys, 1))
        if not self.transposed:
            shapes = ((piece.rows, 1), (1, piece.keys))
        rows, keys = (
            lax.broadcasted_iota(jnp.int32, shape, int(shape[0] == 1)) for shape in shapes
        )
        return rows + (piece.first_row + piece.row), keys + (piece.first_key + piece.key)

    def kept(self, seed: Any, piece: Piece) -> jax.Array:
        """Returns which entries of a piece dropout keeps."""
        rows, keys = self.positions(piece)
        return dropout.keep(seed, rows, keys, self.settings.dropout_rate)

    def plane(self, ref: Any, shape: tuple[int, ...], piece: Piece) -> jax.Array:
        """Returns a piece of an input made by `planes`, broadcastable to the scores."""
        rows, keys = pl.ds(piece.row, piece.rows), pl.ds(piece.key, piece.keys)
        if shape[2] != 1 and shape[3] != 1:
            x = ref[rows, keys]
            # Only vectors of 32 bits are transposed on every chip.
            x = x.astype(jnp.int32 if x.dtype == jnp.int8 else jnp.float32)
            return x.T if self.transposed else x
        if shape[3] != 1:
            x = ref[:, keys]
            return column(x) if self.transposed else x
        if shape[2] != 1:
            x = ref[:, rows]
            return x if self.transposed else column(x)
        return ref[...]


def scores_of(settings: Settings, operands: Operands, *, transposed: bool) -> Scores:
    """Returns the static description of the scores of a call."""
    mask = operands.mask
    return Scores(
        settings,
        type(mask)(left=mask.left, right=mask.right, offset=mask.offset),
        None if operands.bias is None else operands.bias.shape,
        None if mask.dense is None else mask.dense.shape,
        mask.has_segments,
        mask.columns,
        transposed,
    )


def column(row: jax.Array) -> jax.Array:
    """Returns a row (1, n) as a column (n, 1)."""
    return lanes(row)[:, :1]


def lanes(row: jax.Array) -> jax.Array:
    """Returns a row (1, n) as a column repeated along the lanes (n, 128)."""
    row = row if row.dtype.itemsize == 4 else row.astype(jnp.float32)
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def log_totals(scores: Scores, lse: jax.Array) -> jax.Array:
    """Returns lse in the unit of the scores, 0 for a row that sees nothing: its scores are -inf."""
    return jnp.where(lse == -jnp.inf, 0.0, lse * scores.unit)


def row(column: jax.Array) -> jax.Array:
    """Returns a column (n, 1) as a row (1, n)."""
    return jnp.broadcast_to(column, (column.shape[0], LANES)).T[:1, :]


def limits_at(refs: dict[str, Any], b: Any, scores: Scores) -> Limits:
    """Returns the limits of one batch entry."""
    count = scores.limit_columns
    return Limits(*(refs["limits"][count * b + k] for k in range(count)))


def dot(a: jax.Array, b: jax.Array, contracted: tuple[int, int], settings: Settings) -> jax.Array:
    """Returns the product over the named axes of `a` and `b`, accumulated in float32."""
    dims = (((contracted[0],), (contracted[1],)), ((), ()))
    precision = None
    if a.dtype == jnp.float32:
        precision = _precision(settings.precision)
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _precision(precision: Any) -> lax.Precision:
    """Returns the default or the highest precision: the matrix unit's compiler has no third."""
    given = precision if isinstance(precision, tuple) else (precision,)
    plain = all(p in (None, "default", "bfloat16", lax.Precision.DEFAULT) for p in given)
    return lax.Precision.DEFAULT if plain else lax.Precision.HIGHEST


def spec(
    block: tuple[int | None, ...],
    index: Callable[..., tuple[Any, ...]],
    place: Callable[..., tuple[Any, ...]],
) -> pl.BlockSpec:
    """Returns a block spec; `place` maps grid indices and scalars to (b, n, i, j)."""
    return pl.BlockSpec(block, lambda *ids: index(*place(*ids)))


def window_bytes(inputs: Sequence[tuple[Any, Any]]) -> int:
    """Returns the bytes of one copy of each (block, dtype), in whole tiles of vector memory."""
    total = 0
    for block, dtype in inputs:
        sizes = [1 if x is None else x for x in block]
        itemsize = jnp.dtype(dtype).itemsize
        rows, lanes = round_up(sizes[-2], 32 // itemsize), round_up(sizes[-1], LANES)
        total += math.prod(sizes[:-2]) * rows * lanes * itemsize
    return total
