"""A mapped axis as more query heads, where all its entries have the same keys.

    head (k, g) of entry i   ->   head (k, i, g) of one call

No key is copied, no row moves, and what such a call gives as the gradient of a key is the sum over
all entries. The axes of arrays are strings, as in `mapped`; each ``v`` before them is an axis that
another `vmap` maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention.placement import explicit_sharding

BROADCAST = ("bnts", "bnr")
"""The axes of arrays with one batch entry for all."""


def share_keys(axes: Sequence[str], mapped: Sequence[bool], args: Sequence[jax.Array]) -> bool:
    """Whether a mapped axis is over what heads have, such as queries, and all share the keys.

    On a mesh the axis may be spread over devices, where it must stay an axis of batch entries.

    Args:
      axes: The axes of each array but the mapped one, which is the first.
      mapped: Which arrays have it.
      args: The arrays: query, key and value first.
    """
    if jax.sharding.get_abstract_mesh().size > 1 or explicit_sharding(args[0]) is not None:
        return False
    planes = [
        x.size
        for own, has_axis, x in zip(axes, mapped, args)
        if own.endswith(BROADCAST) and not has_axis and x.shape[own.index("n")] > 1
    ]
    # A bias or mask for each head would be copied in place of the keys.
    small = not planes or sum(planes) <= args[1].size + args[2].size
    return all("n" in own for own, has_axis in zip(axes, mapped) if has_axis) and small


class Fold(NamedTuple):
    """How entries become heads."""

    entries: int
    heads: int  # query heads of each
    kv_heads: int

    def fold(self, axes: str, x: jax.Array, mapped: bool, shared: bool = True) -> jax.Array:
        """Returns an array of all entries; one plane for all heads stays one if it is `shared`."""
        if "n" not in axes:
            return x
        n = axes.index("n")
        if axes.endswith("bnts") and not mapped and shared and x.shape[n] == 1:
            return x
        if not mapped:
            x = jnp.broadcast_to(x, (self.entries, *x.shape))
        before, after = x.shape[1 : n + 1], x.shape[n + 2 :]
        x = jnp.broadcast_to(x, (self.entries, *before, self.heads, *after))
        group = self.heads // self.kv_heads
        x = x.reshape(self.entries, *before, self.kv_heads, group, *after)
        return jnp.moveaxis(x, 0, n + 1).reshape(*before, self.entries * self.heads, *after)

    def unfold(self, axes: str, x: jax.Array) -> jax.Array:
        """Returns an array with the axis of entries first."""
        n = axes.index("n")
        before, after = x.shape[:n], x.shape[n + 1 :]
        group = self.heads // self.kv_heads
        x = x.reshape(*before, self.kv_heads, self.entries, group, *after)
        return jnp.moveaxis(x, n + 1, 0).reshape(self.entries, *before, self.heads, *after)
