r"""Cautious: leave alone what would move against the gradient.

    phi = 1 where u g > 0, else 0
    u <- u phi / max(mean(phi), 1e-3)

for each leaf, with the gradient g and the direction u that a rule made of it.

Liang et al., "Cautious Optimizers: Improving Training with One Line of Code", 2024,
arXiv:2411.16085, Algorithm 1; the mean bounded from below as in timm's `caution`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab import _checks, _treatments, _tree

# The least share of agreeing coordinates that the rest is scaled up by.
_LEAST_MEAN = 1e-3


def cautious(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    r"""Masks the direction of `inner` where its sign is not the gradient's.

    .. math::
      \phi = [u \odot g > 0], \quad
      u \leftarrow \frac{\phi \odot u}{\max(\mathrm{mean}(\phi), 10^{-3})}

    for each leaf, with the gradient :math:`g` that comes in and the direction :math:`u` that
    `inner` makes of it. Momentum and other state go on as without the mask. The mean keeps the
    size of a leaf's step on average; NaN and infinities stay what they are.

    The mask belongs between a bare rule and everything that is no direction: weight decay, which
    is not masked, and the learning rate, whose sign would turn agreement into disagreement::

      optax.chain(
          jaxopt_lab.cautious(jaxopt_lab.scale_by_lion()),
          optax.add_decayed_weights(0.1),
          optax.scale_by_learning_rate(1e-4),
      )

    Args:
      inner: a bare rule (`scale_by_...`), whose updates point along the gradient and not down it;
        of a ready-made optimizer, which descends, the mask would leave next to nothing.

    Returns:
      A `GradientTransformationExtraArgs` with the state of `inner`; its update needs `params` if
      that of `inner` does. Updates have the dtype that `inner` gives them.

    Raises:
      TypeError: `inner` is no transformation, such as a factory that was not called, or gradients
        that are not real floating point.
      ValueError: at init, an `inner` whose updates go down, as those of `optax.adam(1e-3)`, where
        one parameter shows it; and what `inner` raises.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> tx = cautious(optax.trace(0.9))
      >>> params = jnp.zeros(2)
      >>> _, state = tx.update(jnp.array([1.0, 1.0]), tx.init(params))
      >>> updates, _ = tx.update(jnp.array([-0.5, 1.0]), state)  # the momentum is (0.4, 1.9)
      >>> [f"{u:.1f}" for u in updates]
      ['0.0', '3.8']

    References:
      Liang et al., `Cautious Optimizers: Improving Training with One Line of Code
      <https://arxiv.org/abs/2411.16085>`_, 2024, Algorithm 1.
    """
    _checks.check_transformation(inner=inner)
    inner = optax.with_extra_args_support(inner)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        def rule(u: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
            if u.size == 0:
                return u, g
            # The product of two small numbers may be zero; that of their signs is not.
            agrees = (jnp.sign(u) * jnp.sign(g) > 0).astype(u.dtype)
            return u * (agrees / jnp.maximum(jnp.mean(agrees), _LEAST_MEAN)), g

        direction, state = inner.update(updates, state, params, **extra_args)
        masked, _ = _tree.map_leaves(rule, direction, updates)
        return masked, state

    def init_fn(params: optax.Params) -> optax.OptState:
        with _treatments.silent():
            _check_direction(inner)
        return inner.init(params)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_direction(inner: optax.GradientTransformationExtraArgs) -> None:
    """Refuses an optimizer, whose updates go down: the mask would keep what goes up.

    One parameter is tried. A rule that cannot have it, such as one of matrices or of one tree
    alone, is not looked at.
    """
    with jax.ensure_compile_time_eval():
        param = jnp.zeros(())
        try:
            up, down = (
                jnp.asarray(inner.update(jnp.asarray(g), inner.init(param), param)[0])
                for g in (1.0, -1.0)
            )
            goes_down = bool((up < 0) & (down > 0))
        except Exception:
            return
    if goes_down:
        raise ValueError(
            "cautious masks a direction along the gradient, but the updates of inner go against it,"
            " as those of a whole optimizer do: give it the bare rule, such as scale_by_lion() in "
            "place of lion(...), and put optax.scale_by_learning_rate(...) behind it"
        )
