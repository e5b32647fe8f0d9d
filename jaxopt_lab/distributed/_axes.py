"""What a value under a mapped axis is: equal on all replicas, or each replica's own.

`shard_map` with its default checking knows; it calls the second kind varying, and wants branches
and loops to agree on it. Unchecked `shard_map`, `pmap` and `vmap` do not know, and there every
function here leaves its argument as it is.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_lab import _compat, _tree

AxisName = Hashable  # one mapped axis, or a tuple of several that count as one


_averaged: contextvars.ContextVar[frozenset[AxisName]] = contextvars.ContextVar(
    "averaged", default=frozenset()
)


@contextlib.contextmanager
def averaged(axis_name: AxisName) -> Iterator[None]:
    """Refuses exchanges over an axis along which each replica has a part of its own of a mean."""
    token = _averaged.set(_averaged.get() | frozenset(names(axis_name)))
    try:
        yield
    finally:
        _averaged.reset(token)


def canonical(axis_name: Any, argument: str = "axis_name") -> AxisName:
    """Returns a name as it is, and several names as a tuple.

    Raises:
      TypeError: no name, such as None, a function or a number with a fraction; the message has
        `argument`.
      ValueError: no axis, or one twice.
    """
    if not isinstance(axis_name, (tuple, list)):
        no_name = callable(axis_name) or isinstance(axis_name, (bool, float, complex))
        if no_name or not isinstance(axis_name, Hashable) or axis_name in (None, ""):
            raise TypeError(
                f"{argument} must be the name of a mapped axis or a tuple of names, got "
                f"{axis_name!r}"
            )
        return axis_name
    found = tuple(canonical(name, argument) for name in axis_name)
    if not found or len(set(found)) < len(found):
        raise ValueError(f"{argument} must name different axes, at least one, got {axis_name!r}")
    return found[0] if len(found) == 1 else found


def names(axis_name: AxisName) -> tuple[AxisName, ...]:
    """Returns the axes, of which there may be one."""
    return axis_name if isinstance(axis_name, tuple) else (axis_name,)


def size(axis_name: AxisName) -> int:
    """Returns the number of replicas.

    Raises:
      ValueError: no surrounding `shard_map`, `pmap` or `vmap` has the axis, or see `averaged`.
    """
    for name in names(axis_name):
        if name in _averaged.get():
            raise ValueError(
                f"axis {name!r} is the mean's around this exchange already, over which each "
                "replica has another part: give it another axis"
            )
        try:
            lax.axis_size(name)
        except NameError as error:
            raise ValueError(
                f"axis {name!r} is not bound; call inside shard_map, pmap or vmap with that axis"
            ) from error
    return lax.axis_size(axis_name)


def checked(axis_name: AxisName) -> frozenset[AxisName]:
    """Returns those of the axes over which it is known what varies."""
    size(axis_name)
    return frozenset(
        name for name in names(axis_name) if name in _compat.varying_axes(lax.axis_index(name))
    )


def varies(x: jax.Array, axis_name: AxisName) -> bool:
    """Whether `x` may differ between replicas; where nothing is known, it may."""
    known = checked(axis_name)
    return len(known) < len(names(axis_name)) or bool(known & _compat.varying_axes(x))


def vary(tree: Any, axis_name: AxisName) -> Any:
    """Returns `tree` with each leaf marked as the replica's own.

    Differentiate with respect to `vary(params, axis_name)` to get each replica's own gradient:
    with respect to parameters known to be equal, autodiff sums over the replicas by itself.

    Args:
      tree: arrays.
      axis_name: the mapped axis, or a tuple of several.

    Returns:
      The same values. Costs nothing.

    Raises:
      ValueError: an axis that is not bound, or none, or one twice.
      TypeError: no name of an axis.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_lab import distributed
      >>> mesh = jax.make_mesh((1,), ("replica",), (jax.sharding.AxisType.Auto,))
      >>> def gradients(params, batch):
      ...     own = distributed.vary(params, "replica")
      ...     return jax.grad(lambda w: jnp.sum(w * batch))(own)[None]
      >>> each = jax.P("replica")
      >>> of_all = jax.shard_map(gradients, mesh=mesh, in_specs=(jax.P(), each), out_specs=each)
      >>> of_all(jnp.ones(2), jnp.array([[3.0, 4.0]]))
      Array([[3., 4.]], dtype=float32)
    """
    known = checked(canonical(axis_name))
    return jax.tree.map(lambda x: _compat.vary_over(x, known), tree)


def require_own(updates: Any, axis_name: AxisName, method: str) -> None:
    """Refuses gradients that autodiff has already summed over the replicas.

    Raises:
      ValueError: a leaf does not vary over the axis; the message has its path.
    """
    known = checked(axis_name)
    for name, leaf in _tree.leaves_with_names(updates):
        summed = sorted(known - _compat.varying_axes(leaf), key=str)
        if summed:
            raise ValueError(
                f"{method}: the gradient of '{name}' is the same on all replicas of axis "
                f"{', '.join(map(repr, summed))}, because jax.grad summed it; differentiate with "
                f"respect to jaxopt_lab.distributed.vary(params, {axis_name!r}), so that each "
                "replica has its own gradient to send, and make the state of optax.MultiSteps from "
                "these parameters, too"
            )


def all_gather(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """Returns the replicas' values along a new leading axis, known to be equal on all replicas."""
    if _is_one_collective(axis_name):
        known = checked(axis_name)
        x = _compat.vary_over(x, known)
        return lax.all_gather(x, axis_name, to="invarying" if known else "varying")
    # The inner axes first, so that the order is that of `jax.lax.axis_index`.
    for name in reversed(names(axis_name)):
        x = all_gather(x, name)
    return x.reshape(size(axis_name), *x.shape[len(names(axis_name)) :])


