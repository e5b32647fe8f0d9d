r"""NoLoCo: DiLoCo's outer step with the mean of a random pair in place of the mean of all.

    D_i = theta_i - phi_i,   theta_i = H inner steps from phi_i
    m_i   <- mu m_i + lr (mean_G D + c (mean_G phi - phi_i)),   G = {i, a random partner}
    phi_i <- phi_i + m_i,   theta_i <- phi_i

Kolehmainen et al., "NoLoCo: No-all-reduce Low Communication Training Method for Large Models",
2025, arXiv:2506.10911; the rule is that of the authors' code, where c = 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_lab import _checks, _hyperparams, _tree
from jaxopt_lab.distributed import _axes, _rounds, pairing
from jaxopt_lab.distributed.local_updates import Exchange, local_updates

_GROUP = 2


class NolocoState(NamedTuple):
    """Exchange state of NoLoCo.

    Attributes:
      round: rounds done; int32, shape (); equal on all replicas, it draws the pairs.
      slow: phi_i; shapes of the parameters, at least float32; each replica's own.
      outer_state: state of the outer step on the slow weights; each replica's own.
    """

    round: jax.Array
    slow: optax.Params
    outer_state: optax.OptState


def noloco_exchange(
    outer: optax.GradientTransformation | None = None,
    *,
    axis_name: _axes.AxisName,
    learning_rate: optax.ScalarOrSchedule | None = None,
    momentum: _hyperparams.Scalar | None = None,
    coupling: _hyperparams.Scalar = 1.0,
    seed: int = 0,
) -> Exchange:
    r"""Makes NoLoCo's exchange: a random pair averages, and each makes an outer step of its own.

    .. math::
      m_i &\leftarrow \mu m_i + \eta \, \bigl(\tfrac{1}{2} (D_i + D_j)
        + c \, (\tfrac{1}{2} (\phi_i + \phi_j) - \phi_i)\bigr) \\
      \phi_i &\leftarrow \phi_i + m_i

    The outer step is given minus the bracket as a gradient. With c = 1 the bracket is the pair's
    mean of :math:`\theta`, less :math:`\phi_i`, and one array a leaf is sent; else it is two. There
    is no collective but permutes. Pairs are drawn from the round robin, or, where that has
    more than 32 rounds, from 32 random matchings. With an odd number of replicas one sits out each
    round. Replicas differ: evaluate the mean of their slow weights.

    Args:
      outer: any optax transformation, in place of `optax.sgd(learning_rate, momentum)`.
      axis_name: the mapped axis of the replicas, or a tuple of several.
      learning_rate: :math:`\eta` of the default outer step, or a schedule of rounds; 0.7 if None.
      momentum: :math:`\mu` of the default outer step, in [0, 1); 0.5 if None.
      coupling: c, the pull towards the partner's slow weights relative to that of the local steps.
        The paper's :math:`\gamma` is :math:`c \, \eta`.
      seed: of the pairs.

    Returns:
      An `Exchange` with a `NolocoState`.

    Raises:
      ValueError: `learning_rate` or `momentum` beside an `outer`, a value out of range, or a
        momentum and gamma with which the replicas drift apart (`largest_stable_gamma`).
      TypeError: `seed` no integer; at init, parameters that are not real floating point; at finish,
        another state.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_lab import distributed
      >>> exchange = distributed.noloco_exchange(axis_name="replica", learning_rate=0.5)
      >>> def one_round(theta):
      ...     state = exchange.init(jnp.zeros(()))
      ...     return exchange.finish(theta, state, exchange.begin(state))[0]
      >>> jax.vmap(one_round, axis_name="replica")(jnp.array([1.0, 3.0]))
      Array([1., 1.], dtype=float32)

    References:
      Kolehmainen et al., `NoLoCo <https://arxiv.org/abs/2506.10911>`_, 2025.
    """
    if outer is None:
        outer = _heavy_ball(learning_rate, momentum, coupling)
    elif learning_rate is not None or momentum is not None:
        raise ValueError("learning_rate and momentum are those of the default outer step: give "
                         "either them or outer")  # fmt: skip
    _checks.check_non_negative(coupling=coupling)
    _checks.check_seed(seed)
    axis_name = _axes.canonical(axis_name)
    _checks.check_transformation(outer=outer)
    outer_update = optax.with_extra_args_support(outer).update
    one_payload = _checks.is_number(coupling) and coupling == 1

    def init(params: optax.Params) -> NolocoState:
        slow = _axes.vary_if_bound(_rounds.slow_weights(params), axis_name)
        return NolocoState(jnp.zeros((), jnp.int32), slow, outer.init(slow))

    def begin(state: NolocoState) -> tuple[()]:
        del state
        return ()

    def finish(
        params: optax.Params, state: NolocoState, message: Any
    ) -> tuple[optax.Params, NolocoState]:
        del message
        state = _tree.check_state(state, NolocoState)

        def average(tree: Any) -> Any:
            other = pairing.receive_from_random(tree, state.round, axis_name, seed)
            return jax.tree.map(lambda own, theirs: (own + theirs) / _GROUP, tree, other)

        uphill = _rounds.descent(state.slow, params)
        if one_payload:
            # Not theta itself: where it is 16-bit, it lacks what its start lost in rounding.
            fast = jax.tree.map(jnp.subtract, state.slow, uphill)
            gradient = jax.tree.map(jnp.subtract, state.slow, average(fast))
        else:
            gradient = jax.tree.map(
                lambda d, phi, own: (d + coupling * (own - phi)).astype(own.dtype),
                *average((uphill, state.slow)),
                state.slow,
            )
        updates, outer_state = outer_update(gradient, state.outer_state, state.slow)
        slow = optax.apply_updates(state.slow, updates)
        count = _hyperparams.increment(state.round)
        return _rounds.start(slow, params), NolocoState(count, slow, outer_state)

    return Exchange(init, begin, finish, axis_name)


def noloco(
    inner: optax.GradientTransformation,
    outer: optax.GradientTransformation | None = None,
    sync_every: int = 50,
    *,
    axis_name: _axes.AxisName,
    learning_rate: optax.ScalarOrSchedule | None = None,
    momentum: _hyperparams.Scalar | None = None,
    coupling: _hyperparams.Scalar = 1.0,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Local steps with `inner`, and every `sync_every` of them an average with a random partner.

    A replica sends the slow weights' bytes once a round, twice with a `coupling` other than 1,
    however many replicas there are.

    Args:
      inner: any optax transformation; its state is each replica's own.
      outer: any optax transformation, in place of `optax.sgd(learning_rate, momentum)`.
      sync_every: H, local steps in a round.
      axis_name: the mapped axis of the replicas, or a tuple of several.
      learning_rate: :math:`\eta` of the default outer step, or a schedule of rounds; 0.7 if None.
      momentum: :math:`\mu` of the default outer step, in [0, 1); 0.5 if None.
      coupling: c, the pull towards the partner's slow weights relative to that of the local steps.
        The paper's :math:`\gamma` is :math:`c \, \eta`.
      seed: of the pairs.

    Returns:
      A `GradientTransformationExtraArgs` with a `LocalUpdatesState`; its update needs `params`,
      and each replica's own gradient.

    Raises:
      ValueError: `sync_every` below 1, `learning_rate` or `momentum` beside an `outer`, a value out
        of range, or a momentum and gamma with which the replicas drift apart
        (`largest_stable_gamma`); at update, `params` missing, the axis not bound, gradients that do
        not match or that `jax.grad` has already summed (see `vary`).
      TypeError: `inner` no transformation, `axis_name` no name, `outer` no transformation, or
        `seed` no integer; parameters or gradients that are not real floating point, or a state of
        another transformation.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_lab import distributed
      >>> tx = distributed.noloco(optax.sgd(1.0), sync_every=1, axis_name="replica")
      >>> def step(gradient):
      ...     params = jnp.zeros(())
      ...     updates, _ = tx.update(gradient, tx.init(params), params)
      ...     return optax.apply_updates(params, updates)
      >>> jax.vmap(step, axis_name="replica")(jnp.array([1.0, 3.0])).round(2)
      Array([-1.4, -1.4], dtype=float32)

    See Also:
      `local_updates` for how steps and exchanges alternate, `noloco_exchange` for the source.
    """
    exchange = noloco_exchange(
        outer,
        axis_name=axis_name,
        learning_rate=learning_rate,
        momentum=momentum,
        coupling=coupling,
        seed=seed,
    )
    return local_updates(inner, exchange, sync_every)


