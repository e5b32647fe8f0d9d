"""Runs a kernel under `vmap`, and on many devices that share batch entries and heads.

A kernel is opaque to JAX: `vmap` would loop over it, and the partitioner would gather its inputs on
every device. But all attention asks of them is known from the axes of its arrays, written here as
strings: b batch entries, n query heads, k key/value heads; every other axis stays whole.

* Under `vmap` the mapped axis is folded into b, or into the query heads where all entries have the
  same keys.
* Under `jit` with sharded arguments, and on meshes with explicit axes, b and the heads are computed
  where they are; no input moves. A sequence that is sharded is gathered (automatic axes) or refused
  (explicit axes): that is what `ring_attention` is for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels._compat import unvarying, vary, varying_axes
from pallas_kernels.attention import heads
from pallas_kernels.attention.placement import (
    Leading,
    axis_names,
    explicit_sharding,
    free_axes,
    named,
    placed_like,
)

Arrays = tuple[jax.Array, ...]


def call(
    fn: Callable[..., Arrays],
    args: Sequence[jax.Array],
    in_axes: Sequence[str],
    out_axes: Sequence[str],
    out_dtypes: Sequence[Any],
    summed: Sequence[tuple[int, int]] = (),
) -> Arrays:
    """Returns ``fn(*args)``, batched and sharded as the module describes.

    Args:
      fn: Maps arrays to a tuple of arrays, each batch entry and head on its own.
      args: The query (B, T, N, d) and the key (B, S, K, d) first; axes of length 1 broadcast.
      in_axes: For each of `args` the letters of its axes, such as ``"btnd"``.
      out_axes: The same for the results.
      out_dtypes: The dtypes of the results.
      summed: Pairs (argument, result): the result is that argument's gradient, so it is summed over
        every axis along which the argument broadcasts.
    """
    spec = _Call(fn, tuple(in_axes), tuple(out_axes), tuple(out_dtypes), tuple(summed))
    return _batched(spec)(*args)


class _Call(NamedTuple):
    fn: Callable[..., Arrays]
    in_axes: tuple[str, ...]
    out_axes: tuple[str, ...]
    out_dtypes: tuple[Any, ...]
    summed: tuple[tuple[int, int], ...]

    def results(self, args: Sequence[jax.Array]) -> list[jax.ShapeDtypeStruct]:
        """Describes the results."""
        sizes = {}
        for axes, x in zip(self.in_axes, args):
            for letter, size in zip(axes, x.shape):
                sizes[letter] = sizes.get(letter, size) if size == 1 else size
        shapes = [tuple(sizes[letter] for letter in axes) for axes in self.out_axes]
        for i, o in self.summed:
            shapes[o] = args[i].shape
        return [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, self.out_dtypes)]


def _batched(spec: _Call) -> Callable[..., Arrays]:
    @jax.custom_batching.custom_vmap
    def run(*args: jax.Array) -> Arrays:
        return _sharded(spec, args)

    @run.def_vmap
    def rule(axis_size: int, in_batched: Sequence[bool], *args: jax.Array) -> Any:
        if axis_size == 0:
            one = [x[:0].sum(axis=0, dtype=x.dtype) if m else x for m, x in zip(in_batched, args)]
            found = [jnp.zeros((0, *x.shape), x.dtype) for x in spec.results(one)]
            return tuple(found), (True,) * len(found)
        shared = heads.share_keys(spec.in_axes, in_batched, args)
        if shared and not spec.summed:
            return _more_heads(run, spec, axis_size, in_batched, args)
        if any(mapped and "b" not in axes for mapped, axes in zip(in_batched, spec.in_axes)):
            return _one_by_one(run, in_batched, args, len(spec.out_axes))
        if shared:
            return _in_parts(run, spec, axis_size, in_batched, args)
        return _more_entries(run, spec, axis_size, in_batched, args)

    return run


def _more_entries(
    run: Callable[..., Arrays],
    spec: _Call,
    axis_size: int,
    in_batched: Sequence[bool],
    args: Sequence[jax.Array],
) -> tuple[Arrays, tuple[bool, ...]]:
    """Maps by more batch entries."""
    batch = args[0].shape[1 if in_batched[0] else 0]
    leading = Leading((axis_size, batch))
    if in_batched[0]:
        leading = Leading.of(args[0], 2)
    differentiated = {i for i, _ in spec.summed}

    def fold(i: int, x: jax.Array) -> jax.Array:
        if "b" not in spec.in_axes[i]:
            return x
        if not in_batched[i]:
            if x.shape[0] == 1 and spec.in_axes[i] in heads.BROADCAST and i not in differentiated:
                return x
            x = jnp.broadcast_to(x, (axis_size, *x.shape))
        return leading.merge(jnp.broadcast_to(x, (axis_size, batch, *x.shape[2:])))

    results = run(*(fold(i, x) for i, x in enumerate(args)))
    results = [leading.split(x) for x in results]
    for i, o in spec.summed:
        if args[i].shape[1 if in_batched[i] else 0] == 1:
            results[o] = results[o].sum(axis=1, keepdims=True)
    return tuple(results), (True,) * len(results)


def _in_parts(
    run: Callable[..., Arrays],
    spec: _Call,
    axis_size: int,
    in_batched: Sequence[bool],
    args: Sequence[jax.Array],
) -> tuple[Arrays, tuple[bool, ...]]:
    """Maps by `_more_entries` of so few entries at a time that what is copied stays small.

    Each entry has gradients of the keys of its own, so the keys of an entry cannot be shared here;
    their copies take no more than what is mapped does.
    """
    if not all(isinstance(x, int) for x in (axis_size, args[0].size, args[1].size)):
        return _more_entries(run, spec, axis_size, in_batched, args)
    own = sum(x.size for x, batched in zip(args, in_batched) if batched)
    at_once = max(1, own // max(1, args[1].size + args[2].size))
    part = next(n for n in range(min(axis_size, at_once), 0, -1) if axis_size % n == 0)
    if part == axis_size:
        return _more_entries(run, spec, axis_size, in_batched, args)
    shape = (axis_size // part, part)
    parts = [x.reshape(*shape, *x.shape[1:]) if b else x for x, b in zip(args, in_batched)]

    def entries(*these: jax.Array) -> Arrays:
        return _more_entries(run, spec, part, in_batched, these)[0]

    found, _ = _one_by_one(entries, in_batched, parts, len(spec.out_axes))
    return tuple(x.reshape(axis_size, *x.shape[2:]) for x in found), (True,) * len(found)


def _more_heads(
    run: Callable[..., Arrays],
    spec: _Call,
    axis_size: int,
    in_batched: Sequence[bool],
    args: Sequence[jax.Array],
) -> tuple[Arrays, tuple[bool, ...]]:
    """Maps by more query heads for each key head, so that no key is copied and no row moves."""
    fold = heads.Fold(axis_size, args[0].shape[2 + in_batched[0]], args[1].shape[2])
    found = run(*(fold.fold(*own) for own in zip(spec.in_axes, args, in_batched)))
    return tuple(map(fold.unfold, spec.out_axes, found)), (True,) * len(found)


def _one_by_one(
    run: Callable[..., Arrays],
    in_batched: Sequence[bool],
    args: Sequence[jax.Array],
    results: int,
) -> tuple[Arrays, tuple[bool, ...]]:
    """Maps in a loop, as over an argument without batch entries, such as the sinks."""
    mapped = [x for x, batched in zip(args, in_batched) if batched]

    def step(parts: Sequence[jax.Array]) -> Arrays:
        rest = iter(parts)
        return run(*(next(rest) if b else x for x, b in zip(args, in_batched)))

    return lax.map(step, mapped), (True,) * results


def _sharded(spec: _Call, args: Sequence[jax.Array]) -> Arrays:
    sharding = explicit_sharding(args[0])
    if sharding is not None:
        return _explicit(spec, args, sharding)
    if jax.sharding.get_abstract_mesh().manual_axes:
        return unvarying(spec.fn, *args)  # every device already holds its part
    return _automatic(spec, args)


def _automatic(spec: _Call, args: Sequence[jax.Array]) -> Arrays:
    """Lets the partitioner choose among the shardings of batch entries and heads."""
    heads_to_split = _heads_to_split(args)
    traced_in = jax.sharding.get_abstract_mesh()

    def partition(mesh: Any, arg_shapes: Any, result_shapes: Any) -> Any:
        del mesh  # empty where no argument of the program has a place yet
        query = named(arg_shapes[0].sharding, traced_in, arg_shapes[0].shape)
        mesh = query.mesh
        batch = axis_names(query.spec, 0)
        heads = _dividing(mesh, axis_names(query.spec, 2), heads_to_split)
        shard = functools.partial(_shard, mesh, batch, heads)
        return (
            mesh,
            _with_sums(spec, arg_shapes, batch, heads),
            tuple(shard(axes, x.shape) for axes, x in zip(spec.out_axes, result_shapes)),
            tuple(shard(axes, x.shape) for axes, x in zip(spec.in_axes, arg_shapes)),
        )

    def infer(mesh: Any, arg_shapes: Any, result_shapes: Any) -> Any:
        return partition(mesh, arg_shapes, result_shapes)[2]

    rule, whole = _sharding_rule(spec, args)
    group = args[0].shape[2] // args[1].shape[2]
    factor_sizes: dict[str, Any] = {"g": group} if "(k g)" in rule else {}
    partitioned = custom_partitioning(spec.fn)
    partitioned.def_partition(
        partition=partition,
        infer_sharding_from_operands=infer,
        sharding_rule=rule,
        need_replication_factors=whole,
        **factor_sizes,
    )
    return partitioned(*args)


def _explicit(spec: _Call, args: Sequence[jax.Array], sharding: NamedSharding) -> Arrays:
    """Runs `fn` on each device's batch entries and heads, where shardings are part of the types."""
    split = Split.of(sharding, args, spec.in_axes)
    local = _with_sums(spec, args, split.batch, split.heads)
    results = list(split.run(local, args, spec.in_axes, spec.out_axes, spec.results(args)))
    for i, o in spec.summed:  # a gradient lies where its primal does
        results[o] = placed_like(results[o], args[i])
    return tuple(results)