def permute(x: jax.Array, axis_name: AxisName, sources: Sequence[int]) -> jax.Array:
    """Returns, on replica i, what replica `sources[i]` has; a permutation of all."""
    if _is_one_collective(axis_name):
        # A full permutation: the batching rule under vmap has none of a part.
        pairs = [(int(source), target) for target, source in enumerate(sources)]
        return lax.ppermute(x, axis_name, pairs)
    return all_gather(x, axis_name)[jnp.asarray(sources)[lax.axis_index(axis_name)]]


def psum_scatter(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """Returns the replica's of N equal parts of the sum; shape (N n,) becomes (n,)."""
    if _is_one_collective(axis_name):
        return lax.psum_scatter(x, axis_name, tiled=True)
    return part(psum(x, axis_name), axis_name)


def part(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """Returns the replica's of N equal parts; shape (N n,) becomes (n,)."""
    length = x.shape[0] // size(axis_name)
    return lax.dynamic_slice_in_dim(x, lax.axis_index(axis_name) * length, length)


def _is_one_collective(axis_name: AxisName) -> bool:
    """Whether the axes are one to a collective: `vmap` inside `vmap` has no rules for several."""
    several = names(axis_name)
    manual = jax.sharding.get_abstract_mesh().manual_axes
    known = checked(axis_name)
    if known:
        return len(known) == len(several)
    return len(several) == 1 or all(name in manual or name in _counted for name in several)


_counted: set[AxisName] = set()


@contextlib.contextmanager
def counted(axes: Iterable[AxisName]) -> Iterator[None]:
    """Traces a program for devices along `axes`, without a mesh of them."""
    new = set(axes) - _counted
    _counted.update(new)
    try:
        yield
    finally:
        _counted.difference_update(new)


def pmean(tree: Any, axis_name: AxisName) -> Any:
    """Returns the mean over the replicas, leaf by leaf."""
    return jax.tree.map(lambda x: psum(x, axis_name) / size(axis_name), tree)


def psum(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """Returns the sum over the replicas, of what may be known to be equal on all of them."""
    return lax.psum(_compat.vary_over(x, checked(axis_name)), axis_name)


def vary_if_bound(tree: Any, axis_name: AxisName) -> Any:
    """Returns `vary(tree, axis_name)`, or `tree` outside of the axis, where init may be called."""
    try:
        size(axis_name)
    except ValueError:
        return tree
    return vary(tree, axis_name)
