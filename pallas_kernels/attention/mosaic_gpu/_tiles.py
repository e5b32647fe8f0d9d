"""Which tiles of the score matrix a program computes, and what is in them.

What is masked is decided in three steps, each dearer than the one before:

1. `row_ranges` and `key_ranges` list, in XLA, the tiles that a program needs. The others are
   neither copied nor computed.
2. The same lists say which of those are wholly visible. No mask is evaluated there.
3. In the rest, `Extras.hide` evaluates the mask entry by entry.

Scores are kept in base 2, as ``x * factor`` with a static factor, so that the exponential is one
fused multiply-add and one instruction (`Scores`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import mask as masks
from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.mosaic_gpu._common import LOG2E, TILE, Call, pad
from pallas_kernels.attention.problem import Sizes


class Range(NamedTuple):
    """The tiles of one program, half open, and those that a warpgroup need not mask."""

    start: Any
    stop: Any
    whole_start: Any
    whole_stop: Any


def row_ranges(mask: Mask, sizes: Sizes, block_q: int, block_kv: int, workers: int) -> jax.Array:
    """Lists the tiles that each program of `workers` row blocks needs, int32.

    Returns:
      (B or 1, programs, 2 + 2 workers): first and last tile (exclusive) that some row of the
      program needs, then for each worker the range of tiles that all its rows see wholly.
    """
    return _ranges(mask, sizes, block_q, block_kv, workers, by_keys=False)


def key_ranges(mask: Mask, sizes: Sizes, block_q: int, block_kv: int) -> jax.Array:
    """Lists the row tiles that each block of keys needs, as `row_ranges` with one worker."""
    return _ranges(mask, sizes, block_q, block_kv, 1, by_keys=True)


def _ranges(
    mask: Mask, sizes: Sizes, block_q: int, block_kv: int, workers: int, *, by_keys: bool
) -> jax.Array:
    kinds = masks.tile_kinds(mask, sizes.batch, sizes.queries, sizes.keys, block_q, block_kv)
    # One list for all heads: a dense mask of its own for each is skipped where all heads skip.
    needed, whole = (kinds != masks.SKIP).any(axis=1), (kinds == masks.WHOLE).all(axis=1)
    if by_keys:
        needed, whole = needed.swapaxes(1, 2), whole.swapaxes(1, 2)
    needed, whole = pad(needed, 1, workers), pad(whole, 1, workers)
    batch, blocks, tiles = needed.shape
    program = (batch, blocks // workers, workers)
    needed = needed.reshape(*program, tiles).any(axis=2)
    start, stop = masks.first_and_last(needed)
    # Whole tiles with others between them, as shuffled segments have, are all masked.
    of_workers = jnp.stack(masks.unbroken(whole), axis=2).reshape(*program[:2], -1)
    return jnp.concatenate([start[..., None], stop[..., None], of_workers], axis=2)


def read_range(ranges: Any, batch: Any, program: Any, worker: Any = 0) -> Range:
    """Returns the range of a program, inside a kernel."""
    entry = batch if ranges.shape[0] > 1 else 0
    columns = (0, 1, 2 + 2 * worker, 3 + 2 * worker)
    return Range(*(ranges[entry, program, column] for column in columns))


class Scores(NamedTuple):
    """How products of queries and keys become scores: base-2 scores are ``x * factor``.

    x is the bare product where there is neither bias nor soft cap, so that the scale costs
    nothing: the factor joins the subtraction of the maximum in one multiply-add.
    """

    scale: float
    soft_cap: float | None
    has_bias: bool

    @property
    def factor(self) -> float:
        """What x is multiplied by; never negative, so that maxima of x are maxima of scores."""
        if self.soft_cap is not None:
            return self.soft_cap * LOG2E
        return LOG2E if self.has_bias or self.scale <= 0 else self.scale * LOG2E

    def x(self, product: jax.Array, bias: jax.Array | None) -> jax.Array:
        """Returns x of a tile of products: those, the sum with the bias, or with a cap its tanh."""
        if self.soft_cap is None and not self.has_bias and self.scale > 0:
            return product
        z = product * self.scale if bias is None else product * self.scale + bias
        if self.soft_cap is None:
            return z
        # tanh(y) = 1 - 2 / (1 + exp(2 y)): the hardware's tanh is good to 11 bits only.
        tanh = 1 - 2 / (1 + jnp.exp2(z * (2 * LOG2E / self.soft_cap)))
        return jnp.where(z == -jnp.inf, -jnp.inf, tanh) if self.has_bias else tanh

    def times_slope(self, p: jax.Array, x: jax.Array) -> jax.Array:
        """Returns `p` times the slope of the soft cap; `x` is -inf where entries are hidden."""
        if self.soft_cap is None:
            return p
        return jnp.where(p > 0.0, p * (1 - x * x), 0.0)


def scores_of(call: Call) -> Scores:
    """Returns the static description of the scores of a call."""
    settings = call.settings
    return Scores(
        scale=settings.scale,
        soft_cap=settings.soft_cap,
        has_bias=call.bias_kind is not None,
    )


class Tile(NamedTuple):
    """Where a tile of scores stands; `row_axis` is 1 where the tile is transposed."""

    first_row: Any
    first_key: Any
    shape: tuple[int, int]
    row_axis: int = 0

    def positions(self, others: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the rows and the keys of all entries.

        `others` counts along axis 1 from 0. It comes from memory: a count that a loop does not
        change would be computed before the loop and kept in a register for every second column.
        """
        own = plgpu.broadcasted_iota(jnp.int32, self.shape, 0, layout=TILE)
        both = (own, self.spread(others, 1))
        rows, keys = both if self.row_axis == 0 else both[::-1]
        return rows + self.first_row, keys + self.first_key

    def spread(self, vector: jax.Array, axis: int) -> jax.Array:
        """Repeats a vector along the other axis of the tile."""
        return lax.broadcast_in_dim(vector, self.shape, [axis])
