r"""Skipping a step that is not finite on one replica, on all of them.

bad = sum_i [some entry of g_i, or its weight, is no finite number]     one number is reduced
inner(g_i)  if bad == 0 or it has been bad too often in a row,  else no step
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab import _checks, _compat, _hyperparams, _tree
from jaxopt_lab.distributed import _axes, _weights


class ApplyIfFiniteState(NamedTuple):
    """State of `apply_if_finite`; all but `inner_state` is equal on all replicas.

    Attributes:
      notfinite_count: steps in a row that were not finite; int32, shape ().
      last_finite: whether the last step was; bool, shape ().
      total_notfinite: steps that were not; int32, shape ().
      inner_state: state of `inner`.
    """

    notfinite_count: jax.Array
    last_finite: jax.Array
    total_notfinite: jax.Array
    inner_state: optax.OptState


def apply_if_finite(
    inner: optax.GradientTransformation,
    axis_name: _axes.AxisName,
    max_consecutive_errors: int,
) -> optax.GradientTransformationExtraArgs:
    r"""Skips a step on all replicas if the gradient of any of them is not finite.

    .. math::
      b = \sum_{i=1}^{N} [\, g_i \text{ has a NaN or infinity} \,], \quad
      u = \begin{cases} \text{inner}(g_i) & b = 0 \text{ or more than } m \text{ bad steps in a row}
      \\ 0 & \text{else} \end{cases}

    `optax.apply_if_finite` looks at the replica's own gradient: around a transformation that
    exchanges, some replicas would skip what others wait for. Here they agree by one reduction of
    one number, before anything is exchanged or stored: put it around the whole chain. In a skipped
    step the update is zero, and the state of `inner` stays as it is, its counters and its memories
    of what was not sent among them. A `weight` of the mean that is negative or not finite counts as
    a gradient that is not.

    Args:
      inner: any optax transformation, which may exchange over `axis_name`, such as
        `optax.chain(error_feedback(...), optax.adam(1e-3))`, `one_bit_adam(...)` or `diloco(...)`.
      axis_name: the mapped axis, or a tuple of several, which count as one.
      max_consecutive_errors: m, at least 0; after that many bad steps in a row the next is applied
        as it is, until one is finite again.

    Returns:
      A `GradientTransformationExtraArgs` with an `ApplyIfFiniteState`; call `init` where that of
      `inner` has to be called.

    Raises:
      ValueError: `max_consecutive_errors` below 0; at update, an axis that is not bound.
      TypeError: `inner` no transformation, `axis_name` no name, `max_consecutive_errors` no
        integer; at update, a gradient that is not real floating point, or another state.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_lab import distributed
      >>> tx = distributed.apply_if_finite(
      ...     optax.chain(distributed.sync_gradients("replica"), optax.sgd(1.0)), "replica", 5)
      >>> def two_steps(bad, good):
      ...     first, state = tx.update(bad, tx.init(bad))
      ...     second, state = tx.update(good, state)
      ...     return first, second, state.total_notfinite
      >>> first, second, skipped = jax.vmap(two_steps, axis_name="replica")(
      ...     jnp.array([jnp.nan, 1.0]), jnp.array([1.0, 3.0]))
      >>> first, second, skipped
      (Array([0., 0.], dtype=float32), Array([-2., -2.], dtype=float32), Array([1, 1], dtype=int32))

    See Also:
      `optax.apply_if_finite`, for transformations behind the exchange, and for the local steps of
      `diloco` and its like.
    """
    _checks.check_transformation(inner=inner)
    axis_name = _axes.canonical(axis_name)
    _checks.check_scalar(max_consecutive_errors=max_consecutive_errors)
    if not jnp.issubdtype(jnp.result_type(max_consecutive_errors), jnp.integer):
        raise TypeError(
            f"max_consecutive_errors must be an integer, got {max_consecutive_errors!r}"
        )
    _checks.check_non_negative(max_consecutive_errors=max_consecutive_errors)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> ApplyIfFiniteState:
        return ApplyIfFiniteState(
            notfinite_count=jnp.zeros((), jnp.int32),
            last_finite=jnp.ones((), bool),
            total_notfinite=jnp.zeros((), jnp.int32),
            inner_state=inner.init(params),
        )

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, ApplyIfFiniteState]:
        state = _tree.check_state(state, ApplyIfFiniteState)
        for name, leaf in _tree.leaves_with_names(updates):
            _tree.check_gradient(name, leaf)
        own = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(updates)]
        if extra_args.get("weight") is not None:
            own.append(jnp.isfinite(_weights.checked(extra_args["weight"])))
        bad = ~functools.reduce(jnp.logical_and, own, jnp.ones((), bool))
        is_finite = _axes.psum(bad.astype(jnp.int32), axis_name) == 0
        in_a_row = jnp.where(is_finite, 0, _hyperparams.increment(state.notfinite_count))
        total = state.total_notfinite
        total = jnp.where(is_finite, total, _hyperparams.increment(total))

        def step() -> tuple[Any, Any]:
            return inner.update(updates, state.inner_state, params, **extra_args)

        def skip() -> tuple[Any, Any]:
            shapes, _ = jax.eval_shape(step)
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), state.inner_state

        updates, inner_state = _compat.cond(
            is_finite | (in_a_row > max_consecutive_errors), step, skip
        )
        return updates, ApplyIfFiniteState(in_a_row, is_finite, total, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
