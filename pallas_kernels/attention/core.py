"""What surrounds every kernel route alike: its derivative, and how it meets `vmap` and sharding."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from pallas_kernels._compat import vary, varying_axes
from pallas_kernels._dtypes import wide
from pallas_kernels.attention import derivatives, mapped
from pallas_kernels.attention.mapped import Arrays
from pallas_kernels.attention.problem import Gradients, Operands, Route, Settings, axes_of, names_of
from pallas_kernels.attention.tangent import PLAIN


def attend(
    route: Route, settings: Settings, operands: Operands, residual: bool = True
) -> tuple[jax.Array, jax.Array | None]:
    """Runs `route`, differentiable in query, key, value, bias and sinks, lse included.

    Without `residual` the lse is None and never leaves the compiled program, where the search for
    infinities (`jax.debug_infs`) would take that of a row without keys for a mistake.

    Output and lse carry the names ``"attention_output"`` and ``"attention_lse"`` for checkpoint
    policies: one that saves both never runs the forward kernel twice.
    """
    # Arguments that are equal on all devices of a `shard_map` have gradients that are summed over
    # them, which is what the transpose of this cast does.
    axes = varying_axes(*jax.tree.leaves(operands))
    operands = jax.tree.map(lambda x: vary(x, axes), operands)
    if settings.is_ordered:
        return differentiable(batched(route), settings, operands)
    if not residual:
        return _compiled_output(batched(route), settings, operands), None
    return compiled(batched(route), settings, operands)


@functools.cache
def batched(route: Route) -> Route:
    """Returns the route that meets `vmap` and sharding as `mapped.call` describes.

    An interpreter with parameters orders its side effects, which no batched or partitioned call can
    carry: under one the route runs bare.
    """

    def forward(settings: Settings, operands: Operands) -> tuple[jax.Array, jax.Array]:
        if settings.is_ordered:
            return route.forward(settings, operands)
        arrays, structure = jax.tree.flatten(operands)

        def fn(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
            return route.forward(settings, jax.tree.unflatten(structure, arrays))

        output, lse = _call(fn, arrays, axes_of(operands), ("btne", "bnt"), _dtypes(operands))
        return output, lse

    def backward(
        settings: Settings,
        operands: Operands,
        lse: jax.Array,
        cotangent: jax.Array,
        delta: jax.Array,
        bias_gradient: bool,
    ) -> Gradients:
        if settings.is_ordered:
            return route.backward(settings, operands, lse, cotangent, delta, bias_gradient)
        arrays, structure = jax.tree.flatten(operands)
        axes, names = axes_of(operands), names_of(operands)
        wanted = ["query", "key", "value"]
        wanted += [x for x in ("bias", "diagonals") if bias_gradient and x in names]
        places = [names.index(x) for x in wanted]

        def fn(*arrays: jax.Array) -> tuple[jax.Array, ...]:
            operands = jax.tree.unflatten(structure, arrays[:-3])
            lse, cotangent, delta = arrays[-3:]
            results: Any = route.backward(settings, operands, lse, cotangent, delta, bias_gradient)
            return tuple(getattr(results, x) for x in wanted)

        gradients = _call(
            fn,
            (*arrays, lse, cotangent, delta),
            (*axes, "bnt", "btne", "bnt"),
            [axes[i] for i in places],
            [arrays[i].dtype for i in places],
            summed=[(place, i) for i, place in enumerate(places) if i > 0],
        )
        return Gradients(**dict(zip(wanted, gradients)))

    def tangent(settings: Settings, operands: Operands, lse: jax.Array, moved: Any) -> Any:
        assert route.tangent is not None
        arrays, structure = jax.tree.flatten((operands, lse, moved))

        def fn(*arrays: jax.Array) -> tuple[jax.Array, ...]:
            assert route.tangent is not None
            return route.tangent(settings, *jax.tree.unflatten(structure, arrays))

        axes = (*axes_of(operands), "bnt", *axes_of(moved))
        dtype = _dtypes(operands)[1]
        return _call(fn, arrays, axes, ("btne", "bnt"), (dtype, dtype))

    return route._replace(
        forward=forward,
        backward=backward,
        tangent=None if route.tangent is None else tangent,
        plain=None if route.tangent is not None else batched(route.plain or PLAIN),
    )


def _call(
    fn: Callable[..., Arrays],
    args: Sequence[jax.Array],
    in_axes: Sequence[str],
    out_axes: Sequence[str],
    out_dtypes: Sequence[Any],
    summed: Sequence[tuple[int, int]] = (),
) -> Arrays:
    """As `mapped.call`, differentiable in forward mode as often as `fn` is.

    JAX does not differentiate a partitioned call. Its derivative is the call of the derivative.
    """

    @jax.custom_jvp
    def run(*args: jax.Array) -> Arrays:
        return mapped.call(fn, args, in_axes, out_axes, out_dtypes, summed)

    @functools.partial(run.defjvp, symbolic_zeros=True)
    def rule(primals: Any, tangents: Any) -> tuple[Arrays, Arrays]:
        moved = [i for i, t in enumerate(tangents) if not isinstance(t, SymbolicZero)]

        def both(*arrays: jax.Array) -> Arrays:
            here, there = list(arrays[: len(primals)]), list(arrays[len(primals) :])
            for at, i in enumerate(moved):  # under `vmap` one of the two may broadcast
                here[i], there[at] = jnp.broadcast_arrays(here[i], there[at])

            def of(*parts: jax.Array) -> Arrays:
                given = dict(zip(moved, parts))
                return fn(*(given.get(i, x) for i, x in enumerate(here)))

            values, moves = jax.jvp(of, tuple(here[i] for i in moved), tuple(there))
            return (*values, *moves)

        number = len(out_axes)
        results = _call(
            both,
            (*primals, *(tangents[i] for i in moved)),
            (*in_axes, *(in_axes[i] for i in moved)),
            (*out_axes, *out_axes),
            (*out_dtypes, *out_dtypes),
            (*summed, *((i, o + number) for i, o in summed)),
        )
        return results[:number], results[number:]

    return run(*args)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def differentiable(
    route: Route, settings: Settings, operands: Operands
) -> tuple[jax.Array, jax.Array]:
    """Runs the forward pass of `route`, with the derivatives that `derivatives` describes."""
    return route.forward(settings, operands)


# With `symbolic_zeros` the rule knows which derivatives are asked for.
@functools.partial(differentiable.defjvp, symbolic_zeros=True)
def _differentiable_jvp(route: Route, settings: Settings, primals: Any, tangents: Any) -> Any:
    (operands,), (d_operands,) = primals, tangents
    output, lse = differentiable(route, settings, operands)
    output = checkpoint_name(output, "attention_output")
    saved = checkpoint_name(derivatives.finite(lse), "attention_lse")
    lse = derivatives.with_empty(saved)
    moved = derivatives.moves(d_operands)
    return (output, lse), tuple(derivatives.push(route, settings, operands, output, saved, moved))


# Outside of `jit` too a call is traced once for its shapes, and `shard_map` accepts it there: by
# itself it cannot run custom derivatives that know symbolic zeros.
compiled = jax.jit(differentiable, static_argnums=(0, 1))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compiled_output(route: Route, settings: Settings, operands: Operands) -> jax.Array:
    results: Any = differentiable(route, settings, operands)
    return results[0]


def _dtypes(operands: Operands) -> tuple[Any, Any]:
    return operands.query.dtype, wide(operands.query.dtype)
