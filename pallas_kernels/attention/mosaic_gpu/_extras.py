"""Bias and segment ids of the tiles of a kernel, in a ring of slots of their own.

A kernel owns a block along one axis of the score matrix, axis 0 of its tiles, and walks along the
other, axis 1: rows and keys in the forward pass, keys and rows where dK and dV are computed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import dropout
from pallas_kernels.attention import mask as masks
from pallas_kernels.attention.mask import Limits
from pallas_kernels.attention.mosaic_gpu import _common
from pallas_kernels.attention.mosaic_gpu._common import COLUMN, ROW, TILE, WORKERS, Call, Ring
from pallas_kernels.attention.mosaic_gpu._tiles import Tile


@dataclasses.dataclass(frozen=True)
class Extras:
    """How a kernel gets what its tiles need beside their products.

    Attributes:
      call: The call.
      owns: ``"rows"`` or ``"keys"``, axis 0 of a tile.
      shape: Of one worker's tile.
      workers: How many blocks along axis 0 a program has, one after another.
      readers: How many warpgroups release a slot.
      slots: How many tiles are in shared memory at a time.
    """

    call: Call
    owns: str
    shape: tuple[int, int]
    workers: int
    readers: int
    slots: int

    @property
    def _bias_axis(self) -> int | None:
        """The axis along which a bias vector runs."""
        kind = self.call.bias_kind
        return None if kind in (None, "tile") else int(kind != self.owns)

    @property
    def copies(self) -> int:
        """How many copies fill a slot."""
        kind = self.call.bias_kind
        of_bias = 0 if kind is None else (1 if self._bias_axis == 1 else self.workers)
        return of_bias + int(self.call.has_segments)

    @property
    def own_copies(self) -> int:
        """How many copies of `copy_own` each worker waits for."""
        return int(self.call.has_segments) + int(self.needs_counts)

    @property
    def needs_counts(self) -> bool:
        """Whether tiles ask for positions."""
        return self.call.is_masked(self.shape) or self.call.settings.dropout_rate > 0

    def scratch(self) -> dict[str, Any]:
        """Returns the scratch types, to be passed to all methods as a dictionary of refs."""
        own, other = self.shape
        types: dict[str, Any] = {}
        if self.needs_counts:
            types["counts"] = plgpu.SMEM((WORKERS, other), jnp.int32)
        if self.call.has_segments:
            types["own_ids"] = plgpu.SMEM((WORKERS, own), jnp.int32)
            types["other_ids"] = plgpu.SMEM((self.slots, other), jnp.int32)
        if self.call.bias_kind == "tile":
            shape = (self.slots, self.workers, own, other)
            types["bias"] = _common.matrix(shape, self.call.bias_dtype)
        elif self._bias_axis == 0:
            types["bias"] = plgpu.SMEM((self.slots, self.workers, own), jnp.float32)
        elif self._bias_axis == 1:
            types["bias"] = plgpu.SMEM((self.slots, other), jnp.float32)
        if self.copies:
            types |= _common.ring_barriers("extras", self.slots, self.copies, self.readers)
        return types

    def ring(self, s: Any) -> Ring:
        """Returns the ring, which exists if there are any copies."""
        return Ring(self.slots, s["extras_full"], s["extras_free"])

    def release(self, s: Any, n: Any) -> None:
        """Says that this reader needs the n-th tile no more.

        TMA, which fills the slot again, is ordered after reads into registers by a fence only.
        """
        plgpu.commit_smem()
        self.ring(s).release(n)

    def copy_counts(self, inputs: Any, s: Any, worker: Any, full: Any) -> None:
        """Starts the copy from which a worker reads positions."""
        counts = inputs["counts"].at[pl.ds(0, self.shape[1])]
        plgpu.copy_gmem_to_smem(counts, s["counts"].at[worker], full)

    def copy_own(self, inputs: Any, s: Any, batch: Any, first: Any, worker: Any, full: Any) -> None:
        """Starts the copies of what a worker keeps; its own block begins at `first`."""
        if self.needs_counts:
            self.copy_counts(inputs, s, worker, full)
        if self.call.has_segments:
            ids = inputs["row_ids" if self.owns == "rows" else "key_ids"]
            block = ids.at[batch, pl.ds(first, self.shape[0])]
            plgpu.copy_gmem_to_smem(block, s["own_ids"].at[worker], full)

    def copy(
        self, inputs: Any, s: Any, batch: Any, head: Any, first: tuple[Any, Any], n: Any
    ) -> None:
        """Starts the copies of the n-th tile, whose program's block and tile begin at `first`."""
        if not self.copies:
            return
        own, other = self.shape
        slot, full = self.ring(s).reserve(n)
        others = pl.ds(first[1], other)
        if self.call.has_segments:
            ids = inputs["key_ids" if self.owns == "rows" else "row_ids"]
            plgpu.copy_gmem_to_smem(ids.at[batch, others], s["other_ids"].at[slot], full)
        if self.call.bias_kind is None:
            return
        bias = inputs["bias"]
        where = _common.entry(bias, batch, head)
        if self._bias_axis == 1:
            plgpu.copy_gmem_to_smem(bias.at[(*where, others)], s["bias"].at[slot], full)
            return
        for worker in range(self.workers):
            owned = pl.ds(first[0] + worker * own, own)
            block = (owned, others) if self.call.bias_kind == "tile" else (owned,)
            plgpu.copy_gmem_to_smem(bias.at[(*where, *block)], s["bias"].at[slot, worker], full)

    def positions(self, s: Any, worker: Any, tile: Tile) -> tuple[jax.Array, jax.Array]:
        """Returns the rows and the keys of all entries of a worker's tile."""
        return tile.positions(_common.load(s["counts"].at[worker], ROW))

    def kept(
        self, inputs: Any, s: Any, batch: Any, head: Any, worker: Any, tile: Tile
    ) -> jax.Array:
        """Returns which entries of a worker's tile dropout keeps."""
        rate = self.call.settings.dropout_rate
        return dropout.keep(inputs["seeds"][batch, head], *self.positions(s, worker, tile), rate)

    def bias(self, s: Any, slot: Any, worker: Any, tile: Tile) -> jax.Array | None:
        """Reads the bias of a worker's tile, float32."""
        if self.call.bias_kind is None:
            return None
        if self.call.bias_kind == "tile":
            return _common.load(s["bias"].at[slot, worker], TILE).astype(jnp.float32)
        if self._bias_axis == 0:
            return tile.spread(_common.load(s["bias"].at[slot, worker], COLUMN), 0)
        return tile.spread(_common.load(s["bias"].at[slot], ROW), 1)

    def hide(
        self, x: jax.Array, whole: Any, s: Any, slot: Any, worker: Any, tile: Tile, limits: Limits
    ) -> jax.Array:
        """Puts -inf where the mask hides; it is evaluated only where the tile is not `whole`."""
        if not self.call.is_masked(self.shape):
            return x

        def hidden(x: jax.Array) -> jax.Array:
            seen = masks.in_interval(self.call.mask, limits, *self.positions(s, worker, tile))
            if self.call.has_segments:
                own = tile.spread(_common.load(s["own_ids"].at[worker], COLUMN), 0)
                other = tile.spread(_common.load(s["other_ids"].at[slot], ROW), 1)
                seen &= own == other
            return jnp.where(seen, x, -jnp.inf)

        return lax.cond(whole, lambda x: x, hidden, x)
