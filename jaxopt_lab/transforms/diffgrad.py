r"""diffGrad: Adam damped where the gradient has just changed little.

    m_t = b1 m_{t-1} + (1 - b1) g_t,  v_t = b2 v_{t-1} + (1 - b2) g_t^2
    xi_t = sigmoid(|g_{t-1} - g_t|)
    update = sqrt(1 - b2^t) / (1 - b1^t) * xi_t m_t / (sqrt(v_t) + eps)

Dubey et al., "diffGrad", IEEE TNNLS 31(11), 2020, arXiv:1909.11015; the authors' diffGrad_v2.py.
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
}


class ScaleByDiffgradState(NamedTuple):
    """State of `scale_by_diffgrad`: 12 bytes a parameter in float32.

    Attributes:
      count: steps taken; int32, shape ().
      mu: m; shapes of the parameters, dtype `mu_dtype` or the parameter's.
      nu: v; at least float32.
      previous: g_{t-1}, zero before the first step; dtype of the parameter.
    """

    count: jax.Array
    mu: optax.Updates
    nu: optax.Updates
    previous: optax.Updates


def scale_by_diffgrad(
    b1: _hyperparams.Scalar = 0.9,
    b2: _hyperparams.Scalar = 0.999,
    eps: _hyperparams.Scalar = 1e-8,
    *,
    mu_dtype: Any = None,
) -> optax.GradientTransformation:
    r"""Rescales the gradient by diffGrad.

    .. math::
      \xi_t &= \frac{1}{1 + e^{-|g_{t-1} - g_t|}} \\
      u_t &= \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}
      \frac{\xi_t m_t}{\sqrt{v_t} + \epsilon}

    with Adam's moments, of which :math:`\xi_t \in [1/2, 1)` damps only the applied step. The
    friction depends on the gradient's absolute scale: where its changes are far below 1, the rule
    is Adam at half the learning rate. As in the authors' code, `eps` is added before the bias
    correction.

    Args:
      b1: decay rate of the first moment, in [0, 1).
      b2: decay rate of the second moment, in [0, 1).
      eps: added to the root of the second moment; positive.
      mu_dtype: dtype of the first moment; by default the parameter's.

    Returns:
      A `GradientTransformation`; its update needs no `params`.

    Raises:
      ValueError: a rate outside [0, 1), `eps` not positive, `mu_dtype` not floating, or gradients
        that do not match.
      TypeError: parameters or gradients that are not real floating point.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> tx = scale_by_diffgrad()
      >>> params = jnp.array([1.0, 2.0])
      >>> updates, _ = tx.update(jnp.array([0.001, -10.0]), tx.init(params))
      >>> [f"{u:.2f}" for u in updates]
      ['0.50', '-1.00']

    References:
      Dubey et al., `diffGrad: An Optimization Method for Convolutional Neural Networks
      <https://arxiv.org/abs/1909.11015>`_, 2020, Algorithm 1.
    """
    _checks.check_decay(b1=b1, b2=b2)
    _checks.check_positive(eps=eps)
    mu_dtype = _checks.canonical_mu_dtype(mu_dtype)

    def init_fn(params: optax.Params) -> ScaleByDiffgradState:
        return ScaleByDiffgradState(
            count=jnp.zeros((), jnp.int32),
            mu=_tree.zeros_like(params, mu_dtype),
            nu=_tree.zeros_like(params, at_least_float32=True),
            previous=_tree.zeros_like(params),
        )

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleByDiffgradState]:
        state = _tree.check_state(state, ScaleByDiffgradState)
        count = _hyperparams.increment(state.count)

        def rule(
            g: jax.Array,
            m: jax.Array,
            v: jax.Array,
            previous: jax.Array,
            corrections: tuple[jax.Array, jax.Array],
        ) -> tuple[jax.Array, ...]:
            c1, c2 = corrections
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * jnp.square(g)
            xi = 1 / (1 + jnp.exp(-jnp.abs(previous - g)))
            u = (jnp.sqrt(c2) / c1) * (xi * m) / (_hyperparams.sqrt(v) + eps)
            # The new gradient, written as a function of the old one, which XLA then overwrites in
            # place; a plain `g` costs another copy.
            kept = jnp.where(g == previous, previous, g)
            return u, m, v, kept

        updates, *moments = _tree.map_leaves(
            rule,
            updates,
            state.mu,
            state.nu,
            state.previous,
            shared=_hyperparams.bias_corrections(b1, b2, count),
            like=params,
        )
        return updates, ScaleByDiffgradState(count, *moments)

    return optax.GradientTransformation(init_fn, update_fn)


def diffgrad(
    learning_rate: optax.ScalarOrSchedule,
    b1: _hyperparams.Scalar = 0.9,
    b2: _hyperparams.Scalar = 0.999,
    eps: _hyperparams.Scalar = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: _tree.Mask = None,
    *,
    mu_dtype: Any = None,
) -> optax.GradientTransformation:
    """The diffGrad rule with the coupled weight decay of its authors' code.

    The decay is added to the gradient before the moments (L2 regularisation); for a decoupled one
    write `optax.chain(scale_by_diffgrad(), optax.add_decayed_weights(...), ...)`.

    Args:
      learning_rate: step size or schedule.
      b1: decay rate of the first moment, in [0, 1).
      b2: decay rate of the second moment, in [0, 1).
      eps: added to the root of the second moment; positive.
      weight_decay: coupled decay, a number or a schedule, added to the gradient as `weight_decay *
        parameter`.
      mask: tree of booleans, or a function of the parameters that returns one: what decays.
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
      >>> tx = diffgrad(1e-2)
      >>> params = {"w": jnp.ones(3)}
      >>> updates, _ = tx.update({"w": jnp.full(3, 10.0)}, tx.init(params), params)
      >>> [f"{w:.3f}" for w in optax.apply_updates(params, updates)["w"]]
      ['0.990', '0.990', '0.990']

    See Also:
      `scale_by_diffgrad` for the bare rule and the source.
    """
    rule = scale_by_diffgrad(b1, b2, eps, mu_dtype=mu_dtype)
    return _hyperparams.ready_made(
        rule, learning_rate, weight_decay, mask, method="diffgrad", decays="gradient"
    )
