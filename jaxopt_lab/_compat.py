"""What differs between jax versions and compilers, and facts about arrays under a mesh."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, ManualAxisType, NamedSharding, PartitionSpec


def type_apart_from_leading_axis(x: jax.Array) -> Any:
    """Returns what two arrays must share to be concatenated along axis 0 without a change."""
    aval = jax.typeof(x)
    return aval.shape[1:], aval.dtype, str(aval.sharding.spec), str(aval.manual_axis_type)


def varying_axes(x: jax.Array) -> frozenset[Any]:
    """Returns the mesh axes over which `x` varies, as far as `shard_map` checks it."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def max_magnitude(
    x: jax.Array, axis: int | tuple[int, ...] | None = None, *, keepdims: bool = False
) -> jax.Array:
    """Returns the largest magnitude, NaN where there is one among the entries."""
    size = jnp.max(jnp.abs(x), axis, keepdims=keepdims)
    return jnp.where(has_nan(x, axis, keepdims=keepdims), jnp.nan, size)


def has_nan(
    x: jax.Array, axis: int | tuple[int, ...] | None = None, *, keepdims: bool = False
) -> jax.Array:
    """Returns whether there is NaN among the entries.

    The maxima of XLA's library for CPUs and of GPU kernels pass over NaN; a sum does not.
    """
    return jnp.isnan(jnp.sum(jnp.abs(x), axis, keepdims=keepdims))


def vary_alike(arrays: Sequence[jax.Array], *others: jax.Array) -> list[jax.Array]:
    """Marks each of `arrays` as varying over all mesh axes over which any array here varies."""
    axes = frozenset().union(*map(varying_axes, (*arrays, *others)))

    def mark(x: jax.Array) -> jax.Array:
        missing = axes - varying_axes(x)
        return lax.pcast(x, tuple(sorted(missing, key=str)), to="varying") if missing else x

    return [mark(x) for x in arrays]


def out_struct(like: jax.Array) -> jax.ShapeDtypeStruct:
    """Describes an output of a kernel that has the type of `like`."""
    kind = ManualAxisType(varying=varying_axes(like))
    return jax.ShapeDtypeStruct(like.shape, like.dtype, manual_axis_type=kind)


def bind(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Evaluates one operation of a jaxpr, under the mesh and the settings it was traced with."""
    with eqn.ctx.manager:
        found = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    return list(found) if eqn.primitive.multiple_results else [found]


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


def eval_with_axes(function: Any, *args: Any) -> None:
    """Traces `function` without results; mapped axes that it asks for have one member.

    Raises:
      Exception: what `function` raises, unless it is for want of an axis.
    """

    def traced(*args: Any) -> None:
        function(*args)

    bound: list[str] = []
    while True:
        try:
            jax.eval_shape(traced, *args)
        except (NameError, ValueError) as error:
            name = _unbound(error)
            if name is None or name in bound:
                raise
            bound.append(name)
            traced = _mapped(traced, name)
        else:
            return


def _mapped(function: Any, name: str) -> Any:
    return lambda *args: jax.vmap(lambda _: function(*args), 0, 0, name)(jnp.zeros(1))


def _unbound(error: BaseException | None) -> str | None:
    """Returns the mapped axis for want of which jax has raised, if that is what it says."""
    while error is not None:
        found = re.search(r"unbound axis name: (\w+)", str(error))
        if isinstance(error, NameError) and found:
            return found[1]
        error = error.__cause__
    return None
