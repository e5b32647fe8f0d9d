r"""DiLoCo: an outer optimizer on the mean of what the replicas' local steps changed.

    theta_i = H inner steps from phi
    D   = mean_i (phi - theta_i)
    phi <- phi + outer(D),   theta_i <- phi

Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models", 2023,
arXiv:2311.08105, algorithm 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import optax

from jaxopt_lab import _checks, _tree
from jaxopt_lab.distributed import _axes, _rounds
from jaxopt_lab.distributed.local_updates import Exchange, local_updates


class DilocoState(NamedTuple):
    """Exchange state of DiLoCo; equal on all replicas, to the bit.

    Attributes:
      slow: phi; shapes of the parameters, `slow_dtype` or at least float32.
      outer_state: state of `outer` on the slow weights.
    """

    slow: optax.Params
    outer_state: optax.OptState


def diloco_exchange(
    outer: optax.GradientTransformation | None = None,
    *,
    axis_name: _axes.AxisName,
    slow_dtype: Any = None,
) -> Exchange:
    r"""Makes DiLoCo's exchange: one all-reduce of the pseudo-gradient, and an outer step.

    .. math::
      D = \frac{1}{N} \sum_i (\phi - \theta_i), \qquad \phi \leftarrow \phi + \text{outer}(D)

    Args:
      outer: any optax transformation, whose updates are added to the slow weights; by default
        `optax.sgd(0.7, momentum=0.9, nesterov=True)`.
      axis_name: the mapped axis of the replicas, or a tuple of several.
      slow_dtype: dtype of the slow weights; by default the parameter's, and at least float32.

    Returns:
      An `Exchange` with a `DilocoState`.

    Raises:
      ValueError: `slow_dtype` not floating; at finish, the axis not bound.
      TypeError: at init, parameters that are not real floating point; at finish, another state.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_lab import distributed
      >>> exchange = distributed.diloco_exchange(optax.sgd(1.0), axis_name="replica")
      >>> def one_round(theta):
      ...     state = exchange.init(jnp.zeros(()))
      ...     return exchange.finish(theta, state, exchange.begin(state))[0]
      >>> jax.vmap(one_round, axis_name="replica")(jnp.array([1.0, 3.0]))
      Array([2., 2.], dtype=float32)

    References:
      Douillard et al., `DiLoCo <https://arxiv.org/abs/2311.08105>`_, 2023.
    """
    axis_name = _axes.canonical(axis_name)
    outer = optax.sgd(0.7, momentum=0.9, nesterov=True) if outer is None else outer
    _checks.check_transformation(outer=outer)
    outer_update = optax.with_extra_args_support(outer).update
    slow_dtype = _checks.canonical_mu_dtype(slow_dtype, "slow_dtype")

    def init(params: optax.Params) -> DilocoState:
        slow = _rounds.slow_weights(params, slow_dtype)
        return DilocoState(slow=slow, outer_state=outer.init(slow))

    def begin(state: DilocoState) -> tuple[()]:
        del state
        return ()

    def finish(
        params: optax.Params, state: DilocoState, message: Any
    ) -> tuple[optax.Params, DilocoState]:
        del message
        state = _tree.check_state(state, DilocoState)
        mean = _axes.pmean(_rounds.descent(state.slow, params), axis_name)
        mean = jax.tree.map(lambda d, s: d.astype(s.dtype), mean, state.slow)
        updates, outer_state = outer_update(mean, state.outer_state, state.slow)
        slow = optax.apply_updates(state.slow, updates)
        return _rounds.start(slow, params), DilocoState(slow, outer_state)

    return Exchange(init, begin, finish, axis_name)


def diloco(
    inner: optax.GradientTransformation,
    outer: optax.GradientTransformation | None = None,
    sync_every: int = 500,
    *,
    axis_name: _axes.AxisName,
    slow_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Local steps with `inner`, and every `sync_every` of them a step of `outer` for all.

    A replica sends 2 (N-1)/N times the slow weights' bytes a round. Keep the outer momentum in
    bfloat16 with `optax.sgd(..., accumulator_dtype=jax.numpy.bfloat16)` or
    `quantize_state(outer, bfloat16())`, and in host memory, with the slow weights, by
    `train_rounds` with `diloco_exchange`.

    Args:
      inner: any optax transformation; its state is each replica's own.
      outer: any optax transformation; by default `optax.sgd(0.7, momentum=0.9, nesterov=True)`.
      sync_every: H, local steps in a round.
      axis_name: the mapped axis of the replicas, or a tuple of several.
      slow_dtype: dtype of the slow weights; by default the parameter's, and at least float32.

    Returns:
      A `GradientTransformationExtraArgs` with a `LocalUpdatesState`; its update needs `params`,
      and each replica's own gradient.

    Raises:
      ValueError: `sync_every` below 1, `slow_dtype` not floating; at update, `params` missing, the
        axis not bound, gradients that do not match or that `jax.grad` has already summed (see
        `vary`).
      TypeError: `inner` no transformation, `axis_name` no name, or `outer` no transformation;
        parameters or gradients that are not real floating point, or a state of another
        transformation.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_lab import distributed
      >>> tx = distributed.diloco(
      ...     optax.sgd(1.0), optax.sgd(0.5), sync_every=2, axis_name="replica")
      >>> def two_steps(gradient):
      ...     params = jnp.zeros(())
      ...     state = tx.init(params)
      ...     for _ in range(2):
      ...         updates, state = tx.update(gradient, state, params)
      ...         params = optax.apply_updates(params, updates)
      ...     return params
      >>> jax.vmap(two_steps, axis_name="replica")(jnp.array([1.0, 3.0]))
      Array([-2., -2.], dtype=float32)

    See Also:
      `local_updates` for how steps and exchanges alternate, `diloco_exchange` for the source.
    """
    exchange = diloco_exchange(outer, axis_name=axis_name, slow_dtype=slow_dtype)
    return local_updates(inner, exchange, sync_every)
