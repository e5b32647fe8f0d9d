r"""The gradient of all replicas' data, from each replica's.

    mean:  (1/N) sum_i g_i        sum:  sum_i g_i        weighted:  sum_i w_i g_i / sum_i w_i

with `g_i` the gradient of replica i's own loss, whoever has summed it so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import optax
from jax import lax

from jaxopt_lab import _checks, _tree
from jaxopt_lab.distributed import _axes, _weights

_OPS = ("mean", "sum")


def sync_gradients(
    axis_name: _axes.AxisName | Sequence[_axes.AxisName], op: Literal["mean", "sum"] = "mean"
) -> optax.GradientTransformationExtraArgs:
    r"""Averages or sums gradients over replicas, whatever autodiff has already done.

    .. math::
      g = \frac{1}{N} \sum_{i=1}^{N} \nabla f_i(w) \quad \text{or} \quad
      g = \frac{\sum_i w_i \nabla f_i(w)}{\sum_i w_i}

    Under `shard_map` with its default checking, `jax.grad` with respect to parameters that are
    equal on all replicas returns the *sum* over the replicas, and `jax.lax.pmean` of it is N times
    the mean, `psum` N squared times. Without checking, under `pmap` and under `vmap` the gradient
    is each replica's own. This reads which of the two each leaf is. Put it first in the chain,
    once, and keep collectives out of the loss: autodiff treats those, too, differently under the
    two modes.

    The second formula is that of an update with `weight`, the replica's number: where the losses
    are means over unequal numbers of tokens, their counts give the gradient of the mean over all
    tokens, which a mean of means is not. A replica of weight 0 takes no part, whatever its gradient
    (0/0 of no tokens), and if all weights are 0, so is the gradient. With a weight that turns out
    negative or not finite while the program runs the gradient is NaN; `apply_if_finite` skips it.

    Args:
      axis_name: the mapped axis, or several.
      op: "mean", for a loss that is a mean over the replica's examples, or "sum", for one that is a
        sum over them.

    Returns:
      A `GradientTransformationExtraArgs` without state. Its update takes the extra argument
      `weight`, a number that is not negative, shape (), for this call: `tx.update(grads, state,
      params, weight=tokens)`, also through `optax.chain`.

    Raises:
      ValueError: `op` is neither, no axis, or one twice; at update, an axis that is not bound; with
        `weight`, an `op` of "sum", another shape than (), a number that is negative or not finite,
        or gradients that `jax.grad` has already summed (see `vary`).
      TypeError: `axis_name` no name; at update, a gradient or a `weight` that is not real.

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
    _checks.check_choice(_OPS, op=op)
    axis_name = _axes.canonical(axis_name)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        weight: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del params, extra_args
        replicas = _axes.size(axis_name)
        for name, leaf in _tree.leaves_with_names(updates):
            _tree.check_gradient(name, leaf)
        if weight is not None:
            if op == "sum":
                raise ValueError('weight is that of a mean, but op is "sum"')
            _axes.require_own(updates, axis_name, "sync_gradients with a weight")
            return jax.tree.map(
                lambda g: _axes.psum(g, axis_name), _weights.weighted(updates, weight, axis_name)
            ), state

        def combine(g: jax.Array) -> jax.Array:
            own = tuple(axis for axis in _axes.names(axis_name) if _axes.varies(g, axis))
            total = lax.psum(g, own) if own else g
            return total / replicas if op == "mean" else total

        return jax.tree.map(combine, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)
