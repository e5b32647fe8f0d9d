r"""A running log: the learning rate and two norms of the last update, kept in the state.

g_t -> inner -> u_t:    eta_t,  |g_t|_2,  |u_t|_2
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab import _checks, _compat, _hyperparams, _tree

_NOT_KNOWN = -1.0  # NaN would be taken for a fault of the program


class LoggedNorms(NamedTuple):
    """What `log_norms` keeps: float32, or float64 with such parameters; -1: not known.

    Attributes:
      learning_rate: eta_t, shape ().
      gradient_norm: 2-norm of g_t over all leaves, shape ().
      update_norm: 2-norm of u_t over all leaves, shape ().
    """

    learning_rate: jax.Array
    gradient_norm: jax.Array
    update_norm: jax.Array


class LogNormsState(NamedTuple):
    """State of `log_norms`: 16 bytes, and the inner one.

    Attributes:
      step: updates so far; int32, shape ().
      logged: what `logged_norms` returns of the last update.
      inner: state of the inner transformation.
    """

    step: jax.Array
    logged: LoggedNorms
    inner: optax.OptState


def log_norms(
    inner: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs `inner` and keeps the last learning rate, gradient norm and update norm in the state.

    .. math::
      \eta_t, \qquad \|g_t\|_2 = \sqrt{\textstyle\sum_i g_{t,i}^2}, \qquad \|u_t\|_2

    with the gradient :math:`g_t` that comes in and the update :math:`u_t` that `inner` makes of it,
    over all leaves together. Nothing else changes. What it is put around decides what it sees:
    around the whole optimizer gradients as they come and updates as they are applied; inside
    `optax.chain`, behind a clip, the clipped ones::

      optax.chain(optax.clip_by_global_norm(1.0), log_norms(optax.adamw(schedule), schedule))

    `logged_norms` reads it from the state, however deep it lies. Inside `shard_map` the norms are
    those of the part at hand, each device's own.

    Args:
      inner: any optax transformation.
      learning_rate: what `inner` was made with, a number or a schedule, which is called with the
        number of updates so far. None for the one field `learning_rate` in the state of `inner`
        (`optax.inject_hyperparams`, `hypergradient`), or -1 where there is none.

    Returns:
      A `GradientTransformationExtraArgs` with a `LogNormsState`; extra arguments are handed on, and
      its update needs `params` if that of `inner` does.

    Raises:
      TypeError: `inner` that is no transformation, a rate that is no number and no schedule, or
        gradients that are not real floating point.
      ValueError: at init, a state of `inner` with several fields `learning_rate` and none given.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> schedule = optax.linear_schedule(1.0, 0.0, 10)
      >>> tx = optax.chain(log_norms(optax.sgd(schedule), schedule), optax.scale(1.0))
      >>> state = tx.init(jnp.zeros(2))
      >>> for _ in range(2):
      ...     _, state = tx.update(jnp.array([3.0, 4.0]), state)
      >>> rate, gradient, update = map(float, logged_norms(state))
      >>> print(f"{rate:.1f} {gradient:.1f} {update:.1f}")
      0.9 5.0 4.5
    """
    _checks.check_transformation(inner=inner)
    if learning_rate is not None:
        _checks.check_scalar_or_schedule(learning_rate=learning_rate)
    inner = optax.with_extra_args_support(inner)

    def rate_at(step: jax.Array, inner_state: optax.OptState) -> Any:
        if learning_rate is not None:
            return _hyperparams.value_at("learning_rate", learning_rate, step)
        named = optax.tree.get_all_with_path(inner_state, "learning_rate")
        found = [value for _, value in named if isinstance(value, jax.Array)]
        if len(found) > 1:
            raise ValueError(
                f"the state of inner has {len(found)} fields learning_rate: give log_norms the one "
                "that is meant, a number or a schedule"
            )
        return found[0] if found else _NOT_KNOWN

    def init_fn(params: optax.Params) -> LogNormsState:
        _tree.check_params(params)
        leaves = jax.tree.leaves(params)
        inner_state = inner.init(params)
        step = jnp.zeros((), jnp.int32)
        rate_at(step, inner_state)  # refuses several before the first step
        unknown = jnp.full((), _NOT_KNOWN, _tree.compute_dtype(*map(jnp.result_type, leaves)))
        traced = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
        logged = LoggedNorms(*_compat.vary_alike([unknown] * 3, *traced))
        return LogNormsState(step, logged, inner_state)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, LogNormsState]:
        state = _tree.check_state(state, LogNormsState)
        for name, gradient in _tree.leaves_with_names(updates):
            _tree.check_gradient(name, gradient)
        found, inner_state = inner.update(updates, state.inner, params, **extra_args)
        dtype = state.logged.gradient_norm.dtype
        rate = jnp.asarray(rate_at(state.step, inner_state)).astype(dtype)
        measured = [rate, *(_tree.l2_norm(tree, dtype) for tree in (updates, found))]
        measured = map(jax.lax.stop_gradient, _compat.vary_alike(measured, *state.logged))
        step = _hyperparams.increment(state.step)
        return found, LogNormsState(step, LoggedNorms(*measured), inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def logged_norms(opt_state: optax.OptState) -> LoggedNorms:
    """The learning rate, gradient norm and update norm of the last update.

    Args:
      opt_state: the state of an optimizer with one `log_norms` in it, also as
        `flax.nnx.Optimizer` holds it (`optimizer.opt_state`). Traced states are fine, in `jit` and
        `scan`.

    Returns:
      `LoggedNorms(learning_rate, gradient_norm, update_norm)`, arrays of shape (); -1 before the
      first update. For states mapped by `jax.vmap` each has the mapped axis.

    Raises:
      ValueError: no `log_norms` in the state, or several; pass the part of the state that is meant.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> tx = log_norms(optax.sgd(0.1), 0.1)
      >>> _, state = tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))
      >>> print(f"{logged_norms(state).gradient_norm:.1f}")
      5.0
    """
    nodes = jax.tree.leaves(opt_state, is_leaf=_is_log)
    found = [node for node in nodes if _is_log(node)]
    if len(found) != 1:
        raise ValueError(
            f"opt_state has {len(found) or 'no'} state{'s' * (len(found) > 1)} of log_norms"
            + ("; pass the part that is meant" if found else ": is the optimizer made with it?")
        )
    # Each may be in a container, such as a variable of Flax.
    return LoggedNorms(*(jnp.asarray(*jax.tree.leaves(field)) for field in found[0].logged))


def _is_log(node: Any) -> bool:
    return isinstance(node, LogNormsState)
