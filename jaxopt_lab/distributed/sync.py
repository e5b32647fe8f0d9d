r"""The gradient of all replicas' data, from each replica's.

    mean:  (1/N) sum_i g_i        sum:  sum_i g_i

with `g_i` the gradient of replica i's own loss, whoever has summed it so far.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import optax
from jax import lax

from jaxopt_lab import _tree
from jaxopt_lab.distributed import _axes

_OPS = ("mean", "sum")


def sync_gradients(
    axis_name: _axes.AxisName | Sequence[_axes.AxisName], op: str = "mean"
) -> optax.GradientTransformationExtraArgs:
    r"""Averages or sums gradients over replicas, whatever autodiff has already done.

    .. math::
      g = \frac{1}{N} \sum_{i=1}^{N} \nabla f_i(w)

    Under `shard_map` with its default checking, `jax.grad` with respect to parameters that are
    equal on all replicas returns the *sum* over the replicas, and `jax.lax.pmean` of it is N times
    the mean, `psum` N squared times. Without checking, under `pmap` and under `vmap` the gradient
    is each replica's own. This reads which of the two each leaf is. Put it first in the chain,
    once, and keep collectives out of the loss: autodiff treats those, too, differently under the
    two modes.

    Args:
      axis_name: the mapped axis, or several.
      op: "mean", for a loss that is a mean over the replica's examples, or "sum", for one that is a
        sum over them.

    Returns:
      A `GradientTransformationExtraArgs` without state.

    Raises:
      ValueError: `op` is neither; at update, an axis that is not bound.
      TypeError: at update, a gradient that is not real floating point.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_lab import distributed
      >>> tx = optax.chain(distributed.sync_gradients("replica"), optax.sgd(1.0))
      >>> def update(params, batch):
      ...     grads = jax.grad(lambda w: jnp.sum(w * batch))(params)
      ...     updates, _ = tx.update(grads, tx.init(params), params)
      ...     return optax.apply_updates(params, updates)
      >>> batches = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> jax.vmap(update, (None, 0), axis_name="replica")(jnp.zeros(2), batches)
      Array([[-2., -3.],
             [-2., -3.]], dtype=float32)
    """
    if op not in _OPS:
        raise ValueError(f"op must be one of {_OPS}, got {op!r}")
    axes: tuple[_axes.AxisName, ...] = (axis_name,)
    if isinstance(axis_name, Sequence) and not isinstance(axis_name, str):
        axes = tuple(axis_name)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del params, extra_args
        replicas = math.prod(map(_axes.size, axes))
        for name, leaf in _tree.leaves_with_names(updates):
            _tree.check_gradient(name, leaf)

        def combine(g: jax.Array) -> jax.Array:
            own = tuple(axis for axis in axes if _axes.varies(g, axis))
            total = lax.psum(g, own) if own else g
            return total / replicas if op == "mean" else total

        return jax.tree.map(combine, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)
