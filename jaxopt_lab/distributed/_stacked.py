"""Trees of all replicas: the leading axis of every leaf is theirs, but for counters they share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding

from jaxopt_lab import _tree

# Fields of the states of this folder that all replicas share, and those of wrappers around them.
_COUNTERS = frozenset({"count", "round", "notfinite_count", "last_finite", "total_notfinite"})
_WRAPPERS = {
    "optax.MultiStepsState": {"mini_step", "gradient_step"},
    "optax.ConditionallyTransformState": {"step"},
    "optax.ConditionallyMaskState": {"step"},
    "jaxopt_lab.IstState": {"count"},
}


def counters_of(node: Any) -> frozenset[str]:
    """Returns the fields of a state that are the same number on all replicas by construction."""
    fields, kind = frozenset(getattr(node, "_fields", ())), type(node)
    if kind.__module__.startswith(__package__ or ""):
        return fields & _COUNTERS
    if jax.tree.leaves(getattr(node, "skip_state", ())):
        return frozenset()  # optax.MultiSteps that skips counts by each replica's own gradients
    package = kind.__module__.partition(".")[0]
    return fields & _WRAPPERS.get(f"{package}.{kind.__name__}", frozenset())


def shared_counters(state: Any) -> Any:
    """Returns a tree of booleans: True for the step counters that all replicas share.

    They are those of this folder's transformations, and of the wrappers that decide by a counter
    whether these are called; they are the same number on all replicas by construction. Kept once, a
    branch on them stays a branch under `vmap`, where a counter for each replica would make both
    branches run.
    """

    def ours(node: Any) -> bool:
        return bool(counters_of(node))

    def flags(node: Any) -> Any:
        shared = counters_of(node)
        if not shared:
            return False
        return node._replace(
            **{name: name in shared or shared_counters(getattr(node, name))
               for name in node._fields}
        )  # fmt: skip

    return jax.tree.map(flags, state, is_leaf=ours)


def shared_scalars(tree: Any) -> Any:
    """Returns `shared_counters`, but False for counters that have been stacked all the same."""
    return jax.tree.map(
        lambda flag, x: flag and np.ndim(x) == 0, shared_counters(tree), tree, is_leaf=_is_none
    )


def check_leading(tree: Any, shared: Any, count: int, what: str) -> None:
    """Refuses leaves whose leading axis is not the replicas.

    Args:
      tree: arrays.
      shared: booleans, a prefix of `tree`; a leaf with True has shape ().
      count: number of replicas.
      what: what a leaf is called in the message.

    Raises:
      ValueError: the message has the leaf's path.
    """
    flags = _tree.broadcast_prefix(shared, tree, what)
    for (name, leaf), flag in zip(_tree.leaves_with_names(tree), flags):
        found, which = np.shape(leaf), f"{what} '{name}'" if name else what
        if flag and found:
            raise ValueError(
                f"{which} has shape {found}; expected (), a counter that all replicas "
                "share, as Replicas.init makes it"
            )
        if not flag and found[:1] != (count,):
            raise ValueError(
                f"{which} has shape {found}; expected the {count} replicas as its leading "
                "axis (Replicas.shard makes one of a batch, Replicas.resize goes on with another "
                "number of replicas)"
            )


def select(flags: Any, trees: Any, fn: Callable[[Any], Any]) -> Any:
    """Applies `fn` to the leaves below a False of `flags`, a prefix of `trees`."""
    return jax.tree.map(lambda flag, tree: tree if flag else jax.tree.map(fn, tree), flags, trees)


def is_key(x: Any) -> bool:
    """Whether `x` holds typed keys."""
    return jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)


def with_raw_keys(fn: Callable[[Any], Any], x: Any) -> Any:
    """Returns `fn(x)`; of typed keys, what `fn` makes of their numbers, as keys again."""
    if not is_key(x):
        return fn(x)
    return jax.random.wrap_key_data(fn(jax.random.key_data(x)), impl=jax.random.key_impl(x))


@functools.partial(jax.jit, static_argnums=(0, 2))
def everywhere(fn: Callable[[jax.Array], jax.Array], tree: Any, mesh: Mesh | None) -> Any:
    """Maps `fn` over stacked leaves; every process gets all of the results."""
    found = jax.tree.map(fn, tree)
    if mesh is None:
        return found
    return lax.with_sharding_constraint(found, NamedSharding(mesh, jax.P()))


def mean(x: jax.Array) -> jax.Array:
    """Returns the mean over the replicas in the dtype of `x`, or the first one's if no float."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x[0]
    # The first replica's plus the mean difference: equal replicas give their very bits.
    wide = x.astype(_tree.compute_dtype(x.dtype))
    return (wide[0] + jnp.mean(wide - wide[0], axis=0)).astype(x.dtype)


def differing(x: jax.Array) -> jax.Array:
    """Returns, for each replica, whether it has other bits than the first."""
    x = jax.random.key_data(x) if is_key(x) else x
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = lax.bitcast_convert_type(x, jnp.dtype(f"uint{jnp.finfo(x.dtype).bits}"))
    return jnp.any(x != x[:1], axis=tuple(range(1, x.ndim)))


def _is_none(x: Any) -> bool:
    return x is None
