r"""AdaBelief: divide by the belief in the gradient, its deviation from the momentum.

    m_t = b1 m_{t-1} + (1 - b1) g_t
    s_t = b2 s_{t-1} + (1 - b2) (g_t - m_t)^2 + eps
    update = (m_t / (1 - b1^t)) / (sqrt(s_t / (1 - b2^t)) + eps)

Zhuang et al., "AdaBelief Optimizer", NeurIPS 2020, arXiv:2010.07468, Algorithm 2; options as in the
authors' package adabelief-pytorch 0.2.1, whose `rectify` is True by default.
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


class ScaleByAdaBeliefState(NamedTuple):
    """State of `scale_by_adabelief`: 8 bytes a parameter in float32, 12 with `amsgrad`.

    Attributes:
      count: steps taken; int32, shape ().
      mu: m; shapes of the parameters, dtype `mu_dtype` or the parameter's.
      nu: s, with eps accumulated in it; at least float32.
      nu_max: running maximum of s; None without `amsgrad`.
    """

    count: jax.Array
    mu: optax.Updates
    nu: optax.Updates
    nu_max: Any


def scale_by_adabelief(
    b1: _hyperparams.Scalar = 0.9,
    b2: _hyperparams.Scalar = 0.999,
    eps: _hyperparams.Scalar = 1e-16,
    *,
    amsgrad: bool = False,
    rectify: bool = False,
    degenerated_to_sgd: bool = True,
    mu_dtype: Any = None,
) -> optax.GradientTransformation:
    r"""Rescales the gradient by AdaBelief.

    .. math::
      m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
      s_t &= \beta_2 s_{t-1} + (1 - \beta_2) (g_t - m_t)^2 + \epsilon \\
      u_t &= \frac{m_t / (1 - \beta_1^t)}{\sqrt{\hat s_t / (1 - \beta_2^t)} + \epsilon}

    where :math:`\hat s_t` is :math:`s_t`, or with `amsgrad` its running maximum. With `rectify`,

    .. math::
      \rho_t = \rho_\infty - \frac{2 t \beta_2^t}{1 - \beta_2^t}, \quad
      \rho_\infty = \frac{2}{1 - \beta_2} - 1, \quad
      u_t = \sqrt{\frac{(\rho_t - 4)(\rho_t - 2) \rho_\infty}{(\rho_\infty - 4)(\rho_\infty - 2)
      \rho_t}} \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \frac{m_t}{\sqrt{s_t} + \epsilon}

    once :math:`\rho_t \ge 5` (from step 6 on for the usual `b2`); before that
    :math:`m_t / (1 - \beta_1^t)` or, without `degenerated_to_sgd`, zero.

    Args:
      b1: decay rate of the momentum, in [0, 1).
      b2: decay rate of the belief, in [0, 1).
      eps: added to the belief at every step, where it accumulates, and to its root. The authors
        advise 1e-16 for transformers and GANs, 1e-8 where SGD beats Adam.
      amsgrad: divide by the running maximum of the belief (not used by the rectified step).
      rectify: RAdam's rectification. The paper's results were made without it; the authors'
        package turns it on by default, which `rectify=True` reproduces.
      degenerated_to_sgd: with `rectify`, step along the momentum until the variance is tractable.
      mu_dtype: dtype of the momentum; by default the parameter's.

    Returns:
      A `GradientTransformation`; its update needs no `params`.

    Raises:
      ValueError: a rate outside [0, 1), `eps` not positive, `mu_dtype` not floating, or gradients
        that do not match.
      TypeError: parameters or gradients that are not real floating point.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> tx = scale_by_adabelief()
      >>> params = jnp.array([1.0, 2.0])
      >>> updates, _ = tx.update(jnp.array([0.5, -0.001]), tx.init(params))
      >>> [f"{u:.3f}" for u in updates]
      ['1.111', '-1.111']

    References:
      Zhuang et al., `AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed Gradients
      <https://arxiv.org/abs/2010.07468>`_, NeurIPS 2020, Algorithm 2.
    """
    _checks.check_decay(b1=b1, b2=b2)
    _checks.check_positive(eps=eps)
    _checks.check_flag(amsgrad=amsgrad, rectify=rectify, degenerated_to_sgd=degenerated_to_sgd)
    mu_dtype = _checks.canonical_mu_dtype(mu_dtype)

    def init_fn(params: optax.Params) -> ScaleByAdaBeliefState:
        return ScaleByAdaBeliefState(
            count=jnp.zeros((), jnp.int32),
            mu=_tree.zeros_like(params, mu_dtype),
            nu=_tree.zeros_like(params, at_least_float32=True),
            nu_max=_tree.zeros_like(params, at_least_float32=True) if amsgrad else None,
        )

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleByAdaBeliefState]:
        state = _tree.check_state(state, ScaleByAdaBeliefState)
        count = _hyperparams.increment(state.count)

        def rule(g: jax.Array, m: jax.Array, s: jax.Array, *rest: Any) -> tuple[jax.Array, ...]:
            *s_max, (c1, c2) = rest
            m = b1 * m + (1 - b1) * g
            # The brackets let XLA update s in place: without them it recomputes s from its old
            # value inside the parameters' kernel and has to copy the old value first.
            s = b2 * s + ((1 - b2) * jnp.square(g - m) + eps)
            s_max = tuple(jnp.maximum(old, s) for old in s_max)
            if not rectify:
                s_hat = s_max[0] if s_max else s
                return ((m / c1) / (_hyperparams.sqrt(s_hat / c2) + eps), m, s, *s_max)
            tractable, factor = _rectification(b2, count, g.dtype)
            rectified = (factor * jnp.sqrt(c2)) * (m / c1) / (_hyperparams.sqrt(s) + eps)
            fallback = m / c1 if degenerated_to_sgd else jnp.zeros_like(m)
            return (jnp.where(tractable, rectified, fallback), m, s, *s_max)

        moments = [state.mu, state.nu] + ([state.nu_max] if amsgrad else [])
        updates, mu, nu, *nu_max = _tree.map_leaves(
            rule,
            updates,
            *moments,
            shared=_hyperparams.bias_corrections(b1, b2, count),
            like=params,
        )
        return updates, ScaleByAdaBeliefState(count, mu, nu, nu_max[0] if nu_max else None)

    return optax.GradientTransformation(init_fn, update_fn)


def adabelief(
    learning_rate: optax.ScalarOrSchedule,
    b1: _hyperparams.Scalar = 0.9,
    b2: _hyperparams.Scalar = 0.999,
    eps: _hyperparams.Scalar = 1e-16,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: _tree.Mask = None,
    *,
    weight_decouple: bool = True,
    fixed_decay: bool = False,
    amsgrad: bool = False,
    rectify: bool = False,
    degenerated_to_sgd: bool = True,
    mu_dtype: Any = None,
) -> optax.GradientTransformation:
    """AdaBelief with the weight decays of the authors' package.

    Args:
      learning_rate: step size or schedule.
      b1: decay rate of the momentum, in [0, 1).
      b2: decay rate of the belief, in [0, 1).
      eps: added to the belief at every step, where it accumulates, and to its root. The authors
        advise 1e-16 for transformers and GANs, 1e-8 where SGD beats Adam.
      weight_decay: decay rate or schedule.
      mask: tree of booleans, or a function of the parameters that returns one: what decays.
      weight_decouple: multiply the parameters by `1 - learning_rate * weight_decay`; if False, add
        `weight_decay * parameter` to the gradient before the moments (the paper's CIFAR setting).
      fixed_decay: multiply the parameters by `1 - weight_decay`, whatever the learning rate.
      amsgrad: divide by the running maximum of the belief (not used by the rectified step).
      rectify: RAdam's rectification. The paper's results were made without it; the authors'
        package turns it on by default, which `rectify=True` reproduces.
      degenerated_to_sgd: with `rectify`, step along the momentum until the variance is tractable.
      mu_dtype: dtype of the momentum; by default the parameter's.

    Returns:
      A `GradientTransformation`; its update needs `params` if `weight_decay` is not 0, and
      ignores extra arguments. Updates are computed in float32 at least and rounded once, to the
      wider of the gradient's and the parameter's dtype; where weights of 16 bits are rounded
      stochastically, float32 gradients keep what that needs.

    Raises:
      ValueError: a rate outside [0, 1), `eps` not positive, `mu_dtype` not floating, or gradients
        that do not match; also a negative `learning_rate` or `weight_decay`, or `fixed_decay` with
        a decay that is not decoupled.
      TypeError: parameters or gradients that are not real floating point, and what is no number, no
        schedule or no flag where one is expected; the message has the argument's name.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> tx = adabelief(0.1)
      >>> params = {"w": jnp.ones(3)}
      >>> updates, _ = tx.update({"w": jnp.full(3, 0.3)}, tx.init(params), params)
      >>> [f"{w:.3f}" for w in optax.apply_updates(params, updates)["w"]]
      ['0.889', '0.889', '0.889']

    See Also:
      `scale_by_adabelief` for the bare rule and the source.
    """
    _checks.check_flag(weight_decouple=weight_decouple, fixed_decay=fixed_decay)
    if fixed_decay and not weight_decouple:
        raise ValueError("fixed_decay=True needs weight_decouple=True")
    rule = scale_by_adabelief(
        b1,
        b2,
        eps,
        amsgrad=amsgrad,
        rectify=rectify,
        degenerated_to_sgd=degenerated_to_sgd,
        mu_dtype=mu_dtype,
    )
    return _hyperparams.ready_made(
        rule,
        learning_rate,
        weight_decay,
        mask,
        method="adabelief",
        decays="weights" if fixed_decay else "direction" if weight_decouple else "gradient",
    )


def _rectification(
    b2: _hyperparams.Scalar, count: jax.Array, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Returns whether rho_t >= 5, and the rectification factor where it is.

    With x = -log(b2) and the function k(z) = 1 - coth(z) + 1/z the definition becomes
    rho_t = t k(t x / 2) + 1 - k(x / 2), which in float32 keeps the digits that the difference of
    two numbers near 2 / (1 - b2) loses.
    """
    t = count.astype(dtype)
    half_x = -_hyperparams.log_power(b2, jnp.ones((), jnp.int32), dtype) / 2

    def k(z: jax.Array) -> jax.Array:
        # Each form is computed where it is not taken, too, and stays finite there.
        small, large = jnp.minimum(z, 0.25), jnp.maximum(z, 0.25)
        square = small * small
        series = square * (1 / 4725 - square * (2 / 93555))
        series = small * (1 / 3 - square * (1 / 45 - square * (2 / 945 - series)))
        by_exponential = 1 / large - 2 / jnp.expm1(jnp.minimum(2 * large, 80))
        return jnp.where(z < 0.25, 1 - series, by_exponential)

    rho = t * k(t * half_x) + 1 - k(half_x)
    safe, rho_inf = jnp.maximum(rho, 5), jnp.maximum((1 + b2) / (1 - b2), 5)
    ratio = (safe - 4) * (safe - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * safe)
    return rho >= 5, jnp.sqrt(ratio).astype(dtype)
