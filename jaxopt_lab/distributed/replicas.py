"""A training state for each replica: on devices, over processes and hosts, or on one device.

The function of one replica runs under `shard_map` where each has a device, and under `vmap` in a
simulation. Every array has the replicas as its leading axis.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding

from jaxopt_lab import _checks, _tree
from jaxopt_lab.distributed import _processes, _resize, _stacked, _step
from jaxopt_lab.distributed._stacked import shared_counters

__all__ = [
    "MutableTrainState",
    "Replicas",
    "TrainState",
    "device_replicas",
    "shared_counters",
    "simulated_replicas",
]


class TrainState(NamedTuple):
    """What replicas train; the leading axis of every leaf but shared counters is theirs.

    Attributes:
      params: parameters of every replica, as the transformation was given them.
      opt_state: the optimizer's state of every replica.
    """

    params: Any
    opt_state: Any


class MutableTrainState(NamedTuple):
    """A `TrainState` of a model with collections that a step changes, such as batch statistics.

    Attributes:
      params: parameters of every replica, as the transformation was given them.
      opt_state: the optimizer's state of every replica.
      mutable: each replica's own; `Replicas.consensus` gives the mean to evaluate with.
    """

    params: Any
    opt_state: Any
    mutable: Any


@dataclasses.dataclass(frozen=True)
class Replicas:
    """Replicas of a model, one for each device of all processes, or simulated on one device.

    The same lines serve one process with many devices and, after `jax.distributed.initialize`, many
    processes on many hosts: there every process holds the replicas of its own devices.

    Who calls: `init`, `resize`, `consensus`, `check_equal`, and what `train_step` and `map` return
    are programs of all replicas. Every process that holds some has to call them, in the same order.
    `init`, `resize`, `consensus` and `check_equal` check it: where another process does not come
    within two minutes, they raise. Processes without a device in the mesh call none of them.

    Attributes:
      axis_name: the mapped axis, the `axis_name` of the transformations.
      mesh: a mesh whose only axis is `axis_name`, or None in a simulation.
      count: number of replicas.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_lab import distributed
      >>> replicas = distributed.simulated_replicas(4)
      >>> tx = optax.chain(distributed.sync_gradients("replica"), optax.sgd(0.125))
      >>> def loss(params, batch):
      ...     return jnp.mean((batch @ params) ** 2)
      >>> state = replicas.init(tx, jnp.ones(3))
      >>> step = replicas.train_step(loss, tx)
      >>> state, losses = step(state, replicas.shard(jnp.ones((4, 2, 3))))
      >>> losses.shape, replicas.consensus(state.params)
      ((4,), array([0.25, 0.25, 0.25], dtype=float32))
    """

    axis_name: str
    mesh: Mesh | None
    count: int

    @property
    def local(self) -> tuple[int, ...]:
        """The replicas whose data this process gives to `shard`."""
        if self.mesh is None:
            return tuple(range(self.count))
        mine = jax.process_index()
        return tuple(i for i, d in enumerate(self.mesh.devices.flat) if d.process_index == mine)

    def init(self, tx: optax.GradientTransformation, params: Any, mutable: Any = None) -> Any:
        """Gives every replica the same parameters and its own optimizer state.

        Every process that holds replicas has to call it. `jax.eval_shape` works on it.

        Args:
          tx: the transformation.
          params: parameters of one replica; with several processes, equal in all of them. Where
            they are of type `jax.ShapeDtypeStruct`, so are the results, with their shardings, and
            nothing is allocated: what a checkpoint is restored into.
          mutable: arrays of the model that a step changes and no gradient does, such as Flax's
            `batch_stats`, which the loss of `train_step` is then given and returns.

        Returns:
          A `TrainState` with arrays of shape (replicas, ...), or a `MutableTrainState` where
          `mutable` is given. Counters that all replicas share have shape ().

        Raises:
          ValueError: the processes do not agree in the parameters' tree, shapes or dtypes, or this
            one holds no replica.
          RuntimeError: another process does not call it.
          TypeError: `tx` is no transformation.
        """
        _checks.check_transformation(tx=tx)
        leaves = jax.tree.leaves((params, mutable))
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
            return self._placed_shapes(
                jax.eval_shape(functools.partial(self.init, tx), params, mutable)
            )
        if not any(isinstance(x, Tracer) for x in leaves):
            _processes.meet(self.mesh, "Replicas.init")
            _processes.check_same_tree(self.mesh, (params, mutable))
        copies = self.replicate(params)
        shared = shared_counters(jax.eval_shape(jax.vmap(
            tx.init, axis_name=self.axis_name, axis_size=self.count), copies))  # fmt: skip
        opt_state = jax.jit(self._mapped(tx.init, out_shared=shared))(copies)
        if mutable is None:
            return TrainState(copies, opt_state)
        return MutableTrainState(copies, opt_state, self.replicate(mutable))

    def train_step(
        self,
        loss: _step.Loss,
        tx: optax.GradientTransformation,
        *,
        has_aux: bool = False,
        weight: Callable[[Any], Any] | None = None,
    ) -> Callable[[Any, Any], tuple[Any, Any]]:
        """Compiles one step of every replica on its own batch.

        The transformation is also given `value`, `grad` and `value_fn`, as `reduce_on_plateau` and
        optax's line searches want them: the mean loss over the replicas, the mean gradient, and the
        mean loss as a function of parameters, so that replicas with equal weights decide alike.
        Where they step on their own (`diloco` and the other local updates), these are the
        replica's. The means are made, and sent, only for a transformation that asks for them. A
        line search around or behind an exchange of gradients is refused: its turns would exchange.

        Args:
          loss: `loss(params, batch)` of one replica, a scalar; without collectives. For a
            `MutableTrainState` `loss(params, mutable, batch)`, which returns the loss and the new
            `mutable`.
          tx: the transformation.
          has_aux: whether `loss` has one result more, which is returned beside the loss: a pair
            `(value, aux)`, or `(value, (mutable, aux))`.
          weight: a function of a replica's batch that gives its weight, shape (), in all means over
            the replicas, such as its number of tokens; see `sync_gradients`. It serves every method
            that averages gradients, and costs one more number to send.

        Returns:
          A jitted `step(state, batch) -> (state, losses)`, which may stand in a `jax.lax.scan`. The
          leaves of `batch` have the replicas as leading axis, and `losses` has shape (replicas,) or
          is a pair with the stacked second parts. The state is donated. Random numbers of a step,
          as for dropout, are typed or raw keys in the batch, one a replica:
          `jax.random.split(key, count)`.

        Raises:
          ValueError: at step, a leaf of the state or the batch whose leading axis is not the
            replicas, a `mutable` that changes its shapes, a `weight` with local updates, or an
            exchange in a branch that replicas choose each for itself, such as
            `optax.apply_if_finite` around one.
          TypeError: `loss` or `weight` is no function, or `tx` no transformation.
        """
        one = _step.make(loss, tx, self.axis_name, has_aux=has_aux, weight=weight)

        def step(state: Any, batch: Any) -> tuple[Any, Any]:
            mutable = state.mutable if isinstance(state, MutableTrainState) else None
            *new, values = one(state.params, state.opt_state, mutable, batch)
            return type(state)(*new[: len(state)]), values

        @functools.partial(jax.jit, donate_argnums=0)
        def on_all(state: Any, batch: Any) -> tuple[Any, Any]:
            shared = shared_counters(state)
            _stacked.check_leading(state, shared, self.count, "state")
            _stacked.check_leading(batch, False, self.count, "batch")
            return self._mapped(step, in_shared=(shared, False), out_shared=(shared, False))(
                state, batch
            )

        return on_all

    def map(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Compiles a function of one replica for all of them.

        Args:
          fn: function of arrays; it may use collectives over `axis_name`.

        Returns:
          A function of trees with the replicas as leading axis, which returns such trees. In
          states among its arguments, counters that all replicas share have no such axis.

        Raises:
          ValueError: when called, a leaf with another leading axis; the message has its path.
        """

        @jax.jit
        def on_all(*args: Any) -> Any:
            shared = tuple(map(_stacked.shared_scalars, args))
            for place, (arg, flags) in enumerate(zip(args, shared)):
                _stacked.check_leading(arg, flags, self.count, f"argument {place}")
            return self._mapped(fn, in_shared=shared)(*args)

        return on_all

    def replicate(self, tree: Any) -> Any:
        """Returns `tree` with a copy for each replica along a new leading axis.

        Args:
          tree: arrays or typed keys of one replica; with several processes, equal in all of them.
        """

        def copies(value: Any) -> jax.Array:
            shape = self.count, *np.shape(value)
            if self.mesh is None:
                return jnp.stack([jnp.asarray(value)] * self.count)
            if isinstance(value, Tracer):
                stack = jnp.broadcast_to(value, shape)
                return lax.with_sharding_constraint(stack, self._sharding)
            array = np.asarray(value)
            return jax.make_array_from_callback(shape, self._sharding, lambda _: array[None])

        return jax.tree.map(functools.partial(_stacked.with_raw_keys, copies), tree)

    def shard(self, tree: Any) -> Any:
        """Gives each replica its part of host data.

        Args:
          tree: arrays or typed keys of shape (replicas of this process, ...), in the order of
            `local`.

        Returns:
          Arrays of shape (replicas, ...).

        Raises:
          ValueError: another leading axis; the message has the leaf's path.
        """
        for name, leaf in _tree.leaves_with_names(tree):
            found = np.shape(leaf)
            if not found or found[0] != len(self.local):
                raise ValueError(
                    f"{_tree.named('leaf', name)} has shape {found}; expected the "
                    f"{len(self.local)} replicas of this process as its leading axis"
                )

        def placed(x: Any) -> jax.Array:
            if self.mesh is None:
                return jnp.asarray(x)
            return jax.make_array_from_process_local_data(
                self._sharding, np.asarray(x), (self.count, *np.shape(x)[1:])
            )

        return jax.tree.map(functools.partial(_stacked.with_raw_keys, placed), tree)

    def consensus(self, tree: Any) -> Any:
        """Returns the mean over the replicas, as NumPy arrays, in every process.

        Every process that holds replicas has to call it. Floating leaves are averaged in at least
        float32 and keep their dtype; of all others, typed keys among them, the first replica's are
        returned, and counters that all share are as they are.

        Args:
          tree: arrays of shape (replicas, ...), or a state.

        Raises:
          ValueError: another leading axis; the message has the leaf's path.
          RuntimeError: another process does not call it.
        """
        shared = self._checked(tree, "Replicas.consensus")
        found = jax.tree.map(
            lambda flag, x: x if flag else _stacked.everywhere(_stacked.mean, x, self.mesh),
            shared,
            tree,
        )
        return jax.tree.map(functools.partial(_stacked.with_raw_keys, np.asarray), found)

    def check_equal(self, tree: Any, what: str = "parameter") -> None:
        """Refuses replicas that differ where a method takes them to be equal.

        Every process that holds replicas has to call it. Bits are compared, so that a NaN equals
        itself and zero does not equal minus zero. Counters that all replicas share are one number,
        and equal.

        Args:
          tree: arrays or typed keys of shape (replicas, ...), or a state.
          what: what a leaf is called in the message.

        Raises:
          ValueError: a leaf differs, or has another leading axis; the message has its path.
          RuntimeError: another process does not call it.
        """
        shared = self._checked(tree, "Replicas.check_equal")
        leaves = zip(_tree.leaves_with_names(tree), jax.tree.leaves(shared))
        own = {name: x for (name, x), flag in leaves if not flag}
        for name, flags in _stacked.everywhere(_stacked.differing, own, self.mesh).items():
            if np.any(flags):
                which = f"{what} '{name}'" if name else what
                raise ValueError(
                    f"{which} differs between replica 0 and replica {int(np.argmax(flags))}"
                )

    def resize(
        self,
        tx: optax.GradientTransformation,
        state: Any,
        *,
        params: Literal["mean", "first"] = "mean",
    ) -> Any:
        """Goes on with the state of another number of replicas.

        What each replica gets, so that nothing that was not sent yet is lost or counted twice:

        * Parameters, mutable collections, slow weights and moments: the mean over the replicas
          that were, or the first one's. Where these were equal, they are the same bits.
        * Memories of what was not sent (the errors, estimates and pending differences of this
          folder's methods): always the mean. A mean over replicas of them is part of the next mean
          gradients, and stays what it was. The error of a part that a replica averages for all
          (`error_feedback` with two phases, `one_bit_adam`) goes to who averages its entries now.
        * Counters that all share go on.
        * The state of a transformation with integers among its arrays that differ between replicas
          (int8 codes with their scales, chosen columns) cannot be averaged by parts: all of it is
          the first replica's. Keys and what else is no number are the first one's, too.

        Every process that holds replicas, here or in the state, has to call it.

        Args:
          tx: the transformation that the state is of.
          state: a `TrainState` of any number of replicas, or a `MutableTrainState`; its arrays may
            be NumPy's, as restored from a checkpoint.
          params: "mean" or "first".

        Returns:
          A state of these replicas.

        Raises:
          ValueError: `params` is neither; leaves of different numbers of replicas, or a state that
            `tx` does not make for these parameters.
          TypeError: `tx` is no transformation, or `state` no state of a driver.

        Examples:
          >>> import jax.numpy as jnp, optax
          >>> from jaxopt_lab import distributed
          >>> tx = distributed.gossip(optax.sgd(0.5), axis_name="replica")
          >>> four = distributed.simulated_replicas(4).init(tx, jnp.zeros(()))
          >>> four = four._replace(params=jnp.array([0.0, 1.0, 2.0, 3.0]))
          >>> distributed.simulated_replicas(2).resize(tx, four).params
          Array([1.5, 1.5], dtype=float32)
        """
        _checks.check_transformation(tx=tx)
        _checks.check_choice(("mean", "first"), params=params)
        if not isinstance(state, (TrainState, MutableTrainState)):
            raise TypeError(f"state must be a TrainState, got {type(state).__name__}")
        before = _resize.count_of(state)
        _stacked.check_leading(state, shared_counters(state), before, "state")
        weights = _resize.unstacked(state.params, params == "mean")
        mutable = None
        if isinstance(state, MutableTrainState):
            mutable = _resize.unstacked(state.mutable, params == "mean")
        like = self.init(tx, *jax.tree.map(jax.ShapeDtypeStruct.like, (weights, mutable)))
        place = _resize.Placing(self.count, self.replicate, params == "mean")
        rest = {} if mutable is None else {"mutable": self.replicate(mutable)}
        return state._replace(
            params=self.replicate(weights),
            opt_state=place.state(state.opt_state, like.opt_state),
            **rest,
        )

    @property
    def _sharding(self) -> NamedSharding:
        assert self.mesh is not None
        return NamedSharding(self.mesh, jax.P(self.axis_name))

    def _checked(self, tree: Any, function: str) -> Any:
        """Waits for the other processes, and returns which leaves of `tree` are shared."""
        shared = _stacked.shared_scalars(tree)
        _stacked.check_leading(tree, shared, self.count, "leaf")
        _processes.meet(self.mesh, function)
        return shared

    def _placed_shapes(self, state: Any) -> Any:
        def placed(shared: Any, x: Any) -> jax.ShapeDtypeStruct:
            if self.mesh is None:
                return x
            spec = jax.P() if shared else jax.P(self.axis_name)
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(self.mesh, spec))

        return jax.tree.map(placed, shared_counters(state), state)

    def _mapped(
        self,
        fn: Callable[..., Any],
        *,
        in_shared: Any = False,
        out_shared: Any = False,
    ) -> Callable[..., Any]:
        """Returns `fn` over stacked trees; where a tree of booleans has True there is no axis."""

        def choose(flags: Any, shared: Any, own: Any) -> Any:
            return jax.tree.map(lambda flag: shared if flag else own, flags)

        if self.mesh is None:
            return jax.vmap(
                fn,
                in_axes=choose(in_shared, None, 0),
                out_axes=choose(out_shared, None, 0),
                axis_name=self.axis_name,
                axis_size=self.count,
            )
        own = jax.P(self.axis_name)

        def one(*args: Any) -> Any:
            args = _stacked.select(in_shared, args, lambda x: x[0])
            return _stacked.select(out_shared, fn(*args), lambda x: x[None])

        # Unchecked: all is each replica's own, as under `vmap`, and what works there works here,
        # branches and loops of any model and any wrapper of optax among it. That shared counters
        # are equal is checked by `_agreement`.
        return jax.shard_map(
            one,
            mesh=self.mesh,
            in_specs=choose(in_shared, jax.P(), own),
            out_specs=choose(out_shared, jax.P(), own),
            check_vma=False,
        )