class Split(NamedTuple):
    """Over which axes of a mesh with explicit axes the batch entries and the heads are split."""

    mesh: Any
    batch: tuple[str, ...]
    heads: tuple[str, ...]

    @classmethod
    def of(
        cls, sharding: NamedSharding, args: Sequence[jax.Array], in_axes: Sequence[str]
    ) -> Split:
        """Returns how the query, the first of `args`, is split; `sharding` is its own."""
        found = {letter: axis_names(sharding.spec, i) for i, letter in enumerate(in_axes[0])}
        batch, heads = found.pop("b"), found.pop("n")
        if any(found.values()):
            raise ValueError(
                f"query {args[0].shape} is sharded as {sharding.spec}; expected only its batch and "
                "heads to be sharded (for a sharded sequence there is ring_attention)"
            )
        if heads != _dividing(sharding.mesh, heads, _heads_to_split(args)):
            raise ValueError(
                f"query heads are sharded over {heads}, {_count(sharding.mesh, heads)} devices, "
                f"which do not divide the {_heads_to_split(args)} heads of key {args[1].shape}"
            )
        return cls(sharding.mesh, batch, heads)

    def run(
        self,
        fn: Callable[..., Arrays],
        args: Sequence[jax.Array],
        in_axes: Sequence[str],
        out_axes: Sequence[str],
        results: Sequence[Any],
    ) -> Arrays:
        """Returns ``fn(*args)``, computed by each device of its own part; `results` have shapes."""
        shard = functools.partial(_shard, self.mesh, self.batch, self.heads)
        shardings = [shard(axes, x.shape) for axes, x in zip(in_axes, args)]
        local = jax.shard_map(
            fn,
            in_specs=tuple(s.spec for s in shardings),
            out_specs=tuple(shard(axes, x.shape).spec for axes, x in zip(out_axes, results)),
            mesh=self.mesh,
            axis_names=free_axes(self.mesh),
            check_vma=False,
        )
        # Inside of a `shard_map` over other axes, results vary over those as the arguments do.
        axes = varying_axes(*args)
        found = local(*(jax.sharding.reshard(x, s) for x, s in zip(args, shardings)))
        return tuple(vary(x, axes) for x in found)


