r"""CO2: an outer step on the mean of the round before, whose all-reduce runs beside this round.

    m <- clip(mu m + (x_{t-1,0} - mean_i x^i_{t-1,tau}) / Lambda_t, -c, c)
    x_{t+1,0} = x_{t,0} - lr m

Sun et al., "CO2: Efficient Distributed Training with Full Communication-Computation Overlap", ICLR
2024, arXiv:2401.16265. Where the paper and the authors' code differ, this is the paper's recursion.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab import _checks, _hyperparams, _tree
from jaxopt_lab.distributed import _axes, _flat, _rounds
from jaxopt_lab.distributed.local_updates import Exchange, local_updates

Penalty = Callable[[jax.Array, jax.Array], Any]


class Co2State(NamedTuple):
    """Exchange state of CO2; equal on all replicas but for `pending`.

    Attributes:
      round: t, rounds done; int32, shape ().
      slow: x_{t,0}; shapes of the parameters, at least float32.
      pending: x_{t-1,0} - x^i_{t-1,tau}, to be averaged; each replica's own.
      outer_state: state of the outer step on the slow weights.
      gap: root mean square of x_{t,0} - x_{t-1,0}; float32, shape ().
    """

    round: jax.Array
    slow: optax.Params
    pending: optax.Params
    outer_state: optax.OptState
    gap: jax.Array


def gap_aware(learning_rate: optax.ScalarOrSchedule, sync_every: int) -> Penalty:
    r"""Makes a staleness penalty from how far the start has moved, in typical local steps.

    .. math::
      \Lambda_t = 1 + \frac{\mathrm{RMS}(x_{t,0} - x_{t-1,0})}{\tau \gamma}

    Args:
      learning_rate: :math:`\gamma`, the typical size of a coordinate's local step: for Adam its
        learning rate; or a schedule of local steps.
      sync_every: :math:`\tau`, local steps in a round.

    Returns:
      A function of the gap and the round, for `co2(staleness_penalty=...)`.

    Raises:
      ValueError: `learning_rate` not positive or `sync_every` below 1.
      TypeError: `sync_every` not an integer.

    Examples:
      >>> import jax.numpy as jnp
      >>> float(gap_aware(0.125, sync_every=4)(jnp.float32(1.0), jnp.int32(7)))
      3.0

    References:
      Barkai et al., `Gap Aware Mitigation of Gradient Staleness
      <https://arxiv.org/abs/1909.10802>`_, ICLR 2020. That CO2's penalty is this one is our
      reading; the authors' code has a constant.
    """
    _checks.check_positive_integer(sync_every=sync_every)
    if not callable(learning_rate):
        _checks.check_positive(learning_rate=learning_rate)

    def penalty(gap: jax.Array, count: jax.Array) -> jax.Array:
        rate = learning_rate(count * sync_every) if callable(learning_rate) else learning_rate
        return 1 + gap / (sync_every * rate)

    return penalty


def co2_exchange(
    outer: optax.GradientTransformation | None = None,
    *,
    axis_name: _axes.AxisName,
    learning_rate: optax.ScalarOrSchedule | None = None,
    momentum: _hyperparams.Scalar | None = None,
    clip: _hyperparams.Scalar | None = None,
    staleness_penalty: _hyperparams.Scalar | Penalty = 1.0,
) -> Exchange:
    r"""Makes CO2's exchange: `begin` averages the round before, `finish` makes the outer step.

    .. math::
      m &\leftarrow \mathrm{clip}(\mu m + (x_{t-1,0} - \bar x_{t-1,\tau}) / \Lambda_t, -c, c) \\
      x_{t+1,0} &= x_{t,0} - \eta \, m

    The all-reduce of `begin` needs nothing of the round's local steps: in a program that has both,
    a compiler may run them side by side. The first round has nothing to average, and all
    go back to where they started. Staleness asks for a small momentum: on a quadratic where the
    synchronous step converges with 0.8, this one diverges.

    Args:
      outer: any optax transformation, given the penalised difference as a gradient, in place of
        the momentum and learning rate below.
      axis_name: the mapped axis of the replicas, or a tuple of several.
      learning_rate: :math:`\eta`, or a schedule of outer steps; 1 if None.
      momentum: :math:`\mu`, in [0, 1); 0.2 if None.
      clip: c, the largest entry of the momentum, which is kept clipped; None for no bound.
      staleness_penalty: :math:`\Lambda`, or a function `(gap, round) -> Lambda` of the root mean
        square of the last outer update and the number of rounds done, such as `gap_aware(...)`.

    Returns:
      An `Exchange` with a `Co2State`.

    Raises:
      ValueError: `learning_rate`, `momentum` or `clip` beside an `outer`, or a value out of range;
        at begin, the axis not bound.
      TypeError: at init, parameters that are not real floating point; at begin or finish, another
        state.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_lab import distributed
      >>> exchange = distributed.co2_exchange(axis_name="replica")
      >>> def two_rounds(change):
      ...     theta = jnp.zeros(())
      ...     state = exchange.init(theta)
      ...     starts = []
      ...     for _ in range(2):
      ...         theta, state = exchange.finish(theta + change, state, exchange.begin(state))
      ...         starts.append(theta)
      ...     return jnp.stack(starts)
      >>> jax.vmap(two_rounds, axis_name="replica")(jnp.array([1.0, 3.0]))
      Array([[0., 2.],
             [0., 2.]], dtype=float32)

    References:
      Sun et al., `CO2 <https://arxiv.org/abs/2401.16265>`_, ICLR 2024.
    """
    axis_name = _axes.canonical(axis_name)
    if outer is None:
        outer = _clipped_heavy_ball(learning_rate, momentum, clip)
    elif any(value is not None for value in (learning_rate, momentum, clip)):
        raise ValueError("learning_rate, momentum and clip are those of the default outer step: "
                         "give either them or outer")  # fmt: skip
    if not callable(staleness_penalty):
        _checks.check_positive(staleness_penalty=staleness_penalty)
    _checks.check_transformation(outer=outer)
    outer_update = optax.with_extra_args_support(outer).update

    def init(params: optax.Params) -> Co2State:
        slow = _rounds.slow_weights(params)
        still = _tree.zeros_like(slow)
        return Co2State(
            round=jnp.zeros((), jnp.int32),
            slow=slow,
            pending=_axes.vary_if_bound(still, axis_name),
            outer_state=outer.init(slow),
            gap=_root_mean_square(still),
        )

    def begin(state: Co2State) -> optax.Params:
        return _axes.pmean(_tree.check_state(state, Co2State).pending, axis_name)

    def finish(
        params: optax.Params, state: Co2State, message: optax.Params
    ) -> tuple[optax.Params, Co2State]:
        state = _tree.check_state(state, Co2State)
        penalty: Any = staleness_penalty
        if callable(staleness_penalty):
            penalty = staleness_penalty(state.gap, state.round)
        gradient = jax.tree.map(lambda d: (d / penalty).astype(d.dtype), message)
        updates, outer_state = outer_update(gradient, state.outer_state, state.slow)
        # Any outer step: one with weight decay would move on a gradient of zero.
        hold = state.round == 0
        updates = jax.tree.map(lambda u: jnp.where(hold, jnp.zeros_like(u), u), updates)
        outer_state = jax.tree.map(
            lambda old, new: jnp.where(hold, old, new), state.outer_state, outer_state
        )
        slow = optax.apply_updates(state.slow, updates)
        return _rounds.start(slow, params), Co2State(
            round=_hyperparams.increment(state.round),
            slow=slow,
            pending=_rounds.descent(state.slow, params),
            outer_state=outer_state,
            gap=_root_mean_square(updates),
        )

    return Exchange(init, begin, finish, axis_name)


def co2(
    inner: optax.GradientTransformation,
    outer: optax.GradientTransformation | None = None,
    sync_every: int = 48,
    *,
    axis_name: _axes.AxisName,
    learning_rate: optax.ScalarOrSchedule | None = None,
    momentum: _hyperparams.Scalar | None = None,
    clip: _hyperparams.Scalar | None = None,
    staleness_penalty: _hyperparams.Scalar | Penalty = 1.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Local steps with `inner`, and every `sync_every` of them an outer step one round late.

    A replica sends 2 (N-1)/N times the slow weights' bytes a round. One update is one local step,
    so the all-reduce overlaps with local steps only in a program of a whole round: `train_rounds`
    with `co2_exchange`.

    Args:
      inner: any optax transformation; its state is each replica's own.
      outer: any optax transformation, given the penalised difference as a gradient, in place of
        the momentum and learning rate below.
      sync_every: tau, local steps in a round.
      axis_name: the mapped axis of the replicas, or a tuple of several.
      learning_rate: :math:`\eta`, or a schedule of outer steps; 1 if None.
      momentum: :math:`\mu`, in [0, 1); 0.2 if None.
      clip: c, the largest entry of the momentum, which is kept clipped; None for no bound.
      staleness_penalty: :math:`\Lambda`, or a function `(gap, round) -> Lambda` of the root mean
        square of the last outer update and the number of rounds done, such as `gap_aware(...)`.

    Returns:
      A `GradientTransformationExtraArgs` with a `LocalUpdatesState`; its update needs `params`,
      and each replica's own gradient.

    Raises:
      ValueError: `sync_every` below 1, `learning_rate`, `momentum` or `clip` beside an `outer`, or
        a value out of range; at update, `params` missing, the axis not bound, gradients that do not
        match or that `jax.grad` has already summed (see `vary`).
      TypeError: `inner` no transformation, `axis_name` no name, or `outer` no transformation;
        parameters or gradients that are not real floating point, or a state of another
        transformation.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_lab import distributed
      >>> tx = distributed.co2(optax.sgd(1.0), sync_every=1, axis_name="replica")
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
      `local_updates` for how steps and exchanges alternate, `co2_exchange` for the source.
    """
    exchange = co2_exchange(
        outer,
        axis_name=axis_name,
        learning_rate=learning_rate,
        momentum=momentum,
        clip=clip,
        staleness_penalty=staleness_penalty,
    )
    return local_updates(inner, exchange, sync_every)


def _clipped_heavy_ball(
    learning_rate: Any, momentum: Any, clip: Any
) -> optax.GradientTransformation:
    learning_rate = 1.0 if learning_rate is None else learning_rate
    momentum = 0.2 if momentum is None else momentum
    _checks.check_decay(momentum=momentum)
    if clip is not None and not (_checks.is_number(clip) and clip == math.inf):
        _checks.check_non_negative(clip=clip)

    def init_fn(params: optax.Params) -> optax.TraceState:
        return optax.TraceState(trace=_tree.zeros_like(params))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.TraceState]:
        del params

        def rule(d: jax.Array, m: jax.Array) -> tuple[jax.Array, jax.Array]:
            m = momentum * m + d
            m = m if clip is None else jnp.clip(m, -clip, clip)
            return m, m

        updates, trace = _tree.map_leaves(rule, updates, state.trace)
        return updates, optax.TraceState(trace=trace)

    rule = optax.GradientTransformation(init_fn, update_fn)
    return optax.chain(rule, _hyperparams.scale_by_learning_rate(learning_rate))


def _root_mean_square(tree: Any) -> jax.Array:
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, jnp.zeros((), jnp.float32)) / max(_flat.size(tree), 1))
