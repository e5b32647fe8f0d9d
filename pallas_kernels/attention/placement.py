"""Where arrays lie: the names of mesh axes behind a sharding, and reshapes that move nothing."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding


def axis_names(spec: PartitionSpec, axis: int) -> tuple[str, ...]:
    """Returns the mesh axes over which `spec` splits an axis."""
    entry = spec[axis] if axis < len(spec) else None
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def size_of_axis(axis_name: Hashable) -> int:
    """Returns how many devices or entries a mapped axis has, or raises a ValueError."""
    try:
        return lax.axis_size(axis_name)
    except NameError as error:
        raise ValueError(
            f"axis {axis_name!r} is not bound; call inside shard_map or pmap, or vmap with this "
            "axis_name"
        ) from error


def placed_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """Returns `x` where `like`, of the same shape, lies by its type."""
    given, wanted = (jax.typeof(a).sharding for a in (x, like))
    if given == wanted or AxisType.Explicit not in given.mesh.axis_types:
        return x
    return jax.sharding.reshard(x, NamedSharding(given.mesh, wanted.spec))


def free_axes(mesh: Any) -> set[Any]:
    """Returns the axes for `jax.shard_map` inside of one over others: the empty set means all."""
    taken = set(mesh.manual_axes)
    return set(mesh.axis_names) - taken if taken else set()


def explicit_sharding(x: jax.Array) -> NamedSharding | None:
    """Returns the sharding of `x` if its mesh has explicit axes, or the ambient one has them."""
    sharding = jax.typeof(x).sharding
    if sharding.mesh.empty:  # arrays that have no place yet are the same on all devices
        ambient = jax.sharding.get_abstract_mesh()
        sharding = NamedSharding(ambient, PartitionSpec())
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


class Leading(NamedTuple):
    """The leading axes of all arrays of a call, which become one batch axis and come back.

    Where an axis but the first is sharded by its type, each device merges what it has: the order of
    the batch entries is then its own, and the same for all arrays.
    """

    shape: tuple[int, ...]
    mesh: Any = None  # None: an ordinary reshape
    names: tuple[tuple[str, ...], ...] = ()  # the mesh axes of each

    @classmethod
    def of(cls, x: jax.Array, count: int) -> Leading:
        """Describes the first `count` axes of `x`."""
        sharding = jax.typeof(x).sharding
        names = tuple(axis_names(sharding.spec, axis) for axis in range(count))
        if not any(names[1:]) or AxisType.Explicit not in sharding.mesh.axis_types:
            return cls(x.shape[:count])
        return cls(x.shape[:count], sharding.mesh, names)

    def merge(self, x: jax.Array) -> jax.Array:
        """Makes the leading axes of `x` one."""
        count = len(self.shape)
        if count == 1:
            return x
        merged = (math.prod(self.shape), *x.shape[count:])
        if self.mesh is None:
            return x.reshape(merged)
        apart, together = self._specs(jax.typeof(x).sharding.spec[count:])
        x = jax.sharding.reshard(x, NamedSharding(self.mesh, apart))
        return self._locally(lambda x: x.reshape(-1, *x.shape[count:]), apart, together)(x)

    def split(self, x: jax.Array) -> jax.Array:
        """Gives the first axis of `x` its parts back."""
        if len(self.shape) == 1:
            return x
        if self.mesh is None:
            return x.reshape(*self.shape, *x.shape[1:])
        apart, together = self._specs(jax.typeof(x).sharding.spec[1:])
        x = jax.sharding.reshard(x, NamedSharding(self.mesh, together))
        sizes = [
            size // math.prod(self.mesh.shape[name] for name in names)
            for size, names in zip(self.shape, self.names)
        ]
        return self._locally(lambda x: x.reshape(*sizes, *x.shape[1:]), together, apart)(x)

    def _specs(self, rest: Any) -> tuple[PartitionSpec, PartitionSpec]:
        entries = [names or None for names in self.names]
        return PartitionSpec(*entries, *rest), PartitionSpec(sum(self.names, ()), *rest)

    def _locally(self, fn: Any, before: PartitionSpec, after: PartitionSpec) -> Any:
        return jax.shard_map(
            fn,
            in_specs=before,
            out_specs=after,
            mesh=self.mesh,
            axis_names=free_axes(self.mesh),
        )


def named(sharding: Sharding, mesh: Any, shape: Sequence[int]) -> NamedSharding:
    """Returns the sharding of an array as one over the axes of a mesh.

    The partitioner tells in terms of a mesh only where an argument of the program was; elsewhere it
    tells which device has which part. What no axes of the mesh describe is replicated.

    Args:
      sharding: Of an array of this `shape`.
      mesh: The abstract mesh in which the program was traced, which may be empty.
      shape: Of the array.
    """
    if isinstance(sharding, NamedSharding):
        return sharding
    devices = np.array(list(sharding.devices_indices_map(tuple(shape))))
    sizes, names = (len(devices),), ("devices",)
    if mesh.size == len(devices):
        sizes, names = mesh.axis_sizes, mesh.axis_names
    concrete = Mesh(devices.reshape(sizes), names)
    parts = [size // max(part, 1) for size, part in zip(shape, sharding.shard_shape(tuple(shape)))]
    for entries in _entries(parts, dict(concrete.shape)):
        found = NamedSharding(concrete, PartitionSpec(*entries))
        if found.is_equivalent_to(sharding, len(shape)):
            return found
    return NamedSharding(concrete, PartitionSpec())


def _entries(parts: Sequence[int], sizes: dict[str, int]) -> Iterator[tuple[Any, ...]]:
    """Yields the ways to split axes into so many `parts` over mesh axes of these `sizes`."""
    if not parts:
        yield ()
        return
    for names in _products(parts[0], sizes):
        rest = {name: size for name, size in sizes.items() if name not in names}
        for entries in _entries(parts[1:], rest):
            yield (names or None, *entries)


def _products(number: int, sizes: dict[str, int]) -> Iterator[tuple[str, ...]]:
    """Yields the sequences of names whose sizes, all above 1, have the product `number`."""
    if number == 1:
        yield ()
        return
    for name, size in sizes.items():
        if size > 1 and number % size == 0:
            rest = {other: x for other, x in sizes.items() if other != name}
            for names in _products(number // size, rest):
                yield (name, *names)
