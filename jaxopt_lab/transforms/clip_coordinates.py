r"""Coordinate-wise clipping at a quantile of the whole gradient.

    tau = scale * (value at index floor(fraction * N) of the N magnitudes, largest first)
    g <- sign(g) min(|g|, tau)

Pan and Li, "Toward Understanding Why Adam Converges Faster Than SGD for Transformers", 2023,
arXiv:2306.00204, section 4.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab import _checks, _hyperparams, _order, _tree

# What the contract of `jaxopt_lab.testing` asks and this rule, which sees no weights, does not
# promise.
CONTRACT_EXCEPTIONS = dict.fromkeys(
    ("bfloat16_gradients_float32_weights", "float16_gradients_float32_weights"),
    "a gradient is clipped in its own dtype",
)


def clip_coordinates(
    fraction: _hyperparams.Scalar, scale: _hyperparams.Scalar = 1.0
) -> optax.GradientTransformation:
    r"""Clips the given fraction of coordinates, the largest of all leaves together.

    .. math::
      \tau = c\, |g|_{(\lfloor k N \rfloor)}, \quad
      g_i \leftarrow \mathrm{sign}(g_i) \min(|g_i|, \tau)

    with the magnitudes :math:`|g|_{(0)} \ge |g|_{(1)} \ge \dots` of all :math:`N` coordinates. The
    order statistic is exact; it is found by bisecting the bit patterns of the magnitudes (31 counts
    of the gradient in float32), which needs no sort, no copy and, for sharded gradients, only sums.
    Chained before `scale_by_adam`, the clipped gradient enters both moments. Derivatives take the
    threshold for a constant.

    Inside a `shard_map` over an axis that splits a weight only the shards' coordinates are counted:
    call it outside, under `jit` with sharded arrays, where all are.

    Args:
      fraction: :math:`k`, in [0, 1]; 0 clips nothing, 1 clips everything to zero.
      scale: :math:`c`, non-negative.

    Returns:
      A stateless `GradientTransformation`; its update needs no `params`.

    Raises:
      ValueError: `fraction` outside [0, 1], `scale` negative, or 2**32 and more coordinates.
      TypeError: gradients that are not real floating point.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> tx = clip_coordinates(0.25)
      >>> grads = {"a": jnp.array([3.0, -1.0]), "b": jnp.array([10.0, 0.5])}
      >>> clipped, _ = tx.update(grads, tx.init(grads))
      >>> [float(g) for g in clipped["b"]]
      [3.0, 0.5]

    References:
      Pan and Li, `Toward Understanding Why Adam Converges Faster Than SGD for Transformers
      <https://arxiv.org/abs/2306.00204>`_, 2023, section 4.
    """
    _checks.check_fraction(fraction=fraction)
    _checks.check_non_negative(scale=scale)

    def init_fn(params: optax.Params) -> optax.EmptyState:
        _tree.check_params(params)
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del params
        state = _tree.check_state(state, optax.EmptyState)
        if _checks.is_number(fraction) and fraction == 0:
            return updates, state
        _, *found = _tree.map_leaves(lambda g: (g, jnp.abs(g)), updates)
        magnitudes = jax.tree.leaves(found)
        if not magnitudes:
            return updates, state
        tau = jax.lax.stop_gradient(_magnitude_at(magnitudes, fraction)) * scale

        def clip(g: jax.Array, tau: jax.Array) -> tuple[jax.Array]:
            return (jnp.clip(g, -tau, tau),)

        (updates,) = _tree.map_leaves(clip, updates, shared=tau.astype)
        return updates, state

    return optax.GradientTransformation(init_fn, update_fn)


def _magnitude_at(magnitudes: list[jax.Array], fraction: _hyperparams.Scalar) -> jax.Array:
    """Returns the magnitude at index floor(fraction * N), largest first; 0 past the end."""
    total = sum(x.size for x in magnitudes)
    if total >= 2**32:
        raise ValueError(f"clip_coordinates counts below 2**32 coordinates, got {total}")
    if _checks.is_number(fraction):
        index = jnp.asarray(math.floor(total * fraction), jnp.uint32)
    else:
        index = jnp.floor(total * fraction).astype(jnp.uint32)
    pattern = _order.pattern_at(_order.bit_patterns(magnitudes), index)
    return jax.lax.bitcast_convert_type(pattern, jnp.result_type(*magnitudes))
