r"""Hypergradient descent: the learning rate follows its own gradient.

    h_t   = <g_t, d_{t-1}>,  d the direction of the inner rule
    eta_t = eta_{t-1} + kappa h_t                                  additive
          = eta_{t-1} exp(kappa h_t / (|g_t| |d_{t-1}|))           multiplicative
          = eta_{t-1} + eta_0 kappa <d_t, d_{t-1}>, clipped        fedhyper

Baydin et al., "Online Learning Rate Adaptation with Hypergradient Descent", 2017, arXiv:1703.04782;
Wang et al., "FedHyper", 2023, arXiv:2310.03156.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab import _checks, _hyperparams, _tree
from jaxopt_lab.schedules import _phases

# What the contract of `jaxopt_lab.testing` asks and this rule does not promise.
CONTRACT_EXCEPTIONS = {
    "learning_rate_schedule": "the rate is kept in the state",
    "nnx_current_learning_rate": "the rate is kept in the state",
}

Rule = Literal["additive", "multiplicative", "fedhyper"]
RULES: tuple[Rule, ...] = get_args(Rule)
# The authors' clip of the sum of products: [-0.8, 4], added to 1.
_FEDHYPER_BOUNDS = (0.2, 5.0)


class HypergradientState(NamedTuple):
    """State of `hypergradient`: a direction (4 bytes a parameter in float32) and the inner one.

    Attributes:
      learning_rate: eta_{t-1}, of the last update; shape (), float32 or wider.
      previous: d_{t-1}, shapes and dtypes of the parameters; 0 before any update.
      inner: state of the inner transformation.
    """

    learning_rate: jax.Array
    previous: optax.Updates
    inner: optax.OptState


def hypergradient(
    inner: optax.GradientTransformation,
    learning_rate: _phases.Scalar,
    meta_rate: _phases.Scalar,
    rule: Rule = "additive",
    bounds: tuple[float, float] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales an inner rule by a learning rate that each gradient corrects before it is used.

    .. math::
      h_t = \langle g_t, d_{t-1} \rangle, \quad
      \eta_t = \eta_{t-1} + \kappa h_t, \quad
      \theta_t = \theta_{t-1} - \eta_t d_t

    with the direction :math:`d_t` of the inner rule and one sum :math:`h_t` over all leaves.
    :math:`-h_t` is the derivative of the loss at :math:`\theta_{t-1}` by the rate of the step that
    led there. The other rules:

    .. math::
      \eta_t &= \eta_{t-1} \exp\frac{\kappa h_t}{\|g_t\| \|d_{t-1}\|} && \text{(multiplicative)} \\
      \eta_t &= \eta_{t-1} + \eta_0 \kappa \langle d_t, d_{t-1} \rangle && \text{(fedhyper)}

    The multiplicative rule does not depend on the size of the gradient. FedHyper's rule for the
    global rate, here for one learner, adds the products of successive updates to a factor of
    :math:`\eta_0`, which it clips; the authors have :math:`\kappa = 1`.

    The first update has the given rate. A product that is not finite leaves the rate alone. To
    combine it with a schedule, chain `optax.scale_by_schedule` with factors after it.

    Args:
      inner: the bare rule, without learning rate and sign: `optax.identity()` for SGD,
        `optax.trace(0.9)` for momentum, `optax.scale_by_adam()`.
      learning_rate: :math:`\eta_0`, a number or an array of shape `()`; a schedule is refused.
      meta_rate: :math:`\kappa`, a non-negative number or an array of shape `()`. With 0 every
        update is that of the inner rule. The additive rule's is in rate per squared gradient and
        needs a value for the problem (the authors start at 1e-6); the multiplicative rule's has no
        unit, 0.02 is a beginning.
      rule: `"additive"`, `"multiplicative"` or `"fedhyper"`.
      bounds: lowest and highest rate as factors of `learning_rate`; 1 lies between them. None for
        no bounds, and for FedHyper's own, (0.2, 5.0); with momentum its authors take (0.8, 5.0).
        Without a bound the additive rule can make a rate negative.

    Returns:
      A `GradientTransformationExtraArgs` with a `HypergradientState`; its update needs `params` if
      the inner one's does. `state.learning_rate` is the rate of the last update.

    Raises:
      ValueError: a rate that is negative, not finite or an array with axes, an unknown `rule`, or
        `bounds` that do not have 0 <= low <= 1 <= high.
      TypeError: `inner` that is no transformation, `learning_rate` that is a schedule, rates or
        bounds that are no real numbers, parameters that are not real floating point.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> tx = hypergradient(optax.identity(), learning_rate=0.1, meta_rate=0.01)
      >>> params = jnp.array(4.0)
      >>> state = tx.init(params)
      >>> for _ in range(3):  # 0.5 params**2: too short a step, the gradients agree
      ...     updates, state = tx.update(params, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"{state.learning_rate:.3f}")
      0.100
      0.244
      0.342

    References:
      Baydin et al., `Online Learning Rate Adaptation with Hypergradient Descent
      <https://arxiv.org/abs/1703.04782>`_, 2017. Wang et al., `FedHyper
      <https://arxiv.org/abs/2310.03156>`_, 2023.
    """
    if callable(learning_rate):
        raise TypeError(
            "learning_rate must be a number: the rate is kept in the state; chain "
            "optax.scale_by_schedule after hypergradient to combine it with a schedule"
        )
    _checks.check_transformation(inner=inner)
    _phases.check_rate(learning_rate=learning_rate, meta_rate=meta_rate)
    _checks.check_choice(RULES, rule=rule)
    if bounds is None and rule == "fedhyper":
        bounds = _FEDHYPER_BOUNDS
    if bounds is not None:
        _check_bounds(bounds)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> HypergradientState:
        previous = _tree.zeros_like(params)
        dtype = _tree.compute_dtype(*(leaf.dtype for leaf in jax.tree.leaves(previous)))
        return HypergradientState(jnp.asarray(learning_rate, dtype), previous, inner.init(params))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, HypergradientState]:
        state = _tree.check_state(state, HypergradientState)
        _tree.check_updates(updates, state.previous)
        direction, inner_state = inner.update(updates, state.inner, params, **extra_args)
        eta, dtype = state.learning_rate, state.learning_rate.dtype
        kappa, base = jnp.asarray(meta_rate, dtype), jnp.asarray(learning_rate, dtype)
        if rule == "additive":
            new = eta + kappa * _dot(updates, state.previous, dtype)
        elif rule == "multiplicative":
            new = eta * jnp.exp(kappa * _cosine(updates, state.previous, dtype))
        else:
            new = eta + base * kappa * _dot(direction, state.previous, dtype)
        eta = jnp.where(jnp.isfinite(new), new, eta)
        if bounds is not None:
            low, high = (jnp.asarray(bound, dtype) for bound in bounds)
            eta = jnp.clip(eta, low * base, high * base)

        def scale(d: jax.Array, previous: jax.Array) -> tuple[jax.Array, jax.Array]:
            del previous
            return -eta.astype(d.dtype) * d, d

        updates, previous = _tree.map_leaves(scale, direction, state.previous)
        return updates, HypergradientState(eta, previous, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_bounds(bounds: Any) -> None:
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise ValueError(f"bounds must be (low, high), two numbers, got {bounds!r}")
    _checks.check_scalar(**{"bounds[0]": bounds[0], "bounds[1]": bounds[1]})
    if all(map(_checks.is_number, bounds)) and not 0 <= bounds[0] <= 1 <= bounds[1]:
        raise ValueError(f"bounds must be (low, high) with 0 <= low <= 1 <= high, got {bounds}")


def _dot(a: optax.Updates, b: optax.Updates, dtype: Any) -> jax.Array:
    """Returns the inner product over all leaves together."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b))
    products = (
        jnp.sum(jnp.asarray(x).astype(dtype) * jnp.asarray(y).astype(dtype)) for x, y in pairs
    )
    return sum(products, start=jnp.zeros((), dtype))


def _cosine(a: optax.Updates, b: optax.Updates, dtype: Any) -> jax.Array:
    """Returns the cosine of the angle between two trees, 0 if one of them is zero."""
    lengths = _hyperparams.sqrt(_dot(a, a, dtype)) * _hyperparams.sqrt(_dot(b, b, dtype))
    return jnp.where(lengths > 0, _dot(a, b, dtype) / jnp.where(lengths > 0, lengths, 1), 0)
