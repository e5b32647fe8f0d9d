r"""A mean over two levels of network that asks little of the slow one.

r = reduce-scatter over the fast axis        each replica: the mean of one part of its host
s = slow(r)                                  any exchange over the slow axis, of that part only
g = all-gather over the fast axis
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab import _checks, _tree
from jaxopt_lab.distributed import _axes, _flat, _weights


class HierarchicalMeanState(NamedTuple):
    """State of `hierarchical_mean`.

    Attributes:
      slow: state of the exchange over the slow axis, for the replica's part, shape (n,).
    """

    slow: optax.OptState


def hierarchical_mean(
    slow: optax.GradientTransformation, fast_axis: _axes.AxisName
) -> optax.GradientTransformationExtraArgs:
    r"""Averages gradients inside hosts in full, and between hosts by another transformation.

    .. math::
      r_{h,j} = \Big(\frac{1}{a} \sum_{i} g_{h,i}\Big)_j, \quad
      s_j = \text{slow}(r_{1,j}, r_{2,j}, \dots), \quad g = (s_1, \dots, s_a)

    for hosts h with a replicas each. All leaves travel as one vector, of which every replica of a
    host owns one of a equal parts (zeros are added at the end). On the slow link each replica sends
    1/a of what it would send without the levels.

    Args:
      slow: the exchange over the slow axis, such as `sync_gradients(slow_axis)`,
        `error_feedback(top_k(0.01), slow_axis)` or `ef21(...)`. It sees one vector, the replica's
        part.
      fast_axis: the mapped axis inside a host; the mesh has another axis for the slow level.

    Returns:
      A `GradientTransformationExtraArgs`; call `init` under the mapped axes. Its update takes the
      extra argument `weight` as `sync_gradients` does, and hands the sum of a host's on to `slow`.

    Raises:
      ValueError: an axis that is not bound; `slow` exchanges over `fast_axis`, too; gradients that
        `jax.grad` has already summed (see `vary`).
      TypeError: parameters or gradients that are not real floating point.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_lab import distributed
      >>> tx = distributed.hierarchical_mean(distributed.sync_gradients("host"), "device")
      >>> def mean(g):
      ...     return tx.update(g, tx.init(g))[0]
      >>> both = jax.vmap(jax.vmap(mean, axis_name="device"), axis_name="host")
      >>> both(jnp.arange(12.0).reshape(2, 2, 3))[0, 0]
      Array([4.5, 5.5, 6.5], dtype=float32)
    """
    _checks.check_transformation(slow=slow)
    fast_axis = _axes.canonical(fast_axis, "fast_axis")
    slow = optax.with_extra_args_support(slow)

    def part_of(tree: Any) -> jax.Array:
        """Returns the replica's part, without a mean."""
        return _axes.part(_flat.padded(_flat.ravel(tree), _axes.size(fast_axis)), fast_axis)

    def init_fn(params: optax.Params) -> HierarchicalMeanState:
        _tree.check_params(params)
        part = part_of(params)
        with _axes.averaged(fast_axis):
            return HierarchicalMeanState(slow.init(part))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        weight: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, HierarchicalMeanState]:
        state = _tree.check_state(state, HierarchicalMeanState)
        for name, leaf in _tree.leaves_with_names(updates):
            _tree.check_gradient(name, leaf)
        _axes.require_own(updates, fast_axis, "hierarchical_mean")
        replicas = _axes.size(fast_axis)
        if weight is None:
            own, divisor = updates, replicas
        else:  # the host's, of the host's weight
            own, divisor = _weights.weighted(updates, weight, fast_axis), 1
            extra_args["weight"] = _axes.psum(_weights.checked(weight), fast_axis)
        part = _axes.psum_scatter(_flat.padded(_flat.ravel(own), replicas), fast_axis) / divisor
        part_params = None if params is None else part_of(params)
        with _axes.averaged(fast_axis):
            mean, slow_state = slow.update(part, state.slow, part_params, **extra_args)
        whole = jnp.reshape(_axes.all_gather(jnp.asarray(mean), fast_axis), -1)
        return _flat.unravel(whole, updates), HierarchicalMeanState(slow_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
