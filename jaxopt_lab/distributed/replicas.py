"""A training state for each replica: on devices, over processes and hosts, or on one device.

The function of one replica runs under `shard_map` where each has a device, and under `vmap` in a
simulation. Every array has the replicas as its leading axis.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding

from jaxopt_lab import _tree

Loss = Callable[..., Any]
_COUNTERS = {"count", "round"}  # fields of the states of this folder that all replicas share


class TrainState(NamedTuple):
    """What replicas train; the leading axis of every leaf but shared counters is theirs."""

    params: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class Replicas:
    """Replicas of a model, one for each device of all processes, or simulated on one device.

    The same lines serve one process with many devices and, after `jax.distributed.initialize`, many
    processes on many hosts: there every process holds the replicas of its own devices.

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

    def init(self, tx: optax.GradientTransformation, params: optax.Params) -> TrainState:
        """Gives every replica the same parameters and its own optimizer state.

        Args:
          tx: the transformation.
          params: parameters of one replica; with several processes, equal in all of them.

        Returns:
          A `TrainState` with arrays of shape (replicas, ...).

        Raises:
          ValueError: the processes do not agree in the parameters' tree, shapes or dtypes.
        """
        self._check_processes_agree(params)
        copies = self.replicate(params)
        shared = shared_counters(jax.eval_shape(jax.vmap(
            tx.init, axis_name=self.axis_name, axis_size=self.count), copies))  # fmt: skip
        init = self._mapped(tx.init, out_shared=shared)
        return TrainState(copies, jax.jit(init)(copies))

    def train_step(
        self, loss: Loss, tx: optax.GradientTransformation, *, has_aux: bool = False
    ) -> Callable[[TrainState, Any], tuple[TrainState, Any]]:
        """Compiles one step of every replica on its own batch.

        Args:
          loss: `loss(params, batch)` of one replica, a scalar; without collectives.
          tx: the transformation.
          has_aux: whether `loss` returns a pair whose second part is returned beside the loss.

        Returns:
          A jitted `step(state, batch) -> (state, losses)`, which may stand in a `jax.lax.scan`. The
          leaves of `batch` have the replicas as leading axis, and `losses` has shape (replicas,) or
          is a pair with the stacked second parts. The state is donated.
        """

        def step(state: TrainState, batch: Any) -> tuple[TrainState, Any]:
            value, grads = jax.value_and_grad(loss, has_aux=has_aux)(state.params, batch)
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            return TrainState(optax.apply_updates(state.params, updates), opt_state), value

        @functools.partial(jax.jit, donate_argnums=0)
        def on_all(state: TrainState, batch: Any) -> tuple[TrainState, Any]:
            specs = shared_counters(state), False
            return self._mapped(step, in_shared=specs, out_shared=specs)(state, batch)

        return on_all

    def map(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Compiles a function of one replica for all of them.

        Args:
          fn: function of arrays; it may use collectives over `axis_name`.

        Returns:
          A function of trees with the replicas as leading axis, which returns such trees.
        """
        return jax.jit(self._mapped(fn))

    def replicate(self, tree: Any) -> Any:
        """Returns `tree` with a copy for each replica along a new leading axis."""
        if self.mesh is None:
            return jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * self.count), tree)

        def copies(leaf: Any) -> jax.Array:
            value = np.asarray(leaf)
            shape = (self.count, *value.shape)
            return jax.make_array_from_callback(shape, self._sharding, lambda _: value[None])

        return jax.tree.map(copies, tree)

    def shard(self, tree: Any) -> Any:
        """Gives each replica its part of host data.

        Args:
          tree: arrays of shape (replicas of this process, ...), in the order of `local`.

        Returns:
          Arrays of shape (replicas, ...).

        Raises:
          ValueError: another leading axis; the message has the leaf's path.
        """
        for name, leaf in _tree.leaves_with_names(tree):
            found = np.shape(leaf)
            if not found or found[0] != len(self.local):
                raise ValueError(
                    f"leaf '{name}' has shape {found}; expected the {len(self.local)} replicas of "
                    "this process as its leading axis"
                )
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, tree)
        sharding = self._sharding
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(
                sharding, np.asarray(x), (self.count, *np.shape(x)[1:])
            ),
            tree,
        )

    def consensus(self, tree: Any) -> Any:
        """Returns the mean over the replicas, as NumPy arrays, in every process.

        Floating leaves are averaged in at least float32 and keep their dtype; of all others the
        first replica's are returned.
        """
        return jax.tree.map(np.asarray, _everywhere(_mean, tree, self.mesh))

    def check_equal(self, tree: Any, what: str = "parameter") -> None:
        """Refuses replicas that differ where a method takes them to be equal.

        Bits are compared, so that a NaN equals itself and zero does not equal minus zero.

        Args:
          tree: arrays of shape (replicas, ...).
          what: what a leaf is called in the message.

        Raises:
          ValueError: a leaf differs; the message has its path and a replica.
        """
        for name, flags in _tree.leaves_with_names(_everywhere(_differing, tree, self.mesh)):
            if np.any(flags):
                raise ValueError(
                    f"{what} '{name}' differs between replica 0 and replica "
                    f"{int(np.argmax(flags))}; the method takes the replicas to be equal"
                )

    @property
    def _sharding(self) -> NamedSharding:
        assert self.mesh is not None
        return NamedSharding(self.mesh, jax.P(self.axis_name))

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
            args = _select(in_shared, args, lambda x: x[0])
            return _select(out_shared, fn(*args), lambda x: x[None])

        return jax.shard_map(
            one,
            mesh=self.mesh,
            in_specs=choose(in_shared, jax.P(), own),
            out_specs=choose(out_shared, jax.P(), own),
        )

    def _check_processes_agree(self, params: optax.Params) -> None:
        if self.mesh is None or jax.process_count() == 1:
            return
        from jax.experimental import multihost_utils

        leaves = [(n, np.shape(x), str(jnp.result_type(x))) for n, x in
                  _tree.leaves_with_names(params)]  # fmt: skip
        digest = hashlib.sha256(repr(leaves).encode()).digest()[:4]
        mine = np.frombuffer(digest, np.int32)
        all_of_them = np.asarray(multihost_utils.process_allgather(mine)).reshape(-1)
        if np.any(all_of_them != mine[0]):
            others = np.flatnonzero(all_of_them != mine[0]).tolist()
            raise ValueError(
                f"the parameters of process {jax.process_index()} have other paths, shapes or "
                f"dtypes than those of processes {others}; expected the same tree in all of them"
            )


def device_replicas(axis_name: str = "replica", devices: Sequence[Any] | None = None) -> Replicas:
    """Returns one replica for each device.

    Args:
      axis_name: the mapped axis.
      devices: by default all devices of all processes.

    Returns:
      A `Replicas`.

    Examples:
      >>> import jax
      >>> from jaxopt_lab import distributed
      >>> distributed.device_replicas().count == jax.device_count()
      True
    """
    found = np.asarray(jax.devices() if devices is None else list(devices))
    return Replicas(axis_name, Mesh(found, (axis_name,), axis_types=(AxisType.Auto,)), found.size)


def simulated_replicas(count: int, axis_name: str = "replica") -> Replicas:
    """Returns replicas that share one device, under `vmap`.

    Args:
      count: number of replicas.
      axis_name: the mapped axis.

    Returns:
      A `Replicas`.

    Raises:
      ValueError: `count` is below 1.

    Examples:
      >>> from jaxopt_lab import distributed
      >>> distributed.simulated_replicas(8).count
      8
    """
    if count < 1:
        raise ValueError(f"count must be a positive integer, got {count}")
    return Replicas(axis_name, None, count)


def shared_counters(state: Any) -> Any:
    """Returns a tree of booleans: True for the step counters of this folder's transformations.

    They are the same number on all replicas by construction. Kept once, a branch on them stays a
    branch under `vmap`, where a counter for each replica would make both branches run.
    """

    def ours(node: Any) -> bool:
        fields = set(getattr(node, "_fields", ()))
        return bool(fields & _COUNTERS) and type(node).__module__.startswith(__package__ or "")

    def flags(node: Any) -> Any:
        if not ours(node):
            return False
        return node._replace(
            **{name: name in _COUNTERS or shared_counters(getattr(node, name))
               for name in node._fields}
        )  # fmt: skip

    return jax.tree.map(flags, state, is_leaf=ours)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _everywhere(fn: Callable[[jax.Array], jax.Array], tree: Any, mesh: Mesh | None) -> Any:
    """Maps `fn` over stacked leaves; every process gets all of the results."""
    found = jax.tree.map(fn, tree)
    if mesh is None:
        return found
    return lax.with_sharding_constraint(found, NamedSharding(mesh, jax.P()))


def _mean(x: jax.Array) -> jax.Array:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x[0]
    # The first replica's plus the mean difference: equal replicas give their very bits.
    wide = x.astype(_tree.compute_dtype(x.dtype))
    return (wide[0] + jnp.mean(wide - wide[0], axis=0)).astype(x.dtype)


def _differing(x: jax.Array) -> jax.Array:
    bits = lax.bitcast_convert_type(x, jnp.uint8) if x.dtype != bool else x
    return jnp.any(bits != bits[:1], axis=tuple(range(1, bits.ndim)))


def _select(flags: Any, trees: Any, fn: Callable[[Any], Any]) -> Any:
    """Applies `fn` to the leaves below a False of `flags`, a prefix of `trees`."""
    return jax.tree.map(lambda flag, tree: tree if flag else jax.tree.map(fn, tree), flags, trees)
