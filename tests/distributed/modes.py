"""The ways to run a function on several replicas; every method must give the same under each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

AXIS = "replica"
MODES = ("vmap", "shard_map", "unchecked", "pmap")
REPLICAS = (1, 2, 3, 8)


def mesh(replicas: int) -> jax.sharding.Mesh:
    return jax.make_mesh((replicas,), (AXIS,), (jax.sharding.AxisType.Auto,))


def mapped(mode: str, fn: Callable[..., Any], replicas: int) -> Callable[..., Any]:
    """Returns a jitted `fn` over stacked trees: each leaf has the replicas as its leading axis."""
    if mode == "vmap":
        return jax.jit(jax.vmap(fn, axis_name=AXIS, axis_size=replicas))
    if mode == "pmap":
        return jax.pmap(fn, axis_name=AXIS, devices=jax.devices()[:replicas])

    def one(*arguments: Any) -> Any:
        results = fn(*jax.tree.map(lambda x: x[0], arguments))
        return jax.tree.map(lambda x: x[None], results)

    spec = jax.P(AXIS)
    checked = mode == "shard_map"
    return jax.jit(
        jax.shard_map(one, mesh=mesh(replicas), in_specs=spec, out_specs=spec, check_vma=checked)
    )


def stacked(tree: Any, replicas: int) -> Any:
    """Returns `tree` with a copy for each replica along a new leading axis."""
    return jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * replicas), tree)
