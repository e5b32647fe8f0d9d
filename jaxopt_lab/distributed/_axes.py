"""What a value under a mapped axis is: equal on all replicas, or each replica's own.

`shard_map` with its default checking knows; it calls the second kind varying, and wants branches
and loops to agree on it. Unchecked `shard_map`, `pmap` and `vmap` do not know, and there every
function here leaves its argument as it is.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import jax
from jax import lax

from jaxopt_lab import _compat, _tree

AxisName = Hashable


def size(axis_name: AxisName) -> int:
    """Returns the number of replicas.

    Raises:
      ValueError: no surrounding `shard_map`, `pmap` or `vmap` has the axis.
    """
    try:
        return lax.axis_size(axis_name)
    except NameError as error:
        raise ValueError(
            f"axis {axis_name!r} is not bound; call inside shard_map, pmap or vmap with that axis"
        ) from error


def is_checked(axis_name: AxisName) -> bool:
    """Whether it is known which values vary over the axis."""
    size(axis_name)
    return axis_name in _compat.varying_axes(lax.axis_index(axis_name))


def varies(x: jax.Array, axis_name: AxisName) -> bool:
    """Whether `x` may differ between replicas; where nothing is known, it may."""
    return not is_checked(axis_name) or axis_name in _compat.varying_axes(x)


def vary(tree: Any, axis_name: AxisName) -> Any:
    """Returns `tree` with each leaf marked as the replica's own.

    Differentiate with respect to `vary(params, axis_name)` to get each replica's own gradient:
    with respect to parameters known to be equal, autodiff sums over the replicas by itself.

    Args:
      tree: arrays.
      axis_name: the mapped axis.

    Returns:
      The same values. Costs nothing.

    Raises:
      ValueError: the axis is not bound.

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
    if not is_checked(axis_name):
        return tree

    def mark(x: Any) -> Any:
        if axis_name in _compat.varying_axes(x):
            return x
        return lax.pcast(x, axis_name, to="varying")

    return jax.tree.map(mark, tree)


def vary_like(tree: Any, like: Any) -> Any:
    """Marks each leaf of `tree` as varying over what its counterpart in `like` varies over."""
    return jax.tree.map(lambda x, other: _compat.vary_alike([x], other)[0], tree, like)


def require_own(updates: Any, axis_name: AxisName, method: str) -> None:
    """Refuses gradients that autodiff has already summed over the replicas.

    Raises:
      ValueError: a leaf does not vary over the axis; the message has its path.
    """
    if not is_checked(axis_name):
        return
    for name, leaf in _tree.leaves_with_names(updates):
        if axis_name not in _compat.varying_axes(leaf):
            raise ValueError(
                f"{method}: the gradient of '{name}' is the same on all replicas of axis "
                f"{axis_name!r}, because jax.grad summed it; differentiate with respect to "
                f"jaxopt_lab.distributed.vary(params, {axis_name!r}), so that each replica has its "
                "own gradient to send"
            )


def all_gather(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """Returns the replicas' values along a new leading axis, known to be equal on all replicas."""
    return lax.all_gather(x, axis_name, to="invarying" if is_checked(axis_name) else "varying")


def pmean(tree: Any, axis_name: AxisName) -> Any:
    """Returns the mean over the replicas, leaf by leaf."""
    return jax.tree.map(lambda x: lax.psum(x, axis_name) / size(axis_name), tree)


def vary_if_bound(tree: Any, axis_name: AxisName) -> Any:
    """Returns `vary(tree, axis_name)`, or `tree` outside of the axis, where init may be called."""
    try:
        lax.axis_size(axis_name)
    except NameError:
        return tree
    return vary(tree, axis_name)
