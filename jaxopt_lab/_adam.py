"""Adam as the references of several methods run it, with this library's guards on trees and dtypes.

m_t = b1 m_{t-1} + (1 - b1) g_t,    v_t = b2 v_{t-1} + (1 - b2) g_t^2
update = (m_t / c1) / (sqrt(v_t / c2) + eps),  or  (sqrt(c2) / c1) m_t / (sqrt(v_t) + eps)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab import _checks, _hyperparams, _tree


class AdamState(NamedTuple):
    """State of the Adam that other methods contain: 8 bytes a parameter in float32.

    Attributes:
      count: steps taken; int32, shape ().
      mu: first moment; shapes of the parameters, dtype `mu_dtype` or theirs.
      nu: second moment; at least float32.
    """

    count: jax.Array
    mu: optax.Updates
    nu: optax.Updates


def scale_by_adam(
    b1: _hyperparams.Scalar,
    b2: _hyperparams.Scalar,
    eps: _hyperparams.Scalar,
    eps_in_root: bool = True,
    mu_dtype: Any = None,
    *,
    prefix: str = "",
) -> optax.GradientTransformation:
    """Adam; `eps_in_root` adds `eps` to the bias-corrected root, `prefix` is that of the names."""
    _checks.check_decay(**{f"{prefix}b1": b1, f"{prefix}b2": b2})
    _checks.check_positive(**{f"{prefix}eps": eps})
    _checks.check_flag(**{f"{prefix}eps_in_root": eps_in_root})
    mu_dtype = _checks.canonical_mu_dtype(mu_dtype)

    def init_fn(params: optax.Params) -> AdamState:
        return AdamState(
            count=jnp.zeros((), jnp.int32),
            mu=_tree.zeros_like(params, mu_dtype),
            nu=_tree.zeros_like(params, at_least_float32=True),
        )

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, AdamState]:
        state = _tree.check_state(state, AdamState)
        count = _hyperparams.increment(state.count)

        def rule(
            g: jax.Array, m: jax.Array, v: jax.Array, corrections: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, ...]:
            c1, c2 = corrections
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * jnp.square(g)
            root = jnp.sqrt(c2)
            if eps_in_root:
                return (m / c1) / (_hyperparams.sqrt(v) / root + eps), m, v
            return (m / c1) * root / (_hyperparams.sqrt(v) + eps), m, v

        updates, mu, nu = _tree.map_leaves(
            rule,
            updates,
            state.mu,
            state.nu,
            shared=_hyperparams.bias_corrections(b1, b2, count),
            like=params,
        )
        return updates, AdamState(count, mu, nu)

    return optax.GradientTransformation(init_fn, update_fn)
