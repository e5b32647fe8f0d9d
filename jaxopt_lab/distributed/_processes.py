"""The processes that hold replicas of a mesh, and that have to call the same functions."""

from __future__ import annotations

import collections
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from jaxopt_lab import _compat, _tree
from jaxopt_lab.distributed import _stacked

WAIT = 120.0  # seconds that one process waits for the others
_calls: collections.Counter[Any] = collections.Counter()


def of(mesh: Mesh | None) -> list[int]:
    """Returns the processes with devices in the mesh."""
    if mesh is None:
        return [jax.process_index()]
    return sorted({device.process_index for device in mesh.devices.flat})


def meet(mesh: Mesh | None, function: str) -> None:
    """Returns when all processes of the mesh have called this, in the same order.

    Raises:
      ValueError: this process has no device in the mesh.
      RuntimeError: another process has not called it in `WAIT` seconds.
    """
    processes = of(mesh)
    if mesh is not None and jax.process_index() not in processes:
        raise ValueError(
            f"{function} was called by process {jax.process_index()}, which holds none of the "
            f"replicas; they are those of processes {processes}"
        )
    if len(processes) == 1:
        return
    place = function, tuple(device.id for device in mesh.devices.flat) if mesh else ()
    _calls[place] += 1
    name = hashlib.sha256(repr((place, _calls[place])).encode()).hexdigest()
    try:
        _compat.wait_for_processes(f"jaxopt_lab {function} {name}", processes, WAIT)
    except jax.errors.JaxRuntimeError as error:
        raise RuntimeError(
            f"{function} has to be called by all of the processes {processes} that hold replicas, "
            f"as often and in the same order; process {jax.process_index()} waited for the others, "
            f"{WAIT:g} seconds at most ({str(error).splitlines()[0][:200]})"
        ) from error


def check_same_tree(mesh: Mesh | None, params: optax.Params) -> None:
    """Refuses parameters that are another tree in another process of the mesh.

    Raises:
      ValueError: the message has the processes.
    """
    processes = of(mesh)
    if mesh is None or len(processes) == 1:
        return
    leaves = [(n, np.shape(x), str(jnp.result_type(x))) for n, x in _tree.leaves_with_names(params)]
    digest = np.frombuffer(hashlib.sha256(repr(leaves).encode()).digest()[:4], np.int32)
    sharding = NamedSharding(mesh, jax.P(*mesh.axis_names))
    one_each = jax.make_array_from_callback((mesh.size,), sharding, lambda _: digest)
    found = np.asarray(_stacked.everywhere(_as_it_is, one_each, mesh))
    owners = np.asarray([device.process_index for device in mesh.devices.flat])
    others = sorted(set(owners[found != digest[0]].tolist()))
    if others:
        raise ValueError(
            f"the parameters of process {jax.process_index()} have other paths, shapes or "
            f"dtypes than those of processes {others}; expected the same tree in all of them"
        )


def _as_it_is(x: jax.Array) -> jax.Array:
    return x