def largest_stable_gamma(momentum: float) -> float:
    r"""Returns the gamma below which the slow weights of many random pairs come together.

    Without local steps, :math:`\delta_i \leftarrow \mu \delta_i + \gamma (\bar\phi_G - \phi_i)` and
    :math:`\phi_i \leftarrow \phi_i + \delta_i`. The second moments of :math:`\phi_i` and
    :math:`\delta_i` around the mean of all then follow a linear recursion, which contracts for
    gamma between 0 and this number.

    Args:
      momentum: mu, in [0, 1).

    Returns:
      The number, to 1e-9.

    Raises:
      ValueError: `momentum` out of range.

    Examples:
      >>> [round(largest_stable_gamma(mu), 2) for mu in (0.0, 0.3, 0.5, 0.9)]
      [2.0, 1.82, 1.5, 0.38]
    """
    _checks.check_decay(momentum=momentum)
    mu, own = float(momentum), 1 - 1 / _GROUP

    def contracts(gamma: float) -> bool:
        # Of (E phi^2, E phi delta, E delta^2); a partner drawn at random is uncorrelated.
        delta = np.array([gamma**2 * own, -2 * mu * gamma * own, mu**2])
        cross = np.array([-gamma * own, mu, 0.0])
        moments = np.stack([np.array([1.0, 0.0, 0.0]) + 2 * cross + delta, cross + delta, delta])
        return bool(np.abs(np.linalg.eigvals(moments)).max() < 1)

    low, high = 0.0, 2.0 / own
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if contracts(middle) else (low, middle)
    return low


def _heavy_ball(learning_rate: Any, momentum: Any, coupling: Any) -> optax.GradientTransformation:
    learning_rate = 0.7 if learning_rate is None else learning_rate
    momentum = 0.5 if momentum is None else momentum
    _checks.check_decay(momentum=momentum)
    _checks.check_non_negative(learning_rate=learning_rate)
    if all(map(_checks.is_number, (learning_rate, momentum, coupling))):
        gamma, largest = coupling * learning_rate, largest_stable_gamma(momentum)
        if gamma >= largest:
            raise ValueError(
                f"with momentum={momentum} and gamma = coupling * learning_rate = {gamma:.4g} the "
                f"replicas drift apart; gamma must be below {largest:.4g} at this momentum"
            )
    return optax.sgd(learning_rate, momentum=momentum)
