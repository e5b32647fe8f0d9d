r"""Whole rounds of local steps, as one program or with the exchange's state in host memory.

    message = begin(state)                                     beside the steps
    theta_i <- theta_i + inner(g_i)                            H times
    theta_i, state <- finish(theta_i, state, message)

Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models", 2023,
arXiv:2311.08105, algorithm 1; Sun et al., "CO2", ICLR 2024, arXiv:2401.16265, for what is sent
beside the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from jaxopt_lab import _checks, _compat, _hyperparams, _tree
from jaxopt_lab.distributed import _axes, _stacked, _step
from jaxopt_lab.distributed._stacked import shared_counters
from jaxopt_lab.distributed.local_updates import Exchange, LocalUpdatesState, local_updates
from jaxopt_lab.distributed.replicas import MutableTrainState, Replicas

_HOST = "pinned_host"
_MEMORY_KINDS = ("device", _HOST)


class TrainRounds(NamedTuple):
    """How to train in whole rounds: a function that makes the state, and one that runs a round.

    Attributes:
      init: `params of one replica, mutable collections if any -> state`.
      step: `state, batches -> state, losses`.
    """

    init: Callable[..., Any]
    step: Callable[[Any, Any], tuple[Any, Any]]


def train_rounds(
    replicas: Replicas,
    loss: Callable[..., Any],
    inner: optax.GradientTransformation,
    exchange: Exchange,
    sync_every: int,
    *,
    has_aux: bool = False,
    exchange_memory_kind: Literal["device", "pinned_host"] = "device",
) -> TrainRounds:
    """Compiles `sync_every` local steps and their exchange as a round.

    The state is that of `replicas.init(local_updates(inner, exchange, sync_every), params)`, and a
    round does what `sync_every` calls of `replicas.train_step` do, but for the rounding of the one
    sum with which an update leads to the exchange's result. What is won:

    * With `exchange_memory_kind="device"` a round is one program. The collectives of
      `exchange.begin` (CO2's all-reduce) wait for no step in it, and a compiler may run them
      beside the steps: jax 0.10's for an H200 does, 0.12's and that for a v5p do not.
    * With "pinned_host" the slow weights, the outer optimizer's state and whatever else the
      exchange keeps are in host memory during the steps: DiLoCo with momentum takes 8 bytes a
      parameter less on the device. A round is three programs, and `begin` runs before the steps.

    Args:
      replicas: the driver; on devices or simulated.
      loss: `loss(params, batch)` of one replica, a scalar; without collectives. For a state with
        mutable collections as in `Replicas.train_step`.
      inner: the transformation of the local steps.
      exchange: what replicas do between rounds, such as `diloco_exchange(axis_name="replica")`.
      sync_every: H, local steps in a round.
      has_aux: whether `loss` returns a pair whose second part is returned beside the loss.
      exchange_memory_kind: "device" or "pinned_host", where the exchange's arrays are between
        rounds. Its scalars stay on the device.

    Returns:
      A `TrainRounds`. Its `init(params)` returns a `TrainState` with a `LocalUpdatesState`, and
      `init(params, mutable)` a `MutableTrainState`; shapes are taken, too, as by `Replicas.init`.
      Every process that holds replicas has to call both. Its
      `step(state, batches)`, which is compiled and not to be jitted again, takes leaves of shape
      (replicas, sync_every, ...), such as `replicas.shard` makes, and returns the new state and
      losses of shape (replicas, sync_every), or a pair with the stacked second parts. The state
      is donated.

    Raises:
      ValueError: `sync_every` below 1, an unknown memory kind or one that the devices lack, or an
        exchange of another axis than the replicas'; at step, a state or batches of another shape.
      TypeError: `loss` is no function, `inner` no transformation or `exchange` no `Exchange`; at
        step, a state of another transformation.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_lab import distributed
      >>> replicas = distributed.simulated_replicas(4)
      >>> diloco = distributed.train_rounds(
      ...     replicas, lambda params, batch: jnp.mean((batch @ params) ** 2), optax.sgd(0.1),
      ...     distributed.diloco_exchange(axis_name="replica"), sync_every=2,
      ...     exchange_memory_kind="pinned_host")
      >>> state = diloco.init(jnp.ones(3))
      >>> state.opt_state.exchange_state.slow.sharding.memory_kind
      'pinned_host'
      >>> state, losses = diloco.step(state, replicas.shard(jnp.ones((4, 2, 5, 3))))
      >>> losses.shape
      (4, 2)

    References:
      Douillard et al., `DiLoCo <https://arxiv.org/abs/2311.08105>`_, 2023, algorithm 1. Sun et al.,
      `CO2 <https://arxiv.org/abs/2401.16265>`_, ICLR 2024, for the collective beside the steps.
    """
    if not isinstance(replicas, Replicas):
        raise TypeError(
            "replicas must be what simulated_replicas or device_replicas returns, got "
            f"{type(replicas).__name__}"
        )
    _checks.check_function(loss=loss)
    _checks.check_flag(has_aux=has_aux)
    tx = local_updates(inner, exchange, sync_every)
    if _axes.canonical(exchange.axis_name) != replicas.axis_name:
        raise ValueError(
            f"the exchange is over axis {exchange.axis_name!r}, the replicas are on axis "
            f"{replicas.axis_name!r}"
        )
    _check_memory_kind(exchange_memory_kind, replicas)
    on_host = exchange_memory_kind == _HOST

    one = _step.make(loss, inner, replicas.axis_name, has_aux=has_aux, weight=None, is_local=True)

    def local_steps(params: Any, inner_state: Any, mutable: Any, batches: Any) -> Any:
        def step(carry: Any, batch: Any) -> tuple[Any, Any]:
            params, inner_state, mutable = carry
            *new, value = one(params, inner_state, mutable, batch)
            return tuple(new), value

        carry, values = _compat.scan(step, (params, inner_state, mutable), batches)
        return *carry, values

    def begin(exchange_state: Any) -> Any:
        shared = shared_counters(exchange_state)
        return replicas._mapped(exchange.begin, in_shared=(shared,))(_to_device(exchange_state))

    def steps(params: Any, inner_state: Any, mutable: Any, batches: Any) -> Any:
        shared = False, shared_counters(inner_state), False, False
        mapped = replicas._mapped(local_steps, in_shared=shared, out_shared=shared)
        return mapped(params, inner_state, mutable, batches)

    def finish(params: Any, exchange_state: Any, message: Any) -> tuple[Any, Any]:
        shared = shared_counters(exchange_state)
        params, exchange_state = replicas._mapped(
            exchange.finish, in_shared=(False, shared, False), out_shared=(False, shared)
        )(params, _to_device(exchange_state), message)
        return params, _to_host(exchange_state) if on_host else exchange_state

    if on_host:
        # In one program a compiler would fetch the state before the steps, to hide the time.
        begin = jax.jit(begin)
        steps = jax.jit(steps, donate_argnums=(0, 1, 2))
        finish = jax.jit(finish, donate_argnums=(0, 1))

    def one_round(state: Any, batches: Any) -> tuple[Any, Any]:
        count, inner_state, exchange_state = state.opt_state
        mutable = state.mutable if isinstance(state, MutableTrainState) else None
        message = begin(exchange_state)
        params, inner_state, mutable, values = steps(state.params, inner_state, mutable, batches)
        params, exchange_state = finish(params, exchange_state, message)
        count = _hyperparams.increment(count, sync_every)
        opt_state = LocalUpdatesState(count, inner_state, exchange_state)
        return type(state)(*(params, opt_state, mutable)[: len(state)]), values

    if not on_host:
        one_round = jax.jit(one_round, donate_argnums=0)

    def placed(state: Any) -> Any:
        opt_state = _tree.check_state(state.opt_state, LocalUpdatesState)
        exchange_state = jax.tree.map(put, opt_state.exchange_state)
        return state._replace(opt_state=opt_state._replace(exchange_state=exchange_state))

    def put(x: Any) -> Any:
        # A buffer that is donated for a result in another kind of memory aborts the process.
        if isinstance(x, Tracer) or np.ndim(x) < 2:
            return x
        if isinstance(x, jax.ShapeDtypeStruct):
            if x.sharding is None:
                return x
            sharding = x.sharding.with_memory_kind(exchange_memory_kind)
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        if isinstance(x, jax.Array) or replicas.mesh is None:
            sharding = jnp.asarray(x).sharding
        else:
            sharding = replicas._sharding
        return jax.device_put(x, sharding.with_memory_kind(exchange_memory_kind))

    def init(params: optax.Params, mutable: Any = None) -> Any:
        return placed(replicas.init(tx, params, mutable))

    def step(state: Any, batches: Any) -> tuple[Any, Any]:
        _stacked.check_leading(state, shared_counters(state), replicas.count, "state")
        _check_batches(batches, replicas.count, sync_every)
        return one_round(placed(state), batches)

    return TrainRounds(init, step)


def _to_device(tree: Any) -> Any:
    return _to(tree, jax.memory.Space.Device)


def _to_host(tree: Any) -> Any:
    return _to(tree, jax.memory.Space.Host)


def _to(tree: Any, space: Any) -> Any:
    # Scalars, which have the replicas as their only axis, stay where they are.
    return jax.tree.map(lambda x: jax.device_put(x, space) if x.ndim > 1 else x, tree)


def _check_memory_kind(kind: str, replicas: Replicas) -> None:
    _checks.check_choice(_MEMORY_KINDS, exchange_memory_kind=kind)
    devices = jax.local_devices()[:1] if replicas.mesh is None else replicas.mesh.devices.flat
    for device in devices:
        # A device that a program is only compiled for lists no memories.
        found = {memory.kind for memory in device.addressable_memories()}
        if found and kind not in found:
            raise ValueError(
                f"exchange_memory_kind is {kind!r}, and {device} has {', '.join(sorted(found))}"
            )


def _check_batches(batches: Any, count: int, sync_every: int) -> None:
    for name, leaf in _tree.leaves_with_names(batches):
        if np.shape(leaf)[:2] != (count, sync_every):
            raise ValueError(
                f"{_tree.named('batch', name)} has shape {np.shape(leaf)}; expected its first "
                f"axes to be {count} replicas and {sync_every} local steps"
            )
