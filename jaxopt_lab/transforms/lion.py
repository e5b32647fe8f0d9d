r"""Lion: the sign of an interpolation between momentum and gradient.

    d_t = sign(b1 m_{t-1} + (1 - b1) g_t)
    m_t = b2 m_{t-1} + (1 - b2) g_t

Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023, arXiv:2302.06675, Program 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab import _checks, _hyperparams, _tree


class ScaleByLionState(NamedTuple):
    """State of `scale_by_lion`: 4 bytes a parameter in float32.

    Attributes:
      mu: m; shapes of the parameters, dtype `mu_dtype` or the parameter's.
    """

    mu: optax.Updates


def scale_by_lion(
    b1: _hyperparams.Scalar = 0.9,
    b2: _hyperparams.Scalar = 0.99,
    *,
    mu_dtype: Any = None,
) -> optax.GradientTransformation:
    r"""Replaces the gradient by the sign of Lion's interpolated momentum.

    .. math::
      d_t &= \mathrm{sign}(\beta_1 m_{t-1} + (1 - \beta_1) g_t) \\
      m_t &= \beta_2 m_{t-1} + (1 - \beta_2) g_t

    The rule is the one of `optax.scale_by_lion`. The direction is computed from the *new* moment,
    :math:`d_t = \mathrm{sign}(\frac{\beta_1}{\beta_2} m_t + (1 - \frac{\beta_1}{\beta_2}) g_t)`,
    which is the same number: the old moment can then be overwritten in place, where XLA would
    otherwise copy it first (three times the step's time on a CPU).

    Args:
      b1: weight of the momentum in the direction, in [0, 1).
      b2: decay rate of the momentum, in [0, 1). The authors use (0.95, 0.98) for language models.
      mu_dtype: dtype of the momentum; by default the parameter's.

    Returns:
      A `GradientTransformation`; its update needs no `params`.

    Raises:
      ValueError: a rate outside [0, 1), `mu_dtype` not floating, or gradients that do not match.
      TypeError: parameters or gradients that are not real floating point.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> tx = scale_by_lion()
      >>> params = jnp.array([1.0, 2.0, 3.0])
      >>> updates, _ = tx.update(jnp.array([0.1, -3.0, 0.0]), tx.init(params))
      >>> [float(u) for u in updates]
      [1.0, -1.0, 0.0]

    References:
      Chen et al., `Symbolic Discovery of Optimization Algorithms
      <https://arxiv.org/abs/2302.06675>`_, 2023, Program 1.
    """
    _checks.check_decay(b1=b1, b2=b2)
    mu_dtype = _checks.canonical_mu_dtype(mu_dtype)
    new_moment_suffices = _checks.is_number(b1) and _checks.is_number(b2) and b2 > 0

    def init_fn(params: optax.Params) -> ScaleByLionState:
        return ScaleByLionState(mu=_tree.zeros_like(params, mu_dtype))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleByLionState]:
        state = _tree.check_state(state, ScaleByLionState)

        def rule(g: jax.Array, m: jax.Array) -> tuple[jax.Array, jax.Array]:
            m_new = b2 * m + (1 - b2) * g
            if new_moment_suffices:
                direction = (b1 / b2) * m_new + (1 - b1 / b2) * g
            else:
                direction = b1 * m + (1 - b1) * g
            return jnp.sign(direction), m_new

        updates, mu = _tree.map_leaves(rule, updates, state.mu, like=params)
        return updates, ScaleByLionState(mu=mu)

    return optax.GradientTransformation(init_fn, update_fn)


def lion(
    learning_rate: optax.ScalarOrSchedule,
    b1: _hyperparams.Scalar = 0.9,
    b2: _hyperparams.Scalar = 0.99,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: _tree.Mask = None,
    *,
    mu_dtype: Any = None,
) -> optax.GradientTransformation:
    """Lion with decoupled weight decay.

    The authors advise a learning rate 3 to 10 times smaller than AdamW's and a weight decay larger
    by the same factor, so that their product stays.

    Args:
      learning_rate: step size or schedule; every coordinate moves by exactly this much.
      b1: weight of the momentum in the direction, in [0, 1).
      b2: decay rate of the momentum, in [0, 1). The authors use (0.95, 0.98) for language models.
      weight_decay: decoupled decay, a number or a schedule, multiplied by the learning rate (0 in
        the authors' code).
      mask: tree of booleans, or a function of the parameters that returns one: what decays.
      mu_dtype: dtype of the momentum; by default the parameter's.

    Returns:
      A `GradientTransformation`; its update needs `params` if `weight_decay` is not 0, and
      ignores extra arguments. Updates are computed in float32 at least and rounded once, to the
      wider of the gradient's and the parameter's dtype; where weights of 16 bits are rounded
      stochastically, float32 gradients keep what that needs.

    Raises:
      ValueError: a rate outside [0, 1), `mu_dtype` not floating, or gradients that do not match;
        also a negative `learning_rate` or `weight_decay`.
      TypeError: parameters or gradients that are not real floating point, and what is no number, no
        schedule or no flag where one is expected; the message has the argument's name.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> tx = lion(1e-2, weight_decay=0.1)
      >>> params = {"w": jnp.ones((2, 2))}
      >>> updates, _ = tx.update({"w": jnp.full((2, 2), 0.3)}, tx.init(params), params)
      >>> f"{optax.apply_updates(params, updates)['w'][0, 0]:.3f}"
      '0.989'

    See Also:
      `scale_by_lion` for the bare rule and the source.
    """
    rule = scale_by_lion(b1, b2, mu_dtype=mu_dtype)
    return _hyperparams.ready_made(rule, learning_rate, weight_decay, mask, method="lion")
