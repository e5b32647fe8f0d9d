"""The state of some replicas as that of another number of them; see `Replicas.resize`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxopt_lab import _tree
from jaxopt_lab.distributed import _stacked

# Fields of this folder's states, and of optax.MultiSteps', whose mean over the replicas has still
# to be sent, or is known to all: a mean it has to stay.
_MEMORIES = frozenset({"error", "worker_error", "estimate", "momentum", "pending", "acc_grads"})
_PARTS = "server_error"  # of the replica's part of a vector


def count_of(state: Any) -> int:
    """Returns the number of replicas, by the first leaf of the parameters."""
    leaves = jax.tree.leaves(state.params)
    if not leaves or not np.ndim(leaves[0]):
        raise ValueError("state has no parameters with the replicas as their leading axis")
    return np.shape(leaves[0])[0]


def unstacked(tree: Any, by_mean: bool) -> Any:
    """Returns the mean over the replicas, or the first one's."""
    return jax.tree.map(_stacked.mean if by_mean else _first, jax.tree.map(_here, tree))


@dataclasses.dataclass(frozen=True)
class Placing:
    """Makes states of `count` replicas."""

    count: int
    replicate: Callable[[Any], Any]
    by_mean: bool

    def state(self, old: Any, like: Any) -> Any:
        """Returns `old` for the new replicas.

        Args:
          old: of the old ones, stacked.
          like: shapes of a fresh state of the new ones.

        Raises:
          ValueError: another state than `like`, or leaves of different numbers of replicas.
        """
        if jax.tree.structure(old) != jax.tree.structure(like):
            raise ValueError(
                "state is not one that tx makes for these parameters: found "
                f"{jax.tree.structure(old)}, expected {jax.tree.structure(like)}"
            )
        new = self._node(old, like)
        for (name, x), wanted in zip(_tree.leaves_with_names(new), jax.tree.leaves(like)):
            if x.shape != wanted.shape or x.dtype != wanted.dtype:
                raise ValueError(
                    f"state '{name}' became {x.dtype}{list(x.shape)}, but tx makes "
                    f"{wanted.dtype}{list(wanted.shape)} for {self.count} replicas"
                )
        return new

    def _node(self, old: Any, like: Any) -> Any:
        """Follows the states of this folder field by field; what is between them is foreign."""

        def ours(node: Any) -> bool:
            return hasattr(node, "_fields") and (
                type(node).__module__.startswith(__package__ or "")
                or bool(_stacked.counters_of(node))
            )

        if ours(old):
            shared = _stacked.counters_of(old)
            if "mean_estimate" in old._fields:  # what the mean of the estimates has to be
                old = old._replace(estimate=old.mean_estimate)
            return old._replace(
                **{name: self._field(name, getattr(old, name), getattr(like, name), name in shared)
                   for name in old._fields}
            )  # fmt: skip
        if any(map(ours, jax.tree.leaves(old, is_leaf=ours))):
            children, container = jax.tree.flatten(old, is_leaf=lambda x: x is not old)
            return container.unflatten(map(self._node, children, container.flatten_up_to(like)))
        return self._foreign(old)

    def _field(self, name: str, old: Any, like: Any, is_shared: bool) -> Any:
        if is_shared:
            return jax.tree.map(lambda x: jnp.asarray(_here(x)), old)
        if name == _PARTS:
            return jax.tree.map(self._parts, old, like)
        if name in _MEMORIES:
            return self.replicate(unstacked(old, by_mean=True))
        return self._node(old, like)

    def _parts(self, old: Any, like: Any) -> Any:
        """Cuts a vector, of which every replica had a part, anew."""
        vector = np.reshape(np.asarray(_here(old)), -1)
        length = math.prod(like.shape)
        if vector.size < length:
            vector = np.pad(vector, (0, length - vector.size))
        # What is cut off are zeros behind the vector's end.
        parts = vector[:length].reshape(like.shape)
        if like.sharding is None:
            return jnp.asarray(parts)
        return jax.make_array_from_callback(like.shape, like.sharding, lambda place: parts[place])

    def _foreign(self, old: Any) -> Any:
        leaves = [_here(x) for x in jax.tree.leaves(old)]
        codes = [x for x in leaves if not jnp.issubdtype(x.dtype, jnp.floating) and np.ndim(x) > 1]
        differ = any(bool(np.any(_stacked.differing(jnp.asarray(x)))) for x in codes)
        return self.replicate(unstacked(old, self.by_mean and not differ))


def _first(x: Any) -> Any:
    return x[0]


def _here(x: Any) -> Any:
    """Returns all of an array, in every process, without its mesh."""
    if not isinstance(x, jax.Array):
        return jnp.asarray(x)
    if not x.is_fully_addressable and isinstance(x.sharding, NamedSharding):
        x = _stacked.everywhere(_as_it_is, x, x.sharding.mesh)
        return _stacked.with_raw_keys(lambda k: jnp.asarray(np.asarray(k)), x)
    return _stacked.with_raw_keys(lambda k: jnp.asarray(np.asarray(k)), x)


def _as_it_is(x: jax.Array) -> jax.Array:
    return x