def _with_sums(
    spec: _Call,
    args: Sequence[Any],
    batch: tuple[str, ...],
    heads: tuple[str, ...],
) -> Callable[..., Arrays]:
    """Adds the sums over devices that gradients of broadcast arguments need."""

    def local(*parts: jax.Array) -> Arrays:
        results = list(spec.fn(*parts))
        for i, o in spec.summed:
            missing = {x for x, size in zip(spec.in_axes[i], args[i].shape) if size == 1}
            names = (batch if "b" in missing else ()) + (heads if missing & {"n", "k"} else ())
            if names:
                results[o] = lax.psum(results[o], names)
        return tuple(results)

    return local


def _shard(
    mesh: Any, batch: tuple[str, ...], heads: tuple[str, ...], axes: str, shape: Sequence[int]
) -> NamedSharding:
    names = {"b": batch, "n": heads, "k": heads}
    entries = [names.get(letter, ()) if size != 1 else () for letter, size in zip(axes, shape)]
    return NamedSharding(mesh, PartitionSpec(*(e if e else None for e in entries)))


def _sharding_rule(spec: _Call, args: Sequence[jax.Array]) -> tuple[str, tuple[str, ...]]:
    """Returns the rule in the partitioner's notation, and the factors that must stay whole."""
    query_heads, kv_heads = args[0].shape[2], args[1].shape[2]
    # Query heads are those of the keys times a group; one key head serves them wherever they are.
    heads = "h" if kv_heads == 1 else "k" if kv_heads == query_heads else "(k g)"
    whole: list[str] = []

    def dimension(letter: str, size: int) -> str:
        if size != 1 and letter in "bk":
            return letter
        if size != 1 and letter == "n":
            return heads
        whole.append(f"w{len(whole)}")
        return whole[-1]

    def side(all_axes: Sequence[str], arrays: Sequence[Any]) -> str:
        return ", ".join(
            " ".join(dimension(letter, size) for letter, size in zip(axes, x.shape))
            for axes, x in zip(all_axes, arrays)
        )

    arguments = side(spec.in_axes, args)
    return f"{arguments} -> {side(spec.out_axes, spec.results(args))}", tuple(whole)


def _heads_to_split(args: Sequence[jax.Array]) -> int:
    """Returns how many heads devices can share: the keys', or all queries' of a single key head."""
    return args[0].shape[2] if args[1].shape[2] == 1 else args[1].shape[2]


def _count(mesh: Any, names: Sequence[str]) -> int:
    return math.prod(mesh.shape[name] for name in names)


def _dividing(mesh: Any, names: tuple[str, ...], number: int) -> tuple[str, ...]:
    """Returns the leading `names` over which `number` heads can be split evenly."""
    while names and number % _count(mesh, names):
        names = names[:-1]
    return names
