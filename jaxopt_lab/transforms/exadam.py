r"""EXAdam: Adam whose two moments correct each other.

    m_t = b1 m_{t-1} + (1 - b1) g_t,  v_t = b2 v_{t-1} + (1 - b2) g_t^2
    d1 = 1 + b2^t v_t / (v_t + eps),  d2 = 1 + b1^t m_t^2 / (m_t^2 + eps)
    update = a_t (m_t + g_t) d1 / (1 - b1^t) / (sqrt(v_t d2 / (1 - b2^t)) + eps)

Adly, "EXAdam: The Power of Adaptive Cross-Moments", 2024, arXiv:2412.20302; the author's exadam.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab import _checks, _hyperparams, _tree

# What the contract of `jaxopt_lab.testing` asks and this rule does not promise.
CONTRACT_EXCEPTIONS = {
    "float32_gradient_1e+25_state": "the square of a gradient above 1.8e19 overflows float32",
    "float32_gradient_1e+25_updates": "the cross term of an overflowed moment is inf / inf",
}


class ScaleByExadamState(NamedTuple):
    """State of `scale_by_exadam`: 8 bytes a parameter in float32.

    Attributes:
      count: steps taken; int32, shape ().
      mu: m; shapes of the parameters, dtype `mu_dtype` or the parameter's.
      nu: v; at least float32.
    """

    count: jax.Array
    mu: optax.Updates
    nu: optax.Updates


def scale_by_exadam(
    b1: _hyperparams.Scalar = 0.9,
    b2: _hyperparams.Scalar = 0.999,
    eps: _hyperparams.Scalar = 1e-8,
    *,
    dynamic_step_size: bool = True,
    mu_dtype: Any = None,
) -> optax.GradientTransformation:
    r"""Rescales the gradient by EXAdam.

    .. math::
      d_1 &= 1 + \beta_2^t \frac{v_t}{v_t + \epsilon}, \quad
      d_2 = 1 + \beta_1^t \frac{m_t^2}{m_t^2 + \epsilon} \\
      u_t &= a_t \frac{(m_t + g_t)\, d_1 / (1 - \beta_1^t)}
      {\sqrt{v_t\, d_2 / (1 - \beta_2^t)} + \epsilon}

    with Adam's moments and :math:`a_t = \ln(\sqrt 2 \sqrt{t + 1})`, or 1 without
    `dynamic_step_size`. The first step is large, about 16 times a unit step with the defaults
    (11 with the dynamic step size), since :math:`g_1` too is divided by :math:`1 - \beta_1`; later
    steps are about twice Adam's. Warm up, or take a smaller learning rate.

    Args:
      b1: decay rate of the first moment, in [0, 1).
      b2: decay rate of the second moment, in [0, 1).
      eps: added in both cross terms and to the root; positive, since zero would give 0 / 0.
      dynamic_step_size: the growing step of the paper's first version; its second drops it.
      mu_dtype: dtype of the first moment; by default the parameter's.

    Returns:
      A `GradientTransformation`; its update needs no `params`.

    Raises:
      ValueError: a rate outside [0, 1), `eps` not positive, `mu_dtype` not floating, or gradients
        that do not match.
      TypeError: parameters or gradients that are not real floating point.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> tx = scale_by_exadam(dynamic_step_size=False)
      >>> params = jnp.array([1.0, 2.0])
      >>> updates, _ = tx.update(jnp.array([0.5, -0.5]), tx.init(params))
      >>> [f"{u:.1f}" for u in updates]
      ['16.0', '-16.0']

    References:
      Adly, `EXAdam: The Power of Adaptive Cross-Moments <https://arxiv.org/abs/2412.20302>`_,
      2024, Algorithm 1.
    """
    _checks.check_decay(b1=b1, b2=b2)
    _checks.check_positive(eps=eps)
    _checks.check_flag(dynamic_step_size=dynamic_step_size)
    mu_dtype = _checks.canonical_mu_dtype(mu_dtype)

    def init_fn(params: optax.Params) -> ScaleByExadamState:
        return ScaleByExadamState(
            count=jnp.zeros((), jnp.int32),
            mu=_tree.zeros_like(params, mu_dtype),
            nu=_tree.zeros_like(params, at_least_float32=True),
        )

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleByExadamState]:
        state = _tree.check_state(state, ScaleByExadamState)
        count = _hyperparams.increment(state.count)

        def rule(
            g: jax.Array, m: jax.Array, v: jax.Array, corrections: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, ...]:
            c1, c2 = corrections
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * jnp.square(g)
            d1 = 1 + (1 - c2) * (v / (v + eps))
            d2 = 1 + (1 - c1) * (jnp.square(m) / (jnp.square(m) + eps))
            u = ((m + g) / c1 * d1) / (_hyperparams.sqrt(v / c2 * d2) + eps)
            if dynamic_step_size:
                u = 0.5 * jnp.log(2 * (count.astype(g.dtype) + 1)) * u
            return u, m, v

        updates, mu, nu = _tree.map_leaves(
            rule,
            updates,
            state.mu,
            state.nu,
            shared=_hyperparams.bias_corrections(b1, b2, count),
            like=params,
        )
        return updates, ScaleByExadamState(count, mu, nu)

    return optax.GradientTransformation(init_fn, update_fn)


def exadam(
    learning_rate: optax.ScalarOrSchedule,
    b1: _hyperparams.Scalar = 0.9,
    b2: _hyperparams.Scalar = 0.999,
    eps: _hyperparams.Scalar = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: _tree.Mask = None,
    *,
    dynamic_step_size: bool = True,
    mu_dtype: Any = None,
) -> optax.GradientTransformation:
    """EXAdam with decoupled weight decay.

    Args:
      learning_rate: step size or schedule.
      b1: decay rate of the first moment, in [0, 1).
      b2: decay rate of the second moment, in [0, 1).
      eps: added in both cross terms and to the root; positive, since zero would give 0 / 0.
      weight_decay: decoupled decay, a number or a schedule, multiplied by the learning rate but not
        by the dynamic step.
      mask: tree of booleans, or a function of the parameters that returns one: what decays.
      dynamic_step_size: the growing step of the paper's first version; its second drops it.
      mu_dtype: dtype of the first moment; by default the parameter's.

    Returns:
      A `GradientTransformation`; its update needs `params` if `weight_decay` is not 0, and
      ignores extra arguments. Updates are computed in float32 at least and rounded once, to the
      wider of the gradient's and the parameter's dtype; where weights of 16 bits are rounded
      stochastically, float32 gradients keep what that needs.

    Raises:
      ValueError: a rate outside [0, 1), `eps` not positive, `mu_dtype` not floating, or gradients
        that do not match; also a negative `learning_rate` or `weight_decay`.
      TypeError: parameters or gradients that are not real floating point, and what is no number, no
        schedule or no flag where one is expected; the message has the argument's name.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> tx = exadam(1e-3)
      >>> params = {"w": jnp.ones(3)}
      >>> updates, _ = tx.update({"w": jnp.full(3, 0.3)}, tx.init(params), params)
      >>> [f"{w:.3f}" for w in optax.apply_updates(params, updates)["w"]]
      ['0.989', '0.989', '0.989']

    See Also:
      `scale_by_exadam` for the bare rule and the source.
    """
    rule = scale_by_exadam(b1, b2, eps, dynamic_step_size=dynamic_step_size, mu_dtype=mu_dtype)
    return _hyperparams.ready_made(rule, learning_rate, weight_decay, mask, method="exadam")
