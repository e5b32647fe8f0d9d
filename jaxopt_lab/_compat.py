"""What differs between the supported jax versions, and facts about arrays under a mesh."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def type_apart_from_leading_axis(x: jax.Array) -> Any:
    """Returns what two arrays must share to be concatenated along axis 0 without a change."""
    aval = jax.typeof(x)
    return aval.shape[1:], aval.dtype, str(aval.sharding.spec), str(aval.manual_axis_type)


def varying_axes(x: jax.Array) -> frozenset[Any]:
    """Returns the mesh axes over which `x` varies, as far as `shard_map` checks it."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def unshard(x: jax.Array) -> jax.Array:
    """Gathers an array whose sharding is part of its type (explicit mesh axes); else returns it."""
    if not _explicit(x):
        return x
    return jax.sharding.reshard(x, NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec()))


def reshard_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """Gives `x` the sharding of `like`, where that is part of the type."""
    if not _explicit(like):
        return x
    return jax.sharding.reshard(x, jax.typeof(like).sharding)


def _explicit(x: jax.Array) -> bool:
    sharding = jax.typeof(x).sharding
    return isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types


def scan_sizes(params: dict[str, Any]) -> tuple[int, int]:
    """Returns how many operands of a scan are constants and how many are carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(list(consts)), len(list(carry))
