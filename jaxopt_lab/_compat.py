"""What differs between jax versions and compilers, and facts about arrays under a mesh."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, ManualAxisType, NamedSharding, PartitionSpec


def type_apart_from_leading_axis(x: jax.Array) -> Any:
    """Returns what two arrays must share to be concatenated along axis 0 without a change."""
    aval = jax.typeof(x)
    return aval.shape[1:], aval.dtype, str(aval.sharding.spec), str(aval.manual_axis_type)


def type_of(x: jax.Array) -> Any:
    """Returns what two arrays must share to be stacked without a change."""
    aval = jax.typeof(x)
    return aval.shape, aval.dtype, str(aval.sharding.spec), str(aval.manual_axis_type)


def members(stacked: Any, count: int) -> list[Any]:
    """Returns `[stacked[0], stacked[1], ...]`, of each array in a tree.

    A place is an operand, and of two numbers, as a compiler would put a single one into the kernel
    that reads there: so kernels of equal leaves are equal, and XLA translates equal ones once. For
    arrays of a few numbers: a CPU reads longer ones slower so.
    """
    places = lax.optimization_barrier([np.array([place, 0], np.int32) for place in range(count)])

    def member(x: jax.Array, place: jax.Array) -> jax.Array:
        start = (place[0], *[place[1]] * (x.ndim - 1))
        found = lax.dynamic_slice(x, start, (1, *x.shape[1:]), allow_negative_indices=False)
        return found.reshape(x.shape[1:])

    return [jax.tree.map(lambda x, p=place: member(x, p), stacked) for place in places]


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


def rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """Returns `x` as it is after a conversion to a narrower float of 16 bits or more, in its own.

    Compilers for GPUs drop a conversion there and back as excess precision; this they keep.
    """
    own, narrow = jnp.finfo(x.dtype), jnp.finfo(dtype)
    if narrow.bits >= own.bits:
        return x
    found = lax.reduce_precision(x, exponent_bits=narrow.nexp, mantissa_bits=narrow.nmant)
    if narrow.nexp == own.nexp:
        return found
    # What is below the normal numbers would become zero, but still has an even spacing.
    spacing = float(narrow.smallest_subnormal)
    return jnp.where(jnp.abs(x) < float(narrow.tiny), jnp.round(x / spacing) * spacing, found)


def vary_alike(arrays: Sequence[jax.Array], *others: jax.Array) -> list[jax.Array]:
    """Marks each of `arrays` as varying over all mesh axes over which any array here varies."""
    axes = frozenset().union(*map(varying_axes, (*arrays, *others)))
    return [vary_over(x, axes) for x in arrays]


def vary_over(x: jax.Array, axes: frozenset[Any]) -> jax.Array:
    """Marks `x` as varying over `axes`, too."""
    missing = axes - varying_axes(x)
    return lax.pcast(x, tuple(sorted(missing, key=str)), to="varying") if missing else x


# `shard_map` wants the branches of a `cond`, and what goes into and comes out of a loop, to vary
# over the same mesh axes. Constants and zeros vary over none, gradients over some. The functions
# below are jax's, with all of it marked alike; every branch and loop of this package is one.


def cond(pred: Any, true_fun: Callable, false_fun: Callable, *operands: Any) -> Any:
    """Is `jax.lax.cond` whose branches vary alike."""
    return lax.cond(pred, *_alike([true_fun, false_fun], operands, pred), *operands)


def switch(index: Any, branches: Sequence[Callable], *operands: Any) -> Any:
    """Is `jax.lax.switch` whose branches vary alike."""
    return lax.switch(index, _alike(branches, operands, index), *operands)


def platform_dependent(*operands: Any, default: Callable, **platforms: Callable) -> Any:
    """Is `jax.lax.platform_dependent` whose branches vary alike."""
    default, *others = _alike([default, *platforms.values()], operands)
    return lax.platform_dependent(*operands, default=default, **dict(zip(platforms, others)))


def fori_loop(lower: Any, upper: Any, body_fun: Callable, init_val: Any) -> Any:
    """Is `jax.lax.fori_loop` whose carry varies alike before and after a turn."""

    def turn(val: Any) -> Any:
        return body_fun(jnp.asarray(lower), val)

    init_val, mark = _carried(turn, init_val)
    return lax.fori_loop(lower, upper, lambda i, val: mark(body_fun(i, val)), init_val)


def while_loop(cond_fun: Callable, body_fun: Callable, init_val: Any) -> Any:
    """Is `jax.lax.while_loop` whose carry varies alike before and after a turn."""

    def turn(val: Any) -> Any:
        axes = varying_axes(cond_fun(val))
        return jax.tree.map(lambda x: vary_over(x, axes), body_fun(val))

    init_val, mark = _carried(turn, init_val)
    return lax.while_loop(cond_fun, lambda val: mark(body_fun(val)), init_val)


def scan(f: Callable, init: Any, xs: Any) -> tuple[Any, Any]:
    """Is `jax.lax.scan` whose carry varies alike before and after a turn."""
    if not all(jnp.shape(x)[0] for x in jax.tree.leaves(xs)):
        return lax.scan(f, init, xs)

    def turn(carry: Any) -> Any:
        return f(carry, jax.tree.map(lambda x: x[0], xs))[0]

    init, mark = _carried(turn, init)

    def step(carry: Any, x: Any) -> tuple[Any, Any]:
        carry, y = f(carry, x)
        return mark(carry), y

    return lax.scan(step, init, xs)


def _knows_what_varies() -> bool:
    """Whether this is the inside of a `shard_map` that checks what varies."""
    names = jax.sharding.get_abstract_mesh().manual_axes
    return any(varying_axes(lax.axis_index(name)) for name in names)


def _varying(fn: Callable, operands: Sequence[Any]) -> list[frozenset[Any]]:
    """Returns what each leaf of the result varies over."""
    found: list[list[frozenset[Any]]] = []

    def noted(*operands: Any) -> Any:
        out = fn(*operands)
        found.append([varying_axes(x) for x in jax.tree.leaves(out)])
        return out

    jax.eval_shape(noted, *operands)
    return found[-1]


def _marked(tree: Any, axes: Sequence[frozenset[Any]]) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    if len(leaves) != len(axes):
        return tree  # jax says what is wrong
    return structure.unflatten(map(vary_over, leaves, axes))


def _alike(
    branches: Sequence[Callable], operands: Sequence[Any], chosen_by: Any = 0
) -> list[Callable]:
    if not _knows_what_varies():
        return list(branches)
    columns = zip(*(_varying(branch, operands) for branch in branches))
    # What is chosen by a value that varies, varies; jax itself does not say so.
    axes = [varying_axes(chosen_by).union(*column) for column in columns]

    def wrapped(branch: Callable) -> Callable:
        @functools.wraps(branch)
        def run(*operands: Any) -> Any:
            return _marked(branch(*operands), axes)

        return run

    return [wrapped(branch) for branch in branches]


def _carried(turn: Callable, init: Any) -> tuple[Any, Callable]:
    """Returns what a loop starts from, and a function that marks what a turn returns alike."""
    if not _knows_what_varies():
        return init, lambda carry: carry
    init = jax.tree.map(jnp.asarray, init)
    axes = [varying_axes(x) for x in jax.tree.leaves(init)]
    while True:
        after = [a | b for a, b in zip(axes, _varying(turn, [init]))]
        if after == axes:
            return init, functools.partial(_marked, axes=axes)
        axes, init = after, _marked(init, after)


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


def wait_for_processes(name: str, processes: Sequence[int], seconds: float) -> None:
    """Returns when all of `processes` have called this with one name, which is used only once.

    Raises:
      jax.errors.JaxRuntimeError: they have not, within `seconds`.
    """
    from jax._src import distributed  # its client has no public name

    client = distributed.global_state.client
    if client is not None:
        client.wait_at_barrier(name, int(1000 * seconds), process_ids=list(processes))


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
