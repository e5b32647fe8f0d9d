r"""Local updates: replicas step on their own, and exchange every so many steps.

    theta_i <- theta_i + inner(g_i)                            each step
    theta_i <- finish(theta_i, begin(state))                   each `sync_every`-th step

Stich, "Local SGD Converges Fast and Communicates Little", ICLR 2019, arXiv:1805.09767.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab import _checks, _compat, _hyperparams, _tree
from jaxopt_lab.distributed import _axes


class Exchange(NamedTuple):
    """What replicas do between two rounds of local steps: three pure functions and an axis.

    `local_updates` calls them within an update, `train_rounds` around the steps of a whole round:
    `begin`, the local steps, `finish`.

    Attributes:
      init: `params -> exchange state`; may be called outside of the axis.
      begin: `exchange state -> message`: what can be sent before the steps end.
      finish: `params, exchange state, message -> params, exchange state`.
      axis_name: the mapped axis of the replicas.
    """

    init: Callable[[Any], Any]
    begin: Callable[[Any], Any]
    finish: Callable[[Any, Any, Any], tuple[Any, Any]]
    axis_name: _axes.AxisName


class LocalUpdatesState(NamedTuple):
    """State of `local_updates`.

    Attributes:
      count: local steps taken; int32, shape (); equal on all replicas.
      inner_state: state of `inner`; each replica's own, never averaged nor reset.
      exchange_state: state of the exchange.
    """

    count: jax.Array
    inner_state: optax.OptState
    exchange_state: Any


def local_updates(
    inner: optax.GradientTransformation, exchange: Exchange, sync_every: int
) -> optax.GradientTransformationExtraArgs:
    """Steps with `inner`, and lets replicas exchange every `sync_every` steps.

    The exchange runs in a `jax.lax.cond`, on the parameters as they are after the step, and the
    update is what leads to its result: `optax.apply_updates` lands there, but for the rounding of
    one sum. Updates are in the widest of float32, the parameter's dtype and the gradient's: a
    16-bit difference would miss the target. Give it each replica's own gradient. Under `vmap` map
    neither the state's counters nor anything computed from them, or each step pays for an
    exchange.

    Args:
      inner: any optax transformation; its schedules count local steps.
      exchange: what happens between rounds, such as `diloco_exchange(axis_name="replica")`.
      sync_every: steps in a round. 1 exchanges at each step, without a cond.

    Returns:
      A `GradientTransformationExtraArgs`; its update needs `params`.

    Raises:
      ValueError: `sync_every` below 1; at update, `params` missing, the axis not bound, gradients
        that do not match or that autodiff has summed over the replicas.
      TypeError: parameters or gradients that are not real floating point, `exchange` no `Exchange`,
        or a state of another transformation.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_lab import distributed
      >>> tx = distributed.local_updates(
      ...     optax.sgd(1.0), distributed.gossip_exchange(axis_name="replica"), sync_every=2)
      >>> def two_steps(gradient):
      ...     params = jnp.zeros(())
      ...     state = tx.init(params)
      ...     for _ in range(2):
      ...         updates, state = tx.update(gradient, state, params)
      ...         params = optax.apply_updates(params, updates)
      ...     return params
      >>> jax.vmap(two_steps, axis_name="replica")(jnp.array([1.0, 3.0]))
      Array([-4., -4.], dtype=float32)

    References:
      Stich, `Local SGD Converges Fast and Communicates Little
      <https://arxiv.org/abs/1805.09767>`_, ICLR 2019.
    """
    _checks.check_positive_integer(sync_every=sync_every)
    if not isinstance(exchange, Exchange):
        raise TypeError(
            f"exchange must be an Exchange, such as diloco_exchange(...), got "
            f"{type(exchange).__name__}"
        )
    _checks.check_transformation(inner=inner)
    inner = optax.with_extra_args_support(inner)
    axis_name = _axes.canonical(exchange.axis_name)

    def init_fn(params: optax.Params) -> LocalUpdatesState:
        _tree.check_params(params)
        return LocalUpdatesState(
            count=jnp.zeros((), jnp.int32),
            inner_state=inner.init(_axes.vary_if_bound(params, axis_name)),
            exchange_state=exchange.init(params),
        )

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, LocalUpdatesState]:
        weights: Any = jax.tree.map(jnp.asarray, _tree.require_params(params, "local_updates"))
        state = _tree.check_state(state, LocalUpdatesState)
        _axes.size(axis_name)
        _tree.check_updates(updates, weights, "params")
        for name, leaf in _tree.leaves_with_names(updates):
            _tree.check_gradient(name, leaf)
        _axes.require_own(updates, axis_name, "local_updates")

        def widest(u: jax.Array, p: jax.Array) -> jax.Array:
            return u.astype(_tree.compute_dtype(u.dtype, p.dtype))

        def exchanged(local: Any, exchange_state: Any) -> tuple[Any, Any]:
            message = exchange.begin(exchange_state)
            stepped = optax.apply_updates(weights, local)
            target, new_state = exchange.finish(stepped, exchange_state, message)
            return jax.tree.map(
                lambda t, p, u: t.astype(u.dtype) - p.astype(u.dtype), target, weights, local
            ), new_state

        count = _hyperparams.increment(state.count)
        updates, inner_state = inner.update(updates, state.inner_state, weights, **extra_args)
        updates = jax.tree.map(widest, updates, weights)
        here = updates, state.exchange_state
        if _checks.is_number(sync_every) and sync_every == 1:
            updates, exchange_state = exchanged(*here)
        else:
            updates, exchange_state = _compat.cond(
                count % sync_every == 0, exchanged, lambda *now: now, *here
            )
        return updates, LocalUpdatesState(count, inner_state, exchange_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