def device_replicas(axis_name: str = "replica", devices: Sequence[Any] | None = None) -> Replicas:
    """Returns one replica for each device.

    Args:
      axis_name: the name of the one axis of replicas, the `axis_name` of the transformations.
      devices: by default all devices of all processes. Only the processes of these devices hold
        replicas, and only they call the functions of a `Replicas`.

    Returns:
      A `Replicas`.

    Raises:
      ValueError: no device, or one twice.
      TypeError: `axis_name` is no text; a mesh of one axis has one name.

    Examples:
      >>> import jax
      >>> from jaxopt_lab import distributed
      >>> distributed.device_replicas().count == jax.device_count()
      True
    """
    _check_axis(axis_name)
    devices = jax.devices() if devices is None else devices
    if not isinstance(devices, (list, tuple, np.ndarray)) or not all(
        isinstance(device, jax.Device) for device in np.ravel(np.asarray(devices))
    ):
        raise TypeError(f"devices must be a list of jax.Device, got {devices!r}")
    found = np.asarray(devices)
    if not found.size or len(set(found.flat)) < found.size:
        raise ValueError(f"devices must be different devices, at least one, got {devices}")
    return Replicas(axis_name, Mesh(found, (axis_name,), axis_types=(AxisType.Auto,)), found.size)


def simulated_replicas(count: int, axis_name: str = "replica") -> Replicas:
    """Returns replicas that share one device, under `vmap`.

    Args:
      count: number of replicas.
      axis_name: the name of the one axis of replicas, the `axis_name` of the transformations.

    Returns:
      A `Replicas`.

    Raises:
      ValueError: `count` is below 1.
      TypeError: `count` is no integer, or `axis_name` no text.

    Examples:
      >>> from jaxopt_lab import distributed
      >>> distributed.simulated_replicas(8).count
      8
    """
    _check_axis(axis_name)
    _checks.check_positive_integer(count=count)
    return Replicas(axis_name, None, count)


def _check_axis(axis_name: Any) -> None:
    if not isinstance(axis_name, str):
        raise TypeError(
            f"axis_name must be text, the name of the one axis of replicas, got {axis_name!r}; for "
            "several axes use shard_map over your own mesh"
        )
